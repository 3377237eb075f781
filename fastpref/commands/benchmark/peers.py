"""Every way to compute the same DPO loss, each through its own public code.

A peer gets `Inputs` and returns a function `() -> loss`. The reference log-probabilities are 0 for
all, because Liger's loss takes none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref import DPO, preference_loss
from fastpref.commands.benchmark.workloads import BETA, Inputs

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """Args: `prepare(inputs)` makes the loss; `obstacle(inputs)` says why it cannot run here."""

    prepare: Callable[[Inputs], Loss]
    obstacle: Callable[[Inputs], str | None] = lambda inputs: None
    logps: Callable[[Inputs], Tensor] | None = None  # of each row, for accuracy
    compiles: bool = False


def dpo_loss(per_token: Tensor, inputs: Inputs) -> Tensor:
    """From log-probabilities in the targets' layout, 0 where ignored."""
    if inputs.cu_seqlens is None:
        sums = per_token.sum(-1)
    else:
        sums = torch.stack([x.sum() for x in per_token.split(inputs.cu_seqlens.diff().tolist())])
    chosen, rejected = sums.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _flat(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.hidden.flatten(0, -2), inputs.targets.flatten()


def _naive_logps(inputs: Inputs) -> Tensor:
    z = inputs.hidden @ inputs.weight.T
    if inputs.softcap is not None:
        z = inputs.softcap * torch.tanh(z / inputs.softcap)
    targets = inputs.targets.clamp(min=0)
    logps = z.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return logps.masked_fill(inputs.targets == -100, 0)


def _naive(inputs: Inputs) -> Loss:
    return lambda: dpo_loss(_naive_logps(inputs), inputs)


def _compiled_naive(inputs: Inputs) -> Loss:
    logps = torch.compile(_naive_logps)
    return lambda: dpo_loss(logps(inputs), inputs)


def _trl_logps(inputs: Inputs) -> Tensor:
    """As TRL's patched forward calls it: compacted where Triton runs, every position elsewhere."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, targets = _flat(inputs)
    scored = targets != -100
    compact = hidden.device.type in ("cuda", "xpu")
    logps, *_ = ChunkedLogProbFunction.apply(
        hidden[scored] if compact else hidden,
        inputs.weight,
        None,
        targets[scored] if compact else targets.clamp(min=0),
        1.0,
        32768,
        inputs.softcap,
        1.0,
        ("log_probs",),
    )
    if compact:
        logps = logps.new_zeros(targets.shape).masked_scatter(scored, logps)
    return logps.masked_fill(~scored, 0).view(inputs.targets.shape)


def _trl(inputs: Inputs) -> Loss:
    import trl.trainer.utils  # noqa: F401  (its backward would; modules are no peak memory)

    return lambda: dpo_loss(_trl_logps(inputs), inputs)


def _torch_lce_logps(inputs: Inputs) -> Tensor:
    hidden, targets = _flat(inputs)
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(
        hidden, inputs.weight, targets, reduction="none", ignore_index=-100, options=options
    )
    return -nll.view(inputs.targets.shape)


def _torch_lce(inputs: Inputs) -> Loss:
    return lambda: dpo_loss(_torch_lce_logps(inputs), inputs)


def _liger(compiled: bool) -> Callable[[Inputs], Loss]:
    def prepare(inputs: Inputs) -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss = LigerFusedLinearDPOLoss(
            beta=BETA, compute_nll_loss=False, use_ref_model=False, compiled=compiled
        )
        return lambda: loss(inputs.weight, inputs.hidden, inputs.targets)[0]

    return prepare


def _liger_scaled_logps(inputs: Inputs) -> Tensor:
    """Per-token scaled cross-entropy: a kernel of its own on SM90, chunks of tokens elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    hidden, targets = _flat(inputs)
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, inputs.weight, targets)
    return -nll.view(inputs.targets.shape)


def _cce(implementation: str) -> Callable[[Inputs], Loss]:
    return lambda inputs: lambda: dpo_loss(_cce_logps(inputs, implementation), inputs)


def _cce_logps(inputs: Inputs, implementation: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        softcap=inputs.softcap,
        reduction="none",
        impl=implementation,
    )
    return -nll


def _ours(schedule: str) -> Callable[[Inputs], Loss]:
    def prepare(inputs: Inputs) -> Loss:
        sequences = len(inputs.hidden) if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
        ref_logps = torch.zeros(sequences, device=inputs.hidden.device)

        def loss() -> Tensor:
            return preference_loss(
                inputs.hidden,
                inputs.weight,
                inputs.targets,
                DPO(beta=BETA),
                ref_logps=ref_logps,
                cu_seqlens=inputs.cu_seqlens,
                softcap=inputs.softcap,
                schedule=schedule,
                backend=inputs.backend,
            ).loss

        return loss

    return prepare


def _our_logps(inputs: Inputs) -> Tensor:
    from fastpref import linear_logps

    return linear_logps(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        softcap=inputs.softcap,
        backend=inputs.backend,
    )


# --- what cannot run ----------------------------------------------------------------------------


def _needs(package: str) -> Callable[[Inputs], str | None]:
    def obstacle(inputs: Inputs) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return obstacle


def _first(*obstacles: Callable[[Inputs], str | None]) -> Callable[[Inputs], str | None]:
    return lambda inputs: next((why for each in obstacles if (why := each(inputs))), None)


def _no_packing(inputs: Inputs) -> str | None:
    return "takes padded batches only" if inputs.cu_seqlens is not None else None


def _no_softcap(inputs: Inputs) -> str | None:
    return "has no softcap" if inputs.softcap is not None else None


def _gpu_only(inputs: Inputs) -> str | None:
    return "needs a CUDA GPU" if inputs.hidden.device.type != "cuda" else None


def _head_trains(inputs: Inputs) -> str | None:
    return None if inputs.weight.requires_grad else "the head is frozen"


def _head_frozen(inputs: Inputs) -> str | None:
    return "the head trains" if inputs.weight.requires_grad else None


def _needs_cutlass_on_hopper(inputs: Inputs) -> str | None:
    if inputs.hidden.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return None
    return _needs("cutlass")(inputs)


_NEEDS_LIGER = _first(_needs("liger_kernel"), _no_packing, _no_softcap)
_NEEDS_CCE = _first(_gpu_only, _needs("cut_cross_entropy"))

OURS = {
    "fastpref pair groups": Peer(_ours("pair_groups"), _head_trains, _our_logps),
    "fastpref frozen head": Peer(_ours("frozen_head"), _head_frozen, _our_logps),
    "fastpref recompute": Peer(_ours("recompute"), logps=_our_logps),
}
PEERS = {
    "naive": Peer(_naive, logps=_naive_logps),
    "naive compiled": Peer(_compiled_naive, compiles=True),
    "TRL 1.16 chunked": Peer(_trl, _needs("trl"), _trl_logps),
    "torch linear_cross_entropy": Peer(_torch_lce, _no_softcap, _torch_lce_logps),
    "Liger DPO": Peer(_liger(compiled=False), _NEEDS_LIGER),
    "Liger DPO compiled": Peer(_liger(compiled=True), _NEEDS_LIGER, compiles=True),
    "Liger scaled cross-entropy": Peer(
        lambda inputs: lambda: dpo_loss(_liger_scaled_logps(inputs), inputs),
        _first(_needs("liger_kernel"), _no_softcap, _needs_cutlass_on_hopper),
        _liger_scaled_logps,
    ),
    "CCE": Peer(_cce("cce"), _NEEDS_CCE, lambda x: _cce_logps(x, "cce")),
    "CCE exact": Peer(
        _cce("cce_exact"), _NEEDS_CCE, lambda inputs: _cce_logps(inputs, "cce_exact")
    ),
} | OURS
