"""Triton kernels of fastpref: projection, softmax statistics, gradient and pair weighting.

They know rows, vocabulary, coefficients and offsets; nothing of modules or losses by name. Where
Triton is missing only `unavailable_reason` is here, and says so.
"""

from .availability import HAS_TRITON, unavailable_reason

__all__ = ["HAS_TRITON", "unavailable_reason"]

if HAS_TRITON:
    from .cases import CompileCase, compile_cases
    from .configs import Epilogue
    from .ops import (
        OPERATORS,
        projection_statistics,
        row_gradients_,
        row_statistics,
        scaled,
        slice_statistics,
        weigh_pairs,
    )
    from .pairs import METRICS
    from .rows import new_state

    __all__ += [
        "METRICS",
        "OPERATORS",
        "CompileCase",
        "Epilogue",
        "compile_cases",
        "new_state",
        "projection_statistics",
        "row_gradients_",
        "row_statistics",
        "scaled",
        "slice_statistics",
        "weigh_pairs",
    ]
