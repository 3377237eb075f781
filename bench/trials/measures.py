"""What is looked at: pairs by what an objective makes of them, responses, distance to reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trials.pairs import Batch, TokenPair, batches

import fastpref
from fastpref.objectives import MarginObjective, PairLogps
from fastpref.trl.packing import Packing, scored_places

Table = dict[str, list[float]]


def pair_logps(logps: Tensor, lengths: Tensor, ref_logps: Tensor, scores: Tensor) -> PairLogps:
    """Of `(2B,)` each, chosen first, in float64."""
    (chosen, rejected), (n_chosen, n_rejected) = logps.double().chunk(2), lengths.double().chunk(2)
    references, scored = ref_logps.double().chunk(2), scores.double().chunk(2)
    return PairLogps(chosen, rejected, n_chosen, n_rejected, *references, *scored)


def slopes(objective: MarginObjective, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """∂L/∂ρ `(B,)` of each pair's own loss, ρ the log-probability of chosen and of rejected.

    As the objective takes it, a sum or an average per token.
    """
    of_means = objective.length_normalized
    rho = [x.detach().requires_grad_() for x in pairs.logps(of_means)]
    lengths = (pairs.chosen_lengths, pairs.rejected_lengths) if of_means else (1, 1)
    moved = dataclasses.replace(
        pairs, chosen_logps=rho[0] * lengths[0], rejected_logps=rho[1] * lengths[1]
    )
    chosen, rejected = torch.autograd.grad(objective(moved).sum(), rho)
    return chosen, rejected


def look(objective: MarginObjective, pairs: PairLogps) -> Table:
    """Of each pair: rewards against the reference, gradients, and what weighs or balances them.

    `gradient/*` is |∂L/∂ρ| / p̄, where p̄ = exp ℓ̄ is a response's mean token probability: what
    AdaDPO makes equal.
    """
    chosen, rejected = pairs.log_ratios(normalized=False)
    means = pairs.logps(normalized=True)
    magnitudes = [
        slope.abs() / mean.exp()
        for slope, mean in zip(slopes(objective, pairs), means, strict=True)
    ]
    table = {
        "log_ratio/chosen": chosen,
        "log_ratio/rejected": rejected,
        "length/chosen": pairs.chosen_lengths,
        "length/rejected": pairs.rejected_lengths,
        "gap": pairs.score_gap(),
        "margin": torch.sub(*objective.rewards(pairs)),
        "gradient/chosen": magnitudes[0],
        "gradient/rejected": magnitudes[1],
        **objective.diagnostics(pairs),
    }
    return {name: values.tolist() for name, values in table.items()}


@torch.no_grad()
def logps_of(model: Any, pairs: Sequence[TokenPair], size: int) -> list[tuple[float, float]]:
    """Log-probability of each pair's chosen and rejected response, nats."""
    found = []
    for _, batch in batches(pairs, size):
        rows, weight, targets, cu_seqlens = scored_rows(model, batch)
        logps, _ = fastpref.sequence_logps(rows, weight, targets, cu_seqlens=cu_seqlens)
        found += list(zip(*(side.tolist() for side in logps.chunk(2)), strict=True))
    return found


def scored_rows(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states `(n, H)` of the responses, the head `(V, H)`, targets `(n,)`, `cu_seqlens`.

    Both responses of a pair go through the trunk with one copy of their prompt, in bfloat16's
    products; head and loss are float32.
    """
    causal = model.get_base_model()
    packing = Packing.of(batch.input_ids, batch.attention_mask, batch.completion_mask, share=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = causal.model(**packing.model_inputs(batch.input_ids, causal)).last_hidden_state
    places, cu_seqlens = scored_places(batch.targets)
    rows = packing.hidden_of(hidden, packing.row_of.flatten()[places]).float()
    return rows, causal.lm_head.weight, batch.targets.flatten()[places], cu_seqlens


@torch.no_grad()
def evaluate(
    model: Any,
    objective: MarginObjective,
    pairs: Sequence[TokenPair],
    references: Sequence[tuple[float, float]],
    size: int,
) -> Table:
    """`look` at pairs under the model as it is."""
    logps = torch.tensor(logps_of(model, pairs, size)).T.flatten()
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs]).T.flatten()
    scores = torch.tensor([p.scores for p in pairs]).T.flatten()
    ref_logps = torch.tensor(references).T.flatten()
    with torch.enable_grad():
        return look(objective, pair_logps(logps, lengths, ref_logps, scores))


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, pairs: Sequence[TokenPair], *, tokens: int, seed: int
) -> dict[str, float]:
    """Responses drawn at temperature 1: tokens, and KL(policy ‖ reference) in nats a token.

    The divergence of each step is exact, a sum over the vocabulary; its mean over the steps of
    drawn responses is an estimate of the policy's own.
    """
    prompts = [pair.prompt for pair in pairs]
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(seed)
        drawn = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=True,
            use_cache=True,
            top_k=0,
            pad_token_id=tokenizer.eos_token_id,
        )[:, longest:]
    ended = (drawn == tokenizer.eos_token_id).cumsum(1)
    drawn_mask = (ended - (drawn == tokenizer.eos_token_id).long()) == 0  # with the first end
    lengths = drawn_mask.sum(1)
    divergence = 0.0
    for row, prompt in enumerate(prompts):
        response = drawn[row, : lengths[row]].tolist()
        ids = torch.tensor([prompt + response])
        policy = _log_probs(model, ids, len(response))
        with model.disable_adapter():
            reference = _log_probs(model, ids, len(response))
        divergence += (policy.exp() * (policy - reference)).sum().item()
    count = int(lengths.sum())
    return {"length": count / len(prompts), "divergence": divergence / count}


def _log_probs(model: Any, ids: Tensor, last: int) -> Tensor:
    """`(last, V)` of what the last tokens were drawn from."""
    causal = model.get_base_model()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = causal.model(ids).last_hidden_state[0, -last - 1 : -1]
    return (hidden.float() @ causal.lm_head.weight.T).log_softmax(-1)
