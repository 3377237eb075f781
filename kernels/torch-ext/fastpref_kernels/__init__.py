"""Triton kernels of fastpref: projection, softmax statistics, gradient and pair weighting.

They know rows, vocabulary, coefficients and offsets; nothing of modules or losses by name. Where
Triton is missing only `unavailable_reason` is here, and says so.
"""

from .availability import HAS_TRITON, unavailable_reason

__all__ = ["HAS_TRITON", "unavailable_reason"]

if HAS_TRITON:
    from .cases import CompileCase, compile_cases
    from .configs import Epilogue, choice
    from .ops import (
        OPERATORS,
        accumulate_,
        add_weight_gradient_,
        fitted,
        gradients_,
        hidden_gradient_,
        keep_,
        merge_statistics,
        new_partials,
        projection_anchored,
        projection_exponentials,
        projection_statistics,
        row_gradients_,
        row_statistics,
        scaled,
        slice_statistics,
        take_,
        weigh_pairs,
    )
    from .pairs import METRICS
    from .partials import Partials
    from .primitives import ANCHORED_SCALE, SCALE

    __all__ += [
        "ANCHORED_SCALE",
        "METRICS",
        "OPERATORS",
        "SCALE",
        "CompileCase",
        "Epilogue",
        "accumulate_",
        "add_weight_gradient_",
        "choice",
        "compile_cases",
        "fitted",
        "gradients_",
        "hidden_gradient_",
        "keep_",
        "merge_statistics",
        "new_partials",
        "Partials",
        "projection_anchored",
        "projection_exponentials",
        "projection_statistics",
        "row_gradients_",
        "row_statistics",
        "scaled",
        "slice_statistics",
        "take_",
        "weigh_pairs",
    ]
