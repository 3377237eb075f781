"""Adapters of PEFT on the LM head, as what the projection takes: W + s·B A is not formed.

LoRA's logits W h + s·B A h are those of the head `[W | B]` from the hidden states `[h | s·A h]`: W
is frozen columns, B trains as the others, A through the hidden states; no gradient V × H is ever
formed. `[W | B]` is put together slice by slice, or once a pass by Triton's kernels in half
precision. DoRA multiplies the rows of both by magnitude over norm; the norm is a constant, as in
its paper and in PEFT. Trained tokens are LoRA with B the rows they stand in and A what they add.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

# Of the head, whose norms are taken together.
_ROWS_AT_ONCE = 4096
# Trained tokens, a column of the head each; of more a head is made that has their rows.
_MOST_TOKENS = 256


class HeadTensors(TypedDict):
    """Of the head beside its weight, as `preference_loss` takes it."""

    bias: Tensor | None
    frozen_weight: NotRequired[Tensor]
    frozen_scale: NotRequired[Tensor]


def run_in_head(head: Any, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`function(hidden)` as the forward of the head and of every part of it that is in use.

    So what DDP, FSDP, ZeRO-3 and tensor parallelism do around a module's forward and backward is
    done for the head as for any other: weights are gathered, cast and freed, gradients reduced.
    What `function` returns is a head's output to them: tensors, in containers that they look into.
    """
    for module in reversed(_parts_in_use(head)):
        function = functools.partial(_call_with_forward, module, function)
    return function(hidden)


def _parts_in_use(head: Any) -> list[Any]:
    """Modules whose parameters `projection` reads, outermost first."""
    parts = [head]
    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        saved = [head.modules_to_save[name] for name in active if name in head.modules_to_save]
        parts.append(saved[0] if saved else head.original_module)
    layer = _layer_of(head)
    if isinstance(layer, BaseTunerLayer):
        parts.append(layer.get_base_layer())
    if isinstance(layer, LoraLinear):
        of_kinds = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        for name in _names_in_use(layer):
            parts += [modules[name] for modules in of_kinds if name in modules]
    return parts


def _call_with_forward(module: Any, forward: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    with _forward_of(_unwrapped(module), forward):
        return module(hidden)


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def _unwrapped(module: Any) -> Any:
    """FSDP1's forward is the wrapper's own: what it runs is the module in it."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module


def projection(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, HeadTensors]:
    """Hidden states `(…, H)`, widened by its adapters, weight and the rest of an LM head.

    Adapters count as they do in the head's own forward: the active ones in their order, none of
    them where they are disabled, and those that are merged as part of its weight.

    Raises:
        ValueError: an adapter that is more than such a projection; see `check_head`.
    """
    check_head(head)
    layer = _layer_of(head)
    tokens = layer if isinstance(layer, TrainableTokensLayer) else None
    if not isinstance(layer, BaseTunerLayer):
        # A DTensor here is a tensor-parallel shard: each rank projects its part of the vocabulary.
        weight = head.weight
        return hidden.to(weight.device), weight, {"bias": getattr(head, "bias", None)}
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    base: Any = layer.get_base_layer()
    weight, bias = whole(base.weight), whole(getattr(base, "bias", None))
    adapted = _Adapted(hidden.to(weight.device), weight)
    names = _names_in_use(layer)
    if not names:
        return adapted.hidden, weight, {"bias": bias}
    if tokens is not None:
        bias = None  # which PEFT's own forward leaves out
        count = sum(len(tokens.token_indices[name]) for name in names)
        if count > _MOST_TOKENS:
            return adapted.hidden, whole(tokens.get_merged_weights(names)), {"bias": bias}
    for name in names:
        if tokens is None:
            adapted.add_lora(layer, name)
        else:
            adapted.add_tokens(tokens, name)
    if adapted.bias is not None:
        bias = adapted.bias if bias is None else bias + adapted.bias
    tensors: HeadTensors = {"bias": bias, "frozen_weight": weight.detach()}
    if adapted.scale is not None:
        tensors["frozen_scale"] = adapted.scale
    hidden = torch.cat([adapted.hidden, *adapted.rows], -1)
    return hidden, torch.cat(adapted.columns, 1), tensors


def check_head(head: Any) -> None:
    """Raises ValueError where the head, or an adapter on it, is more than a projection."""
    layer = _layer_of(head)
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight: Any = getattr(base, "weight", None)
    if weight is not None and not weight.is_floating_point():
        raise ValueError(
            f"the LM head is quantised ({type(base).__name__}, {weight.dtype}), and its loss needs "
            "numbers: leave it out of the quantisation (transformers does unless "
            "llm_int8_skip_modules names other modules; name 'lm_head' too)"
        )
    if not isinstance(layer, BaseTunerLayer):
        return
    kind = next(each for each in type(layer).__mro__ if each.__module__.startswith("peft."))
    if kind not in (LoraLinear, TrainableTokensLayer):  # of which FSDP2 makes subclasses
        raise ValueError(
            "an adapter on the LM head is LoRA, rsLoRA, DoRA or trainable_token_indices; "
            f"{kind.__module__.split('.')[2]} {kind.__name__} is none of them: take the head out "
            "of its target_modules"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "the LM head has an adapter and its own weight trains too, which would get no "
            "gradient: freeze it, or take the head out of target_modules"
        )
    if kind is LoraLinear:
        _check_lora(layer)


def _check_lora(layer: Any) -> None:
    for name in layer.active_adapters:
        if name in layer.lora_A:
            _check_variant(layer, name)


def _check_variant(layer: Any, name: str) -> None:
    variant = layer.lora_variant.get(name)
    if variant is None:
        return
    what = type(variant).__name__.removesuffix("LinearVariant")
    if name not in layer.lora_magnitude_vector:
        raise ValueError(
            f"the adapter {name!r} on the LM head is LoRA's variant {what}, which has no form "
            "without logits: take the head out of its target_modules"
        )
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        raise ValueError(
            f"the adapter {name!r} on the LM head is DoRA with lora_dropout, where the head's own "
            "weight takes other hidden states than its scale: use lora_dropout=0, or take the head "
            "out of its target_modules"
        )


def whole(parameter: Any) -> Any:
    """All of a DTensor: within the head's own forward that is a tensor-parallel shard alone."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _layer_of(head: Any) -> Any:
    """The layer of PEFT that the head is, or that trains some of its rows; else the head."""
    head = _unwrapped(head)
    return head.token_adapter if isinstance(head, TrainableTokensWrapper) else head


def _names_in_use(layer: Any) -> list[str]:
    """Of a layer of PEFT, its adapters that count, in their order."""
    tokens = isinstance(layer, TrainableTokensLayer)
    given = layer.trainable_tokens_delta if tokens else layer.lora_A
    unused = layer.disable_adapters or layer.merged
    return [] if unused else [name for name in layer.active_adapters if name in given]


@dataclass
class _Adapted:
    """A frozen weight, and what adapters have added to it so far."""

    hidden: Tensor  # (…, H)
    weight: Tensor  # (V, H)
    rows: list[Tensor] = field(default_factory=list)  # (…, r) further columns of hidden
    columns: list[Tensor] = field(default_factory=list)  # (V, r) and of the head
    scale: Tensor | None = None  # (V,)
    bias: Tensor | None = None  # (V,)

    def add_lora(self, layer: Any, name: str) -> None:
        a, b = layer.lora_A[name], layer.lora_B[name]
        scaling, magnitude = layer.scaling[name], layer.lora_magnitude_vector
        weight_a, weight_b, bias = whole(a.weight), whole(b.weight), whole(b.bias)
        x = layer.lora_dropout[name](self.hidden.to(weight_a.dtype))
        self.rows.append(linear(x, weight_a) * scaling)
        self.columns.append(weight_b)
        if bias is not None:
            added = scaling * bias
            self.bias = added if self.bias is None else self.bias + added
        if name in magnitude:
            norm = _norms(self.weight, weight_a, weight_b, scaling)
            self._multiply(whole(magnitude[name].weight).to(norm.device) / norm)

    def _multiply(self, scale: Tensor) -> None:
        """DoRA multiplies all that has come before it too, but for the head's own bias."""
        self.scale = scale if self.scale is None else scale * self.scale
        self.columns = [scale[:, None] * columns for columns in self.columns]
        if self.bias is not None:
            self.bias = scale * self.bias

    def add_tokens(self, tokens: Any, name: str) -> None:
        indices = torch.tensor(tokens.token_indices[name], device=self.weight.device)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        trained = whole(tokens.trainable_tokens_delta[name]).to(self.weight)
        added = trained.to(wide) - self.weight[indices].detach().to(wide)
        self.rows.append(linear(self.hidden.to(wide), added))
        columns = self.weight.new_zeros(len(self.weight), len(indices))
        columns[indices, torch.arange(len(indices))] = 1
        self.columns.append(columns)


@torch.no_grad()
def _norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Norms of the rows of W + s·B A `(V,)`, in the adapter's dtype, as PEFT has them."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a = scaling * a.to(wide)
    parts = zip(weight.split(_ROWS_AT_ONCE), b.split(_ROWS_AT_ONCE), strict=True)
    norms = [torch.linalg.vector_norm(w.to(wide).addmm(p.to(wide), a), dim=1) for w, p in parts]
    return torch.cat(norms).to(a.dtype)
