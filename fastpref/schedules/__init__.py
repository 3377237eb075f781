"""The schedules, as autograd functions over a backend's primitives.

token_logps   log-probabilities of rows; its backward is one of
  frozen_head   rows of gradient kept from the forward
  recompute     the logits once more
pair_groups   loss and gradients in the forward, group after group of whole prompts
prompts       from token log-probabilities to losses
autograd      what all of them share
"""

from fastpref.schedules.pair_groups import PairGroups
from fastpref.schedules.prompts import PairLosses, Prompts, total_of
from fastpref.schedules.token_logps import TokenLogps

__all__ = ["PairGroups", "PairLosses", "Prompts", "TokenLogps", "total_of"]
