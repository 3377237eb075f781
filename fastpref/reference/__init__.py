"""The definition of everything this package computes, naive and readable.

Logits are materialised, autograd does the gradients, formulas stand as in the papers and share no
code with `fastpref.objectives`. Works in float64 and float32 on any device; half-precision inputs
are computed in float32. The tests take these functions, in float64, as the truth.
"""

from fastpref.reference.formulas import balance_coefficients, pair_losses
from fastpref.reference.head import linear_logps, logits, sequence_logps, token_statistics
from fastpref.reference.loss import preference_loss

__all__ = [
    "balance_coefficients",
    "linear_logps",
    "logits",
    "pair_losses",
    "preference_loss",
    "sequence_logps",
    "token_statistics",
]
