"""What fastpref takes of TRL, looked up by name and signature when it is first used.

There is no upper bound on TRL's version: a release that still has these works, and one that does
not ends in one sentence before anything trains.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

_OLDEST = "1.16"  # whose losses, metrics and defaults ours are
_TRAINER = "trl.trainer.dpo_trainer:DPOTrainer"
# Of `PreferenceTrainer`: what it calls or replaces, and the methods in whose place its own stand.
_CALLED = (
    ("trl:DPOConfig", "beta loss_type loss_weights ld_alpha label_smoothing use_weighting"),
    ("trl.trainer.dpo_trainer:add_fused_lm_head", "model"),
    ("trl.trainer.dpo_trainer:BaseTunerLayer", ""),
    ("trl.trainer.dpo_trainer:create_model_from_path", ""),
    ("trl.trainer.utils:create_model_from_path", "model_id"),
)
_OVERRIDDEN = (
    (f"{_TRAINER}._compute_loss", "self model inputs return_outputs"),
    (f"{_TRAINER}._precompute_ref_logps", "self dataset name batch_size"),
    (f"{_TRAINER}._prepare_dataset", "self dataset processing_class args dataset_name"),
    (f"{_TRAINER}._save_checkpoint", "self model trial"),
    (f"{_TRAINER}._set_signature_columns_if_needed", "self"),
    (f"{_TRAINER}.compute_loss", "self model inputs return_outputs num_items_in_batch"),
    (f"{_TRAINER}.compute_ref_log_probs", "self model inputs"),
    (f"{_TRAINER}.log", "self logs start_time"),
)


def stock(path: str, parameters: str = "", *, exactly: bool = False) -> Any:
    """An object of TRL's.

    Args:
        path: "package.module:name".
        parameters: names that it must take, separated by blanks.
        exactly: it must take no others: ours stands in its place, and TRL's own calls reach it.

    Raises:
        RuntimeError: TRL is not there, has no such name, or it takes other parameters.
    """
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as reason:
        raise RuntimeError(_mismatch(path, parameters, f"has it not: {reason}")) from reason
    wanted = parameters.split()
    has = [*inspect.signature(found).parameters] if wanted else []
    if has != wanted if exactly else not set(wanted) <= set(has):
        raise RuntimeError(_mismatch(path, parameters, f"has it with ({', '.join(has)})"))
    return found


def _mismatch(path: str, parameters: str, difference: str) -> str:
    try:
        installed = version("trl")
    except PackageNotFoundError:
        return f"fastpref uses {path}, and TRL is not installed: install trl>={_OLDEST}"
    return (
        f"fastpref uses {path}({', '.join(parameters.split())}), and TRL {installed} {difference}; "
        "install trl==1.16.*, or a fastpref that knows this TRL"
    )


def check_trainer() -> None:
    """Raises RuntimeError where `PreferenceTrainer` cannot extend TRL's `DPOTrainer`."""
    stock(_TRAINER)
    if Version(version("trl")) < Version(_OLDEST):
        raise RuntimeError(
            f"fastpref extends TRL {_OLDEST} and newer, and TRL {version('trl')} is "
            f"installed: install trl>={_OLDEST}"
        )
    for path, parameters in _CALLED:
        stock(path, parameters)
    for path, parameters in _OVERRIDDEN:
        stock(path, parameters, exactly=True)
