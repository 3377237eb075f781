"""fastpref inside TRL 1.16.

`PreferenceTrainer` is TRL's `DPOTrainer` with the loss replaced: data, references, adapters,
checkpoints and evaluation stay TRL's. `use_fastpref_logps` changes nothing but the function by
which stock TRL trainers with a fused head compute log-probabilities.
"""

from fastpref.trl.config import PreferenceConfig, trl_objective
from fastpref.trl.head import LossHeadOutput, add_loss_head, head_scalars
from fastpref.trl.logps import LogpsHandle, use_fastpref_logps
from fastpref.trl.trainer import PreferenceTrainer

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
