"""Triton kernels of fastpref: projection, softmax statistics, gradient and pair weighting.

This release carries none yet; `unavailable_reason` says so to whoever asks for them.
"""

__all__ = ["unavailable_reason"]


def unavailable_reason(device_type: str) -> str:
    """Why the Triton kernels cannot run on a device of this type ("cuda", "cpu", …)."""
    return (
        f"this release of fastpref_kernels has no Triton kernels (asked for on {device_type!r}); "
        "use backend='torch' or 'auto'"
    )
