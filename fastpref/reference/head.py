"""The head by definition: materialised logits, their log-softmax, sums of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    frozen_weight: Tensor | None = None,  # (V, F); weight has the other columns then
    frozen_scale: Tensor | None = None,  # (V,)
) -> Tensor:
    """Logits `(N, V)`: `cap·tanh(scale·(W h + b) / cap) / temperature`."""
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    dtype = torch.float64 if wide else torch.float32
    weight = weight.to(dtype)
    if frozen_weight is not None:
        scale = 1 if frozen_scale is None else frozen_scale.to(dtype)[:, None]
        weight = torch.cat([scale * frozen_weight.to(dtype), weight], 1)
    z = hidden.to(dtype) @ weight.T
    if bias is not None:
        z = z + bias.to(dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    **head: Any,  # bias, logit_scale, softcap, temperature, frozen_weight, …
) -> Tensor:
    """Log-probability of each target `(N,)`, nats; 0 where the target is -100."""
    return token_statistics(hidden, weight, targets, **head)["logps"]


def token_statistics(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    *,
    stats: tuple[str, ...] = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
    **head: Any,
) -> dict[str, Tensor]:
    """`logps` and the asked-for statistics, each `(N,)`; 0 where not scored."""
    targets = targets.to(hidden.device)
    scored = targets != IGNORED
    z = logits(hidden[scored], weight, **head)  # (n, V)
    log_probs = torch.log_softmax(z, dim=-1)
    wanted = targets[scored]
    values = {
        "logps": log_probs.gather(-1, wanted[:, None]).squeeze(-1),
        # e^−1e4 is 0, and so is its product: a probability of 0 adds 0, to the gradient too.
        "entropy": -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1),
        "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == wanted,
        "log_sum_sq_probs": torch.logsumexp(2 * log_probs, -1).detach(),
    }
    return {
        name: values[name].new_zeros(targets.shape).masked_scatter(scored, values[name])
        for name in ("logps", *stats)
    }


def sequence_logps(
    hidden: Tensor,  # (S, T, H), or (total, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    targets: Tensor,  # hidden's leading shape
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    token_weights: Tensor | None = None,  # hidden's leading shape
    **head: Any,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of token log-probabilities `(S,)` and scored lengths `(S,)`."""
    logps = linear_logps(hidden.flatten(0, -2), weight, targets.flatten(), **head)
    scored = (targets.flatten() != IGNORED).to(logps.device)
    weighted = logps if token_weights is None else logps * token_weights.flatten().to(logps)
    return sums(weighted, targets, cu_seqlens), sums(scored, targets, cu_seqlens)


def sums(values: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each sequence `(S,)`."""
    ends = offsets(targets, cu_seqlens)
    return torch.stack([values[a:b].sum() for a, b in zip(ends[:-1], ends[1:], strict=True)])


def offsets(targets: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is not None:
        return cu_seqlens.tolist()
    sequences, length = targets.shape
    return [i * length for i in range(sequences + 1)]
