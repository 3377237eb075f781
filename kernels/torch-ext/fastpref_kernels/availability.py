"""Whether the kernels can run on a device, and if not, why."""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def unavailable_reason(device_type: str) -> str | None:
    """Why the kernels cannot run on devices of this type ("cuda", "cpu", …); None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type not in ("cuda", "xpu"):
        return (
            f"Triton has no code for {device_type!r} devices; use backend='torch' or 'auto', or "
            "set TRITON_INTERPRET=1 before the import to have the kernels interpreted"
        )
    module = getattr(torch, device_type)
    if not module.is_available():
        return f"there is no {device_type!r} device"
    if device_type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"compute capability {major}.{minor} is below 8.0"
    return None
