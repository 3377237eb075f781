"""How much of a device's memory logits may take where nobody says.

A share of what is free, looked at once: a plan that followed the memory from step to step would
round differently from run to run, and from rank to rank.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

GIB = 2**30
# The rest is for what a step still allocates: activations, gradients, the optimiser's state.
SHARE = 8
LEAST = GIB // 4
_ASSUMED_GIB = 8  # free on a device that does not say
_spare: dict[torch.device, int] = {}


def spare_bytes(device: torch.device) -> int | None:
    """What logits may take of an accelerator's memory; None of a CPU's, and of "meta".

    Decided at the first call in a process and for a device, from what is free then, and logged.
    Of several ranks in `torch.distributed` the smallest share holds, by one all-reduce of the
    default group: a rank that is alone in asking waits for the others. The host's view of the
    memory is read, and nothing waits for the device but that all-reduce.

    Raises:
        RuntimeError: it is not decided yet, and a CUDA graph is being captured.
    """
    if device.type in ("cpu", "meta"):  # one has a default of its own, the other no memory
        return None
    if device not in _spare:
        module = torch.get_device_module(device)
        if _is_capturing(module):
            raise RuntimeError(
                "the default logits_budget is not known yet, and memory cannot be looked at while "
                "a CUDA graph is captured; run one step before, or pass logits_budget"
            )
        free, processes = _free_bytes(module, device), ranks()
        if processes > 1:
            free = _least_of_ranks(free, device)
        _spare[device] = share_of(free)
        logger.info(
            "%s: %.2f GiB are free%s; logits may take %.2f GiB of them (1/%d, at least %.2f GiB)",
            device,
            free / GIB,
            f" on the fullest of {processes} ranks" if processes > 1 else "",
            _spare[device] / GIB,
            SHARE,
            LEAST / GIB,
        )
    return _spare[device]


def share_of(free: int) -> int:
    """What logits may take of `free` bytes."""
    return max(LEAST, free // SHARE)


def _is_capturing(module: Any) -> bool:
    capturing = getattr(module, "is_current_stream_capturing", None)
    return capturing is not None and capturing()


def _free_bytes(module: Any, device: torch.device) -> int:
    """Of the device, and what torch's allocator holds and does not use."""
    try:
        free = module.mem_get_info(device)[0]
    except (AttributeError, RuntimeError):  # of some the driver cannot be asked
        logger.info("%s does not say what is free: %d GiB, for want of it", device, _ASSUMED_GIB)
        return _ASSUMED_GIB * GIB
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def ranks() -> int:
    """How many processes there are, of which this is one."""
    distributed = torch.distributed
    initialised = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if initialised else 1


def _least_of_ranks(free: int, device: torch.device) -> int:
    """The smallest of all ranks."""
    on_host = torch.distributed.get_backend() == "gloo"
    least = torch.tensor(free, device="cpu" if on_host else device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)
