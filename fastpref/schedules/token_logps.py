"""Log-probabilities of rows, under the schedules that take any upstream gradient.

What follows them, sums and objective, is ordinary autograd, whose gradient per row comes back as
one coefficient. The backward either multiplies rows of gradient kept from the forward
(`frozen_head`) or computes the logits once more (`recompute`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.backends import Backend, Head
from fastpref.planner import Plan
from fastpref.schedules.autograd import first_order, keeps_graph, no_autocast
from fastpref.schedules.frozen_head import rows_of_gradient
from fastpref.schedules.recompute import recomputed_gradients


class TokenLogps(torch.autograd.Function):
    """`(logps, *stats)`, each `(n,)`, of the rows `index` of hidden; entropy is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        frozen_scale: Tensor | None,  # (V,)
        targets: Tensor,  # (n,)
        index: Tensor | None,  # (n,) rows of hidden, None for all
        places: Tensor | None,  # (n,) where their gradients go, None for `index`
        head: Head,  # scalars; its tensors are replaced by the arguments
        plan: Plan,
        backend: Backend,
        stats: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        places = index if places is None else places
        with no_autocast(hidden):
            kept = None
            if plan.schedule == "frozen_head":
                found, kept = rows_of_gradient(
                    hidden, index, places, targets, head, plan, backend, stats
                )
            else:
                found = backend.forward(hidden, index, targets, head, plan.tile, stats)
        entropy = found.extra.get("entropy")
        of_head = weight, bias, head.frozen_weight, frozen_scale
        ctx.save_for_backward(hidden, *of_head, targets, index, places, found.lse, entropy)
        ctx.kept = kept
        ctx.settings = {
            "logit_scale": head.logit_scale,
            "softcap": head.softcap,
            "temperature": head.temperature,
            "compute_dtype": head.compute_dtype,
            "weight_grad": head.weight_grad,
            "shards": head.shards,
        }
        ctx.plan, ctx.backend, ctx.stats = plan, backend, stats
        ctx.mark_non_differentiable(*(found.extra[name] for name in stats if name != "entropy"))
        return found.logps, *(found.extra[name] for name in stats)

    @staticmethod
    @first_order
    def backward(ctx: Any, coef: Tensor | None, *of_stats: Tensor | None) -> tuple:
        hidden, weight, bias, frozen_weight, frozen_scale, *of_rows = ctx.saved_tensors
        targets, index, places, lse, entropy = of_rows
        of_entropy = dict(zip(ctx.stats, of_stats, strict=True)).get("entropy")
        wants = tuple(ctx.needs_input_grad[:4])
        if coef is None:
            coef = torch.zeros_like(lse)
        keeps = keeps_graph()
        kept = ctx.kept
        if not keeps:  # autograd lets go of saved tensors only
            ctx.kept = None
        if kept is not None and of_entropy is None:
            return kept.times(coef, coef.new_ones(()), keeps=keeps), *[None] * 10
        with no_autocast(hidden):
            found = recomputed_gradients(
                hidden,
                index,
                places,
                targets,
                Head(
                    weight,
                    bias,
                    frozen_weight=frozen_weight,
                    frozen_scale=frozen_scale,
                    **ctx.settings,
                ),
                lse,
                coef,
                None if of_entropy is None else (entropy, of_entropy),
                ctx.plan.tile,
                wants,
                ctx.backend,
            )
        return found.hidden, found.weight, found.bias, found.frozen_scale, *[None] * 7
