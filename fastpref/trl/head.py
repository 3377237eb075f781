"""A loss in the model's own forward: there DDP sees the head's gradient, FSDP has gathered it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from fastpref.backends import Head
from fastpref.sequences import on_device
from fastpref.trl.adapted_head import check_head, projection, run_in_head, whole

if TYPE_CHECKING:
    from fastpref.trl.packing import Packing

logger = logging.getLogger(__name__)


@dataclass
class LossHeadOutput(ModelOutput):
    """What a model returns for `loss_head=…`: the fields of `PreferenceOutput`, and aux loss."""

    loss: Tensor | None = None
    losses: Tensor | None = None
    logps: Tensor | None = None
    lengths: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None
    sealed: _Sealed | None = None


class _Sealed:
    """Holds an output as it was: engines cast tensors, in containers too, and pass this by."""

    def __init__(self, output: LossHeadOutput) -> None:
        self.output = output


def uncast(output: LossHeadOutput) -> LossHeadOutput:
    """A model's output with the values that its loss head gave, each in its own dtype.

    FSDP2's `output_dtype` makes bfloat16 of all that leaves a model. Gradients wait for what an
    engine hung on the tensors that did leave: each is an input here, of gradient 0.
    """
    if output.sealed is None:
        return output

    def exactly(exact: Any, left: Any) -> Any:
        if not isinstance(exact, Tensor) or not exact.requires_grad or exact is left:
            return exact
        return torch.where(torch.ones_like(exact, dtype=torch.bool), exact, left)

    exact = output.sealed.output
    return LossHeadOutput(**{name: exactly(exact[name], output[name]) for name in exact})


def add_loss_head(model: PreTrainedModel | PeftModel, **_: Any) -> None:
    """Lets the model's forward hand hidden states and head to a loss, in place of TRL's fused head.

    `model(…, loss_head=f)` returns `f(hidden, weight, bias=…, softcap=…, logit_scale=…)`, a
    `PreferenceOutput`, as a `LossHeadOutput`. `f` runs as the head's own forward, around which an
    engine gathers and casts; of what it returns `uncast` gives the exact values. `packing` says how
    the padded `input_ids` become one row: `hidden` is that row's `(1, T, H)`. A call without
    `loss_head` is the model's own.

    LoRA, rsLoRA and DoRA on the head, and tokens of it that train, count as in its own forward:
    `hidden` has further columns then, `weight` is what trains of the head, and `loss_head` is given
    `frozen_weight` and, of DoRA, `frozen_scale` too, all as `preference_loss` takes them.

    The scalars come from `head_scalars` and are compared, once, with what the model's own forward
    makes of two tokens, at the cost of two such forwards. Where a vision model leaves out those of
    its text config, so do we.

    Raises:
        ValueError: the model's logits are not its last hidden state times its head, scaled and
            capped; the head is quantised, or an adapter on it is of another kind, is DoRA with
            dropout, or comes with a head that trains too. Where the two tokens could not be run, a
            warning is logged instead.
    """
    wrapper: Any = model
    inner: Any = wrapper.get_base_model() if isinstance(wrapper, PeftModel) else wrapper
    scalars = agreed(lambda: _confirmed_scalars(inner))
    stock_forward = inner.forward

    @functools.wraps(type(inner).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        loss_head: Callable[..., Any] | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> Any:
        if loss_head is None:
            return stock_forward(*args, **kwargs)
        kwargs["use_cache"] = False
        token_counts = kwargs.get("attention_mask")
        if packing is not None:
            input_ids = kwargs.pop("input_ids")
            kwargs |= packing.model_inputs(input_ids, self)
            token_counts = on_device(packing.uses, input_ids.device)[None]
        backbone = backbone_of(self)(*args, **kwargs)
        head: Any = self.get_output_embeddings()

        def of_hidden(hidden: Tensor) -> LossHeadOutput:
            hidden, weight, tensors = projection(head, hidden)
            out = loss_head(hidden, weight, **tensors, **scalars)
            output = LossHeadOutput(out.loss, out.losses, out.logps, out.lengths, out.metrics)
            return dataclasses.replace(output, sealed=_Sealed(output))

        output = run_in_head(head, of_hidden, backbone.last_hidden_state)
        if kwargs.get("output_router_logits"):
            aux_loss = _router_loss(self, backbone, token_counts)
            output.aux_loss = output.sealed.output.aux_loss = aux_loss
        return output

    inner.forward = types.MethodType(forward, inner)
    if isinstance(wrapper, PeftModel) and "forward" in vars(wrapper.base_model):
        wrapper.base_model.forward = inner.forward  # AdaptionPrompt keeps the one it once found


def backbone_of(model: Any) -> Any:
    """`base_model`; the model itself where its prefix names nothing, as in Llama 4's text model."""
    return model.model if model.base_model is model else model.base_model


def _router_loss(model: PreTrainedModel, backbone: Any, token_counts: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts.

    Args:
        token_counts: how often each token counts, as input_ids: 0 for padding, more than once for a
            prompt that sequences share.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    balancing: Any = load_balancing_loss_func  # says that it may return a number
    return balancing(backbone.router_logits, experts, config.num_experts_per_tok, token_counts)


# --- from the projection to the logits ----------------------------------------------------------


class HeadScalars(TypedDict):
    """What stands between the projection and the logits, as `preference_loss` takes it."""

    softcap: float | None
    logit_scale: float


def head_scalars(config: Any) -> HeadScalars:
    """`softcap` and `logit_scale` of a causal language model, from its text config.

    Cohere and Command multiply logits by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, others
    by `output_multiplier`; Granite and MiniCPM divide by `logits_scaling`, Inkling by
    `logits_mup_width_multiplier`, HyperCLOVA X multiplies. RecurrentGemma's and xLSTM's softcaps
    have names of their own.
    """
    config = config.get_text_config()

    def first(*names: str) -> float | None:
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if isinstance(value, int | float)), None)

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = first("logits_scaling", "logits_mup_width_multiplier")
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return {"softcap": softcap, "logit_scale": 1.0 if scale is None else scale}


def agreed(answer: Callable[[], Any]) -> Any:
    """What rank 0 answers, or the ValueError that it raises.

    With FSDP's frugal loading the others have no weights yet.
    """
    given: list[Any]
    try:
        given = [answer(), None]
    except ValueError as refusal:
        given = [None, str(refusal)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(given)
    if given[1] is not None:
        raise ValueError(given[1])
    return given[0]


def _confirmed_scalars(model: PreTrainedModel) -> HeadScalars:
    """`head_scalars`, or those of them by which the model's logits of two tokens come about."""
    configured, family = head_scalars(model.config), family_of(model)
    if model.get_output_embeddings() is None:
        raise ValueError(f"{family} has no output embeddings, so there is no head to train through")
    check_head(model.get_output_embeddings())
    if model.base_model is model and not hasattr(model, "model"):
        raise ValueError(f"{family} has no base model that gives its last hidden state")
    try:
        logits, hidden, head = _two_tokens(model)
    except Exception as reason:  # whatever a model makes of two tokens, it may well train
        logger.warning(
            "%s: could not compare its own logits with its head's scalars %s, which are taken from "
            "its config (%s: %s)",
            family,
            configured,
            type(reason).__name__,
            reason,
        )
        return configured
    vocabulary = len(head.weight)
    expected = f"{family} cannot be trained through its head: expected logits (…, {vocabulary})"
    if logits.shape[-1] != vocabulary or hidden.shape[-1] != head.hidden_size:
        raise ValueError(
            f"{expected} from hidden states (…, {hidden.shape[-1]}) and a head "
            f"{(vocabulary, head.hidden_size)}; its own forward gives {tuple(logits.shape)}"
        )
    hidden = hidden[:, hidden.shape[1] - logits.shape[1] :]  # some project the last token alone
    projected, rounding = _projection(hidden, head, logits.dtype)
    if not projected.isfinite().all():
        logger.warning("%s: its logits are not finite, its head's scalars not compared", family)
        return configured
    excess = {}
    choices = {configured["softcap"]: 0, None: 1}, {configured["logit_scale"]: 0, 1.0: 1}
    for softcap, scale in itertools.product(*choices):
        ours = scale * projected
        ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
        error = (ours - logits).abs()
        if (error <= max(1.0, abs(scale)) * rounding).all():
            return {"softcap": softcap, "logit_scale": scale}
        excess[softcap, scale] = error.max().item()
    raise ValueError(
        f"{expected} = softcap·tanh(logit_scale·(W h + b)/softcap) of the last hidden state h, "
        f"with {configured} from its config; its own forward differs by up to "
        f"{min(excess.values()):.3g}, where rounding explains {rounding.max().item():.1g}"
    )


def _two_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor, Head]:
    """The model's own logits `(1, ≤2, V)`, last hidden state `(1, 2, H)`, and head."""
    with trying_out(model), torch.no_grad():
        head = model.get_output_embeddings()
        ids = torch.tensor([ordinary_tokens(model, 2)], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        hidden, weight, tensors = projection(head, hidden)
        weight, tensors["bias"] = whole(weight), whole(tensors["bias"])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        projected = Head(
            weight, logit_scale=1, softcap=None, temperature=1, compute_dtype=wide, **tensors
        )
        return logits.to(weight.device), hidden, projected


@contextlib.contextmanager
def trying_out(model: PreTrainedModel) -> Iterator[None]:
    """In it the model evaluates; modes and random numbers stay as they were.

    Raises:
        RuntimeError: the weights are elsewhere yet.
    """
    if any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters()):
        raise RuntimeError("its weights are not on this device yet")
    modes = {module: module.training for module in model.modules()}
    rng_of = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(devices=rng_of):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def family_of(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def ordinary_tokens(model: PreTrainedModel, count: int) -> list[int]:
    """Tokens from the middle of the vocabulary which no config names (padding, an image, …)."""
    special = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in config.to_dict().items():
            if name.endswith(("_id", "_index")):
                special |= set(value) if isinstance(value, list) else {value}
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    middle = range(vocabulary // 2, vocabulary)
    return list(itertools.islice((token for token in middle if token not in special), count))


@torch.no_grad()
def _projection(hidden: Tensor, head: Head, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W h + b in fp32 at least, and by how much a model that computes in its own dtype may differ.

    Hidden is scaled and rounded, the product rounded, scaled and capped by three operations: six
    roundings of half an ε of the coarsest dtype, and the sum's H in fp32. As errors of independent
    sign they add up to the root of Σ h²w², not to Σ |h||w|.
    """
    products = {"highest": 2**-23, "high": 2**-10, "medium": 2**-7}
    weight = head.weight if head.frozen_weight is None else head.frozen_weight
    eps = max(torch.finfo(x).eps for x in (hidden.dtype, weight.dtype, dtype))
    eps = max(eps, products[torch.get_float32_matmul_precision()])
    h = hidden.to(head.compute_dtype)
    projections, sizes = [], []
    for first in range(0, len(weight), 8192):  # a wider copy of the whole head may not fit
        w = head.rows(slice(first, first + 8192))
        projections.append(h @ w.T)
        sizes.append((h.square() @ w.square().T).sqrt())
    projected, size = torch.cat(projections, -1), torch.cat(sizes, -1)
    if head.bias is not None:
        projected = projected + head.bias.to(h.dtype)
        size = size + head.bias.to(h.dtype).abs()
    return projected, (4 * eps + 2**-23 * h.shape[-1] ** 0.5) * size
