"""torch.compile: a call of a public function is one operator of the graph, its backward another.

The operator runs the function itself, so a compiled step multiplies what an eager one does. What it
keeps for the backward stays outside the graph, which is therefore free to write over its arguments:
they are copied, parameters excepted. Where no backward comes, that is let go at the next call. Its
arguments are tensors, numbers, and a text that says which is which. An objective is found again by
a number, which a guard of torch.compile's ties to the very object that was given.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastpref.backends import accumulate_dtype, compute_dtype
from fastpref.objectives import Objective, own_parameters
from fastpref.output import PreferenceOutput

_ALONE = (
    "fastpref runs this call beside the graphs of torch.compile. In a graph, which fullgraph=True "
    "asks for, it takes plain tensors, no process group, no weight_grad, and an objective that has "
    "nothing to train, is made outside of the compiled function and takes a batch of two prompts, "
    "all ones. What else is wrong with the arguments is said without fullgraph"
)
_PLAIN = (Tensor, torch.nn.Parameter)
_CONSTANTS = (bool, int, float, str, type(None))
_TENSOR, _INTEGER, _NUMBER = "<tensor>", "<integer>", "<number>"
_DIFFERENTIATED = ("hidden", "weight", "bias", "frozen_weight", "frozen_scale")

_F = TypeVar("_F", bound=Callable[..., Any])
_functions: dict[str, Callable[..., Any]] = {}
_objectives: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()
_numbers, _tokens = itertools.count(), itertools.count()
# Of forwards whose backward may come: results, leaves, and what is gone once it cannot come.
_states: dict[int, tuple[list[Tensor], list[Tensor], StorageWeakRef]] = {}


def one_operator(function: _F) -> _F:
    """A public function as one operator to torch.compile; where it cannot be, it runs alone."""
    has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # torch ≥ 2.7
    alone = torch.compiler.disable(function, **({"reason": _ALONE} if has_reason else {}))
    parameters = inspect.signature(function).parameters.values()
    places = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    _functions[function.__name__] = function
    traced = _TRACED[function.__name__]

    @functools.wraps(function)
    def entered(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and not _exports() and len(given) <= len(places):
            arguments = {**named, **dict(zip(places, given, strict=False))}
            if len(arguments) == len(given) + len(named) and _fits(arguments):
                found = traced(arguments)
                if found is not None:
                    return found
        return alone(*given, **named)

    return cast(_F, entered)


# --- traced by torch.compile --------------------------------------------------------------------


def _exports() -> bool:
    """Whether the graph is to be run elsewhere, where there is none of these objects."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _fits(arguments: Mapping[str, Any]) -> bool:
    """Whether an operator can have them; what is wrong with them the function itself says."""
    if any(arguments.get(name) is not None for name in ("vocab_group", "sequence_group")):
        return False
    if arguments.get("weight_grad") is not None:
        return False
    for name in ("hidden", "weight", "targets"):
        if type(arguments.get(name)) not in _PLAIN:
            return False
    extras, stats = arguments.get("extras") or {}, arguments.get("stats", ())
    if type(extras) is not dict or type(stats) not in (str, tuple, list):
        return False
    if not isinstance(arguments.get("objective", ""), (str, Objective)):
        return False
    structured = ("objective", "extras", "stats")
    others = [x for name, x in arguments.items() if name not in structured] + [*extras.values()]
    tensors = [x for x in others if isinstance(x, Tensor)]
    return (
        all(type(x) in (*_PLAIN, *_CONSTANTS) for x in others)
        and all(x.dim() > 0 for x in tensors)
        and type(arguments.get("responses", 2)) is int
        and all(type(name) is str for name in (*stats, *extras))
    )


def _preference_loss(arguments: Mapping[str, Any]) -> PreferenceOutput | None:
    objective, extras = arguments["objective"], arguments.get("extras") or {}
    responses, sequences = arguments.get("responses", 2), _sequences(arguments)
    given = [name for name in ("ref_logps", "scores", "betas") if arguments.get(name) is not None]
    # An extra has a value a response, or one a prompt.
    given += [f"{name}:{responses if len(x) == sequences else 1}" for name, x in extras.items()]
    identity = 0 if isinstance(objective, str) else id(objective)
    device = str(arguments["hidden"].device)
    known = _known(objective, identity, "\n".join(given), responses, _stats(arguments), device)
    if not known:
        return None
    number, *names = known.split("\n")
    tensors = {f"extras.{name}": x for name, x in extras.items()}
    constants = {"objective": number, "stats": _stats(arguments), "extras": None}
    loss, losses, logps, lengths, metrics = _run(
        "preference_loss", {**arguments, **tensors, **constants}, "\n".join(names)
    )
    by_name = dict(zip(names, metrics.detach().unbind(), strict=True))
    return PreferenceOutput(loss, losses.detach(), logps.detach(), lengths, by_name)


def _sequence_logps(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    logps, lengths = _run("sequence_logps", arguments)
    return logps, lengths


def _linear_logps(arguments: Mapping[str, Any]) -> Any:
    stats = _stats(arguments)
    logps, *found = _run("linear_logps", {**arguments, "stats": stats}, stats)
    names = _split(stats)
    of_tokens = {
        name: x if name == "entropy" else x.detach() for name, x in zip(names, found, strict=True)
    }
    return (logps, of_tokens) if names else logps


_TRACED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "preference_loss": _preference_loss,
    "sequence_logps": _sequence_logps,
    "linear_logps": _linear_logps,
}


def _sequences(arguments: Mapping[str, Any]) -> int:
    cu_seqlens = arguments.get("cu_seqlens")
    return arguments["targets"].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _stats(arguments: Mapping[str, Any]) -> str:
    stats = arguments.get("stats", ())
    return stats if isinstance(stats, str) else "\n".join(stats)


def _split(names: str) -> list[str]:
    return names.split("\n") if names else []


def _run(function: str, arguments: Mapping[str, Any], names: str = "") -> list[Tensor]:
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    layout = "\n".join(f"{name}={_written(x)}" for name, x in arguments.items())
    wants = [
        torch.is_grad_enabled() and x.requires_grad and name in _DIFFERENTIATED
        for name, x in tensors.items()
    ]
    copies = [any(wants) and type(x) is not torch.nn.Parameter for x in tensors.values()]
    integers = [x for x in arguments.values() if type(x) is int]
    numbers = [x for x in arguments.values() if type(x) is float]
    device, autocast = arguments["hidden"].device.type, ""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        autocast = str(torch.get_autocast_dtype(device))
    how = f"{_number()}.{function}", layout, names, autocast
    return forward(*how, list(tensors.values()), integers, numbers, wants, copies)[:-1]


def _written(value: Any) -> str:
    """A constant, or in which list the next one is."""
    if isinstance(value, Tensor):
        return _TENSOR
    return _INTEGER if type(value) is int else _NUMBER if type(value) is float else repr(value)


# --- at compile time ----------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _number() -> str:
    """Of a call: two alike in one graph stay two, each with its backward."""
    return str(next(_numbers))


@torch.compiler.assume_constant_result
def _known(
    objective: Objective | str, identity: int, given: str, responses: int, stats: str, device: str
) -> str:
    """What an operator finds an objective by, and the names of what it logs; "" where it cannot.

    The names are seen of two prompts, all ones.
    """
    if isinstance(objective, str):
        found = objective
    # One made in the graph is not whole yet, and the identity is not its own.
    elif identity != id(objective) or own_parameters(objective):
        return ""
    else:
        found = next((n for n, known in _objectives.items() if known is objective), _number())
        _objectives[found] = objective

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    try:
        inputs: dict[str, Any] = {"extras": {}}
        for name in _split(given):
            if ":" in name:
                extra, size = name.rsplit(":", 1)
                inputs["extras"][extra] = ones(2 * int(size))
            else:
                inputs[name] = ones(2 if name == "betas" else 2 * responses)
        hidden, weight, targets = ones(2 * responses, 1, 1), ones(2, 1), ones(2 * responses, 1)
        with torch.no_grad():
            out = _functions["preference_loss"](
                hidden, weight, targets.long(), objective, **inputs, responses=responses,
                stats=_split(stats), backend="torch",
            )  # fmt: skip
    except Exception:  # what is wrong is said by the call itself, of what it was given
        return ""
    return "\n".join([found, *out.metrics])


# --- when it runs -------------------------------------------------------------------------------


# What they keep from one to the other is no part of a CUDA graph (torch ≥ 2.9 can be told so).
_TAGS: dict[str, Any] = (
    {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op(
    "fastpref::forward",
    mutates_args=(),
    schema="(str call, str layout, str names, str autocast, Tensor[] tensors, SymInt[] integers, "
    "float[] numbers, bool[] wants, bool[] copies) -> Tensor[]",
    **_TAGS,
)
def forward(
    call: str,  # its number and a public function
    layout: str,  # a line an argument
    names: str,  # of metrics, or of statistics
    autocast: str,
    tensors: Sequence[Tensor],
    integers: Sequence[int],
    numbers: Sequence[float],
    wants: Sequence[bool],  # a gradient
    copies: Sequence[bool],
) -> list[Tensor]:
    """What the function returns, the last of it a number that its backward is found by."""
    for number in [n for n, (*_, token) in [*_states.items()] if token.expired()]:
        _states.pop(number, None)
    with _recorded(any(wants)):
        given = [
            (x.detach().clone() if copied else x.detach()).requires_grad_(want)
            for x, want, copied in zip(tensors, wants, copies, strict=True)
        ]
        arguments = _arguments(layout, given, integers, numbers)
        objective = arguments.get("objective")
        if isinstance(objective, Objective) and own_parameters(objective):
            raise RuntimeError(
                f"{type(objective).__name__} has something to train now, and had nothing when it "
                "was compiled; call torch.compiler.reset() in between"
            )
        with _autocast(autocast, arguments["hidden"].device):
            found = _functions[call.split(".")[1]](**arguments)
    results = _flat(found, _split(names))
    token = torch.tensor(next(_tokens), device="cpu")
    if any(wants):
        leaves = [x for x in given if x.requires_grad]
        _states[int(token)] = results, leaves, StorageWeakRef(token.untyped_storage())
    return [*(x.detach().clone() for x in results), token]


@forward.register_fake
def _(
    call: str,
    layout: str,
    names: str,
    autocast: str,
    tensors: Sequence[Tensor],
    integers: Sequence[int],
    numbers: Sequence[float],
    wants: Sequence[bool],
    copies: Sequence[bool],
) -> list[Tensor]:
    function = call.split(".")[1]
    given = _arguments(layout, tensors, integers, numbers)
    hidden, targets = given["hidden"], given["targets"]
    head = [given["weight"], given.get("frozen_weight")]
    with _autocast(autocast, hidden.device):
        dtype = accumulate_dtype(compute_dtype(hidden, *(x for x in head if x is not None)))

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    token = torch.empty((), dtype=torch.int64, device="cpu")
    if function == "linear_logps":
        kinds = [torch.bool if name == "is_top1" else dtype for name in _split(names)]
        return [empty(*targets.shape, dtype=kind) for kind in (dtype, *kinds)] + [token]
    sequences = _sequences(given)
    logps, lengths = empty(sequences), empty(sequences, dtype=torch.int64)
    if function == "sequence_logps":
        return [logps, lengths, token]
    losses = empty(sequences // given.get("responses", 2))
    loss = torch.empty_like(losses) if given.get("reduction") == "none" else empty()
    return [loss, losses, logps, lengths, empty(len(_split(names))), token]


@torch.library.custom_op(
    "fastpref::backward",
    mutates_args=(),
    schema="(Tensor token, Tensor?[] upstream, SymInt[] sizes, str kinds) -> Tensor[]",
    **_TAGS,
)
def backward(
    token: Tensor, upstream: Sequence[Tensor | None], sizes: Sequence[int], kinds: str
) -> list[Tensor]:
    """Gradients of all that wanted one, contiguous."""
    state = _states.pop(int(token), None)
    if state is None:
        raise RuntimeError(
            "a compiled fastpref call hands its gradients over in the first backward, and this is "
            "another one through it, or saved tensors were replaced by copies of themselves"
        )
    results, leaves, _ = state
    taken = [
        (x, grad) for x, grad in zip(results, upstream, strict=True)
        if x.requires_grad and grad is not None
    ]  # fmt: skip
    with _recorded(True):
        found = torch.autograd.grad(
            [x for x, _ in taken], leaves, [x for _, x in taken], materialize_grads=True
        )
    return [x.contiguous() for x in found]


@backward.register_fake
def _(
    token: Tensor, upstream: Sequence[Tensor | None], sizes: Sequence[int], kinds: str
) -> list[Tensor]:
    like = next(x for x in upstream if x is not None)
    left = list(sizes)
    found = []
    for kind in kinds.split(","):
        dtype, dims = kind.split(":")
        shape, left = left[: int(dims)], left[int(dims) :]
        found.append(like.new_empty(shape, dtype=getattr(torch, dtype)))
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, *ctx.numbers, ctx.wants, _ = inputs[4:]
    wanted = [x for x, want in zip(tensors, ctx.wants, strict=True) if want]
    ctx.sizes = [size for x in wanted for size in x.shape]
    ctx.kinds = ",".join(f"{str(x.dtype).removeprefix('torch.')}:{x.dim()}" for x in wanted)
    ctx.save_for_backward(output[-1])


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    (token,) = ctx.saved_tensors
    found = iter(backward(token, upstream[:-1], ctx.sizes, ctx.kinds))
    grads = [next(found) if want else None for want in ctx.wants]
    of_numbers: list[Any] = [None if given else [] for given in ctx.numbers]  # as torch has lists
    return None, None, None, None, grads, *of_numbers, None, None


forward.register_autograd(_backward, setup_context=_keep)


def _arguments(
    layout: str, tensors: Sequence[Tensor], integers: Sequence[int], numbers: Sequence[float]
) -> dict[str, Any]:
    """As the function takes them."""
    lists = {_TENSOR: iter(tensors), _INTEGER: iter(integers), _NUMBER: iter(numbers)}
    found: dict[str, Any] = {}
    for line in layout.splitlines():
        name, value = line.split("=", 1)
        found[name] = next(lists[value]) if value in lists else ast.literal_eval(value)
    if "stats" in found:
        found["stats"] = _split(found["stats"])
    if "objective" in found:
        found["objective"] = _objectives.get(found["objective"], found["objective"])
        prefix = "extras."
        extras = {name: found.pop(name) for name in [*found] if name.startswith(prefix)}
        found["extras"] = {name.removeprefix(prefix): x for name, x in extras.items()}
    return found


def _flat(found: Any, names: list[str]) -> list[Tensor]:
    if isinstance(found, PreferenceOutput):
        if [*found.metrics] != names:
            raise RuntimeError(
                f"what is logged was {names} when it was compiled and is {[*found.metrics]} now; "
                "call torch.compiler.reset() in between"
            )
        metrics = torch.stack([*found.metrics.values()])
        return [found.loss, found.losses, found.logps, found.lengths, metrics]
    if isinstance(found, Tensor):
        return [found]
    first, other = found
    return [first, *(other[name] for name in names)] if names else [first, other]


def _autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """The caller's, which the graph may have left."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    kind = getattr(torch, dtype.removeprefix("torch.")) if dtype else None
    return torch.autocast(device.type, kind, enabled=bool(dtype))


@contextmanager
def _recorded(wanted: bool) -> Iterator[None]:
    """Autograd as outside of an operator, where torch has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.set_grad_enabled(wanted):
        yield
