"""fastpref inside TRL, 1.16 and newer.

`PreferenceTrainer` is TRL's `DPOTrainer` with the loss replaced: data, references, adapters,
checkpoints and evaluation stay TRL's. `use_fastpref_logps` changes nothing but the function by
which stock TRL trainers with a fused head compute log-probabilities.

Names are imported when they are asked for: `fastpref.adapters` takes the loss head alone, in
frameworks that bring an older TRL or none.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastpref.trl.stock import check_trainer

if TYPE_CHECKING:
    from fastpref.trl.config import PreferenceConfig, trl_objective
    from fastpref.trl.head import LossHeadOutput, add_loss_head, head_scalars
    from fastpref.trl.logps import LogpsHandle, use_fastpref_logps
    from fastpref.trl.trainer import PreferenceTrainer

_MODULES = {
    "LogpsHandle": "logps",
    "LossHeadOutput": "head",
    "PreferenceConfig": "config",
    "PreferenceTrainer": "trainer",
    "add_loss_head": "head",
    "head_scalars": "head",
    "trl_objective": "config",
    "use_fastpref_logps": "logps",
}

__all__ = [
    "LogpsHandle",
    "LossHeadOutput",
    "PreferenceConfig",
    "PreferenceTrainer",
    "add_loss_head",
    "head_scalars",
    "trl_objective",
    "use_fastpref_logps",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name] in ("config", "trainer"):
        check_trainer()
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
