"""Pair weighting: from token log-probabilities to losses, coefficients and metrics, in one launch.

A program owns one pair. It adds up both responses' tokens in float64 in one fixed order, evaluates
the objective on the two sums, and writes each token's coefficient, `∂(Σ L / divisor) / ∂ℓ_t`. The
objective comes as a formula of general ingredients, its numbers as arguments, which need no copy to
the device, and its choices as compile-time flags:

    ρ_y = x_y, or x_y − log(1 − e^x_y) as log-odds     x_y = (ℓ_y − r_y) or ℓ_y, over n_y or not
    m   = scale (a_w ρ_w − a_l ρ_l) + shift + length_weight (n_w − n_l)
    L   = weight · q · w · f(m) − c ℓ_w                 f: −log σ with label noise, hinge, square
                                                        times the pair's own weight, if it has one;
                                                        its own β replaces scale, or −1/(2β) shift
    q   = σ(η (s_w − s_l))                              quality of the pair
    w   = (1 − σ(u))^γ, u = scale (ℓ_w − ℓ_l) − τ       how little of it has been learned
    c   = λ, or λ where r_w > ℓ_w and s_w ≥ s_least     NLL of the chosen response
    a_y = clip(e^(±α_y δ), floor, C), δ = b_w − b_l     the balance, a constant to the gradient;
                                                        1 where α_y = 0

Both coefficients follow by the chain rule, written out below.
"""

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

LINKS = ("log_sigmoid", "hinge", "square")
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "weights/quality",
    "weights/performance",
    "weights/nll",
    "balance/chosen",
    "balance/rejected",
    "balance/clipped",
)
BLOCK_TOKENS = 1024
_LOG_ODDS_MAX = tl.constexpr(-1e-6)  # ℓ̄ stays below: a perfectly predicted response is finite


class Formula(Protocol):
    """The ingredients above by name; `fastpref.objectives.PairFormula` is one."""

    link: str
    scale: float
    shift: float
    length_weight: float
    label_smoothing: float
    weight: float
    uses_reference: bool
    normalized: bool
    log_odds: bool
    nll_weight: float
    nll_normalized: bool
    nll_least_score: float | None  # not None: only where the policy fell behind the reference
    quality: float | None
    focus: tuple[float, float] | None  # γ, τ
    focus_detached: bool
    balance: Any  # None, or what has the fields of `fastpref.objectives.Balance`
    reward_scale: float
    beta_shifts: bool  # a pair's own β replaces shift by −1/(2β), and not scale by β


@triton.jit
def _float64(number):
    """Of an argument; interpreted, it is a Python number, which may become float32."""
    return tl.full((), number, tl.float64)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0 by an accurate log: the rounding of 1 + x is divided out again."""
    wide = 1.0 + x
    return tl.where(wide == 1.0, x, tl.log(wide) * (x / tl.where(wide == 1.0, 1.0, wide - 1.0)))


@triton.jit
def _softplus(x):
    return tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _log1m_exp(x):
    return tl.log(1.0 - tl.exp(tl.minimum(x, _LOG_ODDS_MAX)))


@triton.jit
def _balance_coefficient(alpha, delta, floor, ceiling):
    """clip(e^(α δ), floor, ceiling), 1 where α = 0, and whether it was clipped."""
    power = alpha * delta
    found = tl.exp(tl.where(power > tl.log(ceiling), tl.log(ceiling), power))  # keeps NaN
    found = tl.where(found < floor, floor, tl.where(found > ceiling, ceiling, found))
    beyond = (power > tl.log(ceiling)) | (tl.exp(power) < floor)
    return tl.where(alpha == 0, 1.0, found), beyond & (alpha != 0)


@triton.jit
def _sequence_sum(logps_ptr, weights_ptr, start, stop, BLOCK):
    """Weighted sum of `logps[start:stop]`, rounded once, as float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for at in range(start, stop, BLOCK):
        token = at + tl.arange(0, BLOCK)
        logps = tl.load(logps_ptr + token, token < stop, other=0.0)
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + token, token < stop, other=0.0)
            logps = logps * weights.to(logps.dtype)
        total += logps.to(tl.float64)
    return tl.sum(total, 0).to(logps_ptr.dtype.element_ty).to(tl.float64)


@triton.jit
def _spread(coef_ptr, weights_ptr, coef, start, stop, BLOCK):
    """A response's coefficient to each of its tokens, times the token's weight."""
    coef = coef.to(coef_ptr.dtype.element_ty)
    for at in range(start, stop, BLOCK):
        token = at + tl.arange(0, BLOCK)
        of_token = tl.zeros((BLOCK,), coef_ptr.dtype.element_ty) + coef
        if weights_ptr is not None:
            weights = tl.load(weights_ptr + token, token < stop, other=0.0)
            of_token = of_token * weights.to(of_token.dtype)
        tl.store(coef_ptr + token, of_token, token < stop)


@triton.jit(do_not_specialize=["pairs", "first", "total_pairs", "divisor"])
def pair_weighting_kernel(
    logps_ptr,  # (n,) tokens of the pairs `first` and on, chosen before rejected
    weights_ptr,  # (n,), or None
    offsets_ptr,  # (2·total_pairs + 1,) where each response starts among all tokens
    ref_logps_ptr,  # (2, total_pairs), this and the four below None where there are none
    scores_ptr,  # (2, total_pairs)
    pair_weights_ptr,  # (total_pairs,)
    betas_ptr,  # (total_pairs,)
    lengths_ptr,  # (2, total_pairs)
    sums_ptr,  # (2·pairs,) out
    losses_ptr,  # (pairs,) out
    coef_ptr,  # (n,) out
    metrics_ptr,  # (12, pairs) out
    pairs,
    first,
    total_pairs,
    divisor,
    scale: tl.float64,
    shift: tl.float64,
    length_weight: tl.float64,
    label_smoothing: tl.float64,
    weight: tl.float64,
    nll_weight: tl.float64,
    nll_least_score: tl.float64,
    quality_scale: tl.float64,
    focus_power: tl.float64,
    focus_threshold: tl.float64,
    chosen_exponent: tl.float64,
    rejected_exponent: tl.float64,
    floor: tl.float64,
    ceiling: tl.float64,
    reward_scale: tl.float64,
    LINK: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    USES_REFERENCE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    LOG_ODDS: tl.constexpr,
    HAS_NLL: tl.constexpr,
    NLL_NORMALIZED: tl.constexpr,
    NLL_GATED: tl.constexpr,
    HAS_QUALITY: tl.constexpr,
    HAS_FOCUS: tl.constexpr,
    FOCUS_DETACHED: tl.constexpr,
    HAS_BALANCE: tl.constexpr,
    BALANCE_OF_REWARD: tl.constexpr,
    BALANCE_PER_TOKEN: tl.constexpr,
    BETA_SHIFTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    base = tl.load(offsets_ptr + 2 * first)
    offset_ptr = offsets_ptr + 2 * (first + pair)
    start = tl.load(offset_ptr) - base
    middle = tl.load(offset_ptr + 1) - base
    stop = tl.load(offset_ptr + 2) - base
    l_w = _sequence_sum(logps_ptr, weights_ptr, start, middle, BLOCK)
    l_l = _sequence_sum(logps_ptr, weights_ptr, middle, stop, BLOCK)
    tokens_w, tokens_l = (middle - start).to(tl.float64), (stop - middle).to(tl.float64)
    counts = (tokens_w > 0) & (tokens_l > 0)  # else the objective never sees the pair
    if lengths_ptr is not None:
        tokens_w = tl.load(lengths_ptr + first + pair).to(tl.float64)
        tokens_l = tl.load(lengths_ptr + total_pairs + first + pair).to(tl.float64)
    over_w, over_l = 1.0 / tl.where(counts, tokens_w, 1.0), 1.0 / tl.where(counts, tokens_l, 1.0)
    ref_w, ref_l, s_w, s_l = l_w * 0.0, l_w * 0.0, l_w * 0.0, l_w * 0.0
    if ref_logps_ptr is not None:
        ref_w = tl.load(ref_logps_ptr + first + pair).to(logps_ptr.dtype.element_ty)
        ref_l = tl.load(ref_logps_ptr + total_pairs + first + pair)
        ref_l = ref_l.to(logps_ptr.dtype.element_ty)
        ref_w, ref_l = ref_w.to(tl.float64), ref_l.to(tl.float64)
    if scores_ptr is not None:
        s_w = tl.load(scores_ptr + first + pair).to(tl.float64)
        s_l = tl.load(scores_ptr + total_pairs + first + pair).to(tl.float64)

    # Rewards and their slopes ∂ρ/∂ℓ.
    per_w, per_l = l_w * 0.0 + 1.0, l_l * 0.0 + 1.0
    if NORMALIZED:
        per_w, per_l = over_w, over_l
    policy_w, policy_l = l_w * per_w, l_l * per_l
    ratio_w, ratio_l = policy_w - ref_w * per_w, policy_l - ref_l * per_l
    rho_w, rho_l, slope_w, slope_l = policy_w, policy_l, per_w, per_l
    if USES_REFERENCE:
        rho_w, rho_l = ratio_w, ratio_l
    if LOG_ODDS:
        rho_w, rho_l = policy_w - _log1m_exp(policy_w), policy_l - _log1m_exp(policy_l)
        slope_w *= tl.where(policy_w <= _LOG_ODDS_MAX, tl.exp(-_log1m_exp(policy_w)), 1.0)
        slope_l *= tl.where(policy_l <= _LOG_ODDS_MAX, tl.exp(-_log1m_exp(policy_l)), 1.0)

    a_w, a_l = per_w * 0.0 + 1.0, per_l * 0.0 + 1.0
    if HAS_BALANCE:
        b_w, b_l = l_w, l_l
        if BALANCE_OF_REWARD:
            b_w, b_l = l_w - ref_w, l_l - ref_l
        if BALANCE_PER_TOKEN:
            b_w, b_l = b_w * over_w, b_l * over_l
        if LOG_ODDS:
            b_w, b_l = b_w + _log1m_exp(b_w), b_l + _log1m_exp(b_l)
        delta = b_w - b_l
        floor, ceiling = _float64(floor), _float64(ceiling)
        a_w, clipped_w = _balance_coefficient(_float64(chosen_exponent), delta, floor, ceiling)
        a_l, clipped_l = _balance_coefficient(_float64(rejected_exponent), -delta, floor, ceiling)
        clipped = (clipped_w | clipped_l).to(tl.float64)

    # The link and its derivative in m.
    scale, shift, reward_scale = _float64(scale), _float64(shift), _float64(reward_scale)
    if betas_ptr is not None:
        reward_scale = tl.load(betas_ptr + first + pair).to(tl.float64)
        if BETA_SHIFTS:
            shift = -0.5 / reward_scale
        else:
            scale = reward_scale
    m = scale * (a_w * rho_w - a_l * rho_l) + shift
    m += _float64(length_weight) * (tokens_w - tokens_l)
    if LINK == 0:
        f, df = _softplus(-m), -_sigmoid(-m)
        if HAS_SMOOTHING:
            noise = _float64(label_smoothing)
            f = (1.0 - noise) * f + noise * _softplus(m)
            df = (1.0 - noise) * df + noise * _sigmoid(m)
    elif LINK == 1:
        f, df = tl.where(m >= 1, 0.0, 1.0 - m), tl.where(m >= 1, 0.0, -1.0)
    else:
        f, df = m * m, 2.0 * m

    weight = _float64(weight)
    if HAS_QUALITY:
        quality = _sigmoid(_float64(quality_scale) * (s_w - s_l))
        weight *= quality
    of_focus = weight * f * 0.0  # ∂L/∂u
    if HAS_FOCUS:
        gamma = _float64(focus_power)
        u = scale * (policy_w - policy_l) - _float64(focus_threshold)
        focus = tl.exp(-gamma * _softplus(u))
        if not FOCUS_DETACHED:
            of_focus = -weight * f * gamma * _sigmoid(u) * focus
        weight *= focus
    of_margin = weight * df * scale
    loss = weight * f
    coef_w = of_margin * a_w * slope_w + of_focus * scale * per_w
    coef_l = -of_margin * a_l * slope_l - of_focus * scale * per_l
    nll = loss * 0.0
    if HAS_NLL:
        nll = _float64(nll_weight)
        if NLL_GATED:
            applies = (ratio_w < 0) & (s_w >= _float64(nll_least_score))
            nll = tl.where(applies, nll, 0.0)
        per_nll = l_w * 0.0 + 1.0
        if NLL_NORMALIZED:
            per_nll = over_w
        loss -= nll * l_w * per_nll
        coef_w -= nll * per_nll
    if pair_weights_ptr is not None:
        pair_weight = tl.load(pair_weights_ptr + first + pair).to(tl.float64)
        loss, coef_w, coef_l = loss * pair_weight, coef_w * pair_weight, coef_l * pair_weight

    tl.store(sums_ptr + 2 * pair, l_w)
    tl.store(sums_ptr + 2 * pair + 1, l_l)
    tl.store(losses_ptr + pair, tl.where(counts, loss, 0.0))
    coef_w, coef_l = tl.where(counts, coef_w, 0.0), tl.where(counts, coef_l, 0.0)
    _spread(coef_ptr, weights_ptr, coef_w / divisor, start, middle, BLOCK)
    _spread(coef_ptr, weights_ptr, coef_l / divisor, middle, stop, BLOCK)

    reward_w, reward_l = reward_scale * policy_w, reward_scale * policy_l
    if USES_REFERENCE:
        reward_w, reward_l = reward_scale * ratio_w, reward_scale * ratio_l
    accurate = (reward_w > reward_l).to(tl.float64)
    out_ptr = metrics_ptr + pair
    tl.store(out_ptr, tl.where(counts, reward_w, 0.0))
    tl.store(out_ptr + pairs, tl.where(counts, reward_l, 0.0))
    tl.store(out_ptr + 2 * pairs, tl.where(counts, reward_w - reward_l, 0.0))
    tl.store(out_ptr + 3 * pairs, tl.where(counts, accurate, 0.0))
    tl.store(out_ptr + 4 * pairs, tl.where(counts, l_w, 0.0))
    tl.store(out_ptr + 5 * pairs, tl.where(counts, l_l, 0.0))
    if HAS_QUALITY:
        tl.store(out_ptr + 6 * pairs, tl.where(counts, quality, 0.0))
    if HAS_FOCUS:
        tl.store(out_ptr + 7 * pairs, tl.where(counts, focus, 0.0))
    tl.store(out_ptr + 8 * pairs, tl.where(counts, nll, 0.0))
    if HAS_BALANCE:
        tl.store(out_ptr + 9 * pairs, tl.where(counts, a_w, 0.0))
        tl.store(out_ptr + 10 * pairs, tl.where(counts, a_l, 0.0))
        tl.store(out_ptr + 11 * pairs, tl.where(counts, clipped, 0.0))


def weigh_pairs(
    logps: Tensor,  # (n,) tokens of the pairs `first:last`
    offsets: Tensor,  # (2B + 1,) of all responses
    ref_logps: Tensor | None,  # (2, B)
    scores: Tensor | None,  # (2, B)
    token_weights: Tensor | None,  # (n,)
    pair_weights: Tensor | None,  # (B,)
    betas: Tensor | None,  # (B,)
    lengths: Tensor | None,  # (2, B)
    numbers: list[float],  # of `numbers_of`
    flags: list[int],  # of `flags_of`
    first: int,
    last: int,
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums `(2·pairs,)`, losses `(pairs,)`, coefficients `(n,)`, metrics `(12, pairs)`."""
    pairs = last - first
    sums, losses = logps.new_empty(2 * pairs), logps.new_empty(pairs)
    coef, metrics = torch.empty_like(logps), logps.new_empty(len(METRICS), pairs)
    if pairs:
        pair_weighting_kernel[(pairs,)](
            logps,
            token_weights,
            offsets,
            ref_logps,
            scores,
            pair_weights,
            betas,
            lengths,
            sums,
            losses,
            coef,
            metrics,
            pairs,
            first,
            (len(offsets) - 1) // 2,
            divisor,
            *numbers,
            *flags,
            BLOCK=BLOCK_TOKENS,
            num_warps=4,
            num_stages=1,
        )
    return sums, losses, coef, metrics


def numbers_of(formula: Formula) -> tuple[float, ...]:
    """The formula's numbers in the kernel's order."""
    gamma, tau = formula.focus or (0.0, 0.0)
    balance = formula.balance
    return (
        formula.scale,
        formula.shift,
        formula.length_weight,
        formula.label_smoothing,
        formula.weight,
        formula.nll_weight,
        formula.nll_least_score or 0.0,
        formula.quality or 0.0,
        gamma,
        tau,
        *(
            (0.0, 0.0, 0.0, 1.0)
            if balance is None
            else (
                balance.chosen_exponent,
                balance.rejected_exponent,
                balance.floor,
                balance.ceiling,
            )
        ),
        formula.reward_scale,
    )


def flags_of(formula: Formula) -> dict[str, Any]:
    """The formula's choices in the kernel's order: one set for each kind of objective."""
    balance = formula.balance
    return {
        "LINK": LINKS.index(formula.link),
        "HAS_SMOOTHING": formula.label_smoothing != 0,
        "USES_REFERENCE": formula.uses_reference,
        "NORMALIZED": formula.normalized,
        "LOG_ODDS": formula.log_odds,
        "HAS_NLL": formula.nll_weight != 0,
        "NLL_NORMALIZED": formula.nll_normalized,
        "NLL_GATED": formula.nll_least_score is not None,
        "HAS_QUALITY": formula.quality is not None,
        "HAS_FOCUS": formula.focus is not None,
        "FOCUS_DETACHED": formula.focus_detached,
        "HAS_BALANCE": balance is not None,
        "BALANCE_OF_REWARD": balance is not None and balance.source == "implicit_reward",
        "BALANCE_PER_TOKEN": balance is not None and balance.per_token,
        "BETA_SHIFTS": formula.beta_shifts,
    }
