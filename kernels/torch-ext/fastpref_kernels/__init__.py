"""Triton kernels of fastpref: projection, softmax statistics, gradient and pair weighting.

They know rows, vocabulary, coefficients and offsets; nothing of modules or losses by name. Where
Triton is missing only `unavailable_reason` is here, and says so.
"""

from .availability import HAS_TRITON, unavailable_reason

__all__ = ["HAS_TRITON", "unavailable_reason"]

if HAS_TRITON:
    from .cases import CompileCase, compile_cases
    from .configs import Epilogue
    from .forward import projection_statistics
    from .pairs import METRICS, weigh_pairs
    from .rows import row_gradients_, row_statistics

    __all__ += [
        "METRICS",
        "CompileCase",
        "Epilogue",
        "compile_cases",
        "projection_statistics",
        "row_gradients_",
        "row_statistics",
        "weigh_pairs",
    ]
