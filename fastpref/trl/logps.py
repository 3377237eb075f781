"""`use_fastpref_logps`: exact log-probabilities for stock TRL trainers."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from fastpref.loss import linear_logps
from fastpref.trl.stock import stock

_REPLACED = "_ChunkedLogProbFunction"
_FORWARD = (
    "ctx hidden weight bias targets temperature chunk_size "
    "final_logit_softcapping logit_scale outputs"
)


class LogpsHandle(contextlib.AbstractContextManager):
    """Undoes `use_fastpref_logps`: by `.undo()`, or at the end of a `with` block."""

    def __init__(self, replaced: Any) -> None:
        self._replaced = replaced

    def undo(self) -> None:
        """Gives TRL its own function back; calling it again does nothing."""
        if self._replaced is not None:
            setattr(stock("trl.trainer.utils"), _REPLACED, self._replaced)
            self._replaced = None

    def __exit__(self, *_: object) -> None:
        self.undo()


def use_fastpref_logps() -> LogpsHandle:
    """Makes the stock TRL trainers with a fused head take log-probabilities from `linear_logps`.

    These are DPO, KTO, SFT, GRPO and RLOO, and of the experimental ones async GRPO, GMPO and BEMA's
    DPO. Loss types, metrics and data stay TRL's; log-probabilities become exact to fp32, with the
    softcap and scale that TRL reads from the config. The others (CPO, ORPO, online DPO,
    distillation, …) never call the replaced function and stay as they are.

    Returns:
        A handle whose `undo()` restores TRL's function; also a context manager.

    Raises:
        RuntimeError: TRL has no such function, or it takes other parameters.
    """
    replaced = stock(f"trl.trainer.utils:{_REPLACED}")
    if replaced is not _FastprefLogps:
        stock(f"trl.trainer.utils:{_REPLACED}.forward", _FORWARD, exactly=True)
    setattr(stock("trl.trainer.utils"), _REPLACED, _FastprefLogps)
    return LogpsHandle(replaced)


class _FastprefLogps:
    """Stands where TRL's autograd function stood; called as `_ChunkedLogProbFunction.apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        wanted = tuple(name for name in names if name in outputs)
        result = linear_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            stats=wanted,
        )
        logps, found = result if isinstance(result, tuple) else (result, {})
        return logps, *(found.get(name) for name in names)
