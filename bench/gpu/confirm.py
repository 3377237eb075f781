"""Stage `confirm`: the goals beside every peer in the same rounds, races, a whole training step."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import fastpref_kernels as kernels
import torch
from fastpref_kernels import Epilogue
from gpu import small_step
from gpu.parts import ROOT, NotHereError, Part, python, run_for, surroundings
from gpu.setup import TERA, Setup, frozen, milliseconds, product, product_flop

from fastpref import shift_targets
from fastpref.commands.benchmark.measure import (
    BASELINE,
    checked_losses,
    clear_gradients,
    first_line,
    make_step,
    runnable,
)
from fastpref.commands.benchmark.peers import OURS, PEERS, Loss
from fastpref.commands.benchmark.schedules import schedule_step
from fastpref.commands.benchmark.timing import Stopwatch, spread_of_ratios
from fastpref.commands.benchmark.workloads import Inputs, Workload, make_inputs

TRL, LIGER = "TRL 1.16 chunked", "Liger DPO"
PAIR_GROUPS, FROZEN, RECOMPUTE = OURS
FORWARD = "fastpref forward only"
HOST_TARGETS = f"{PAIR_GROUPS}, host's targets"
# What is wanted of an H200, of times: this, of that, at most.
TIMES = (
    (PAIR_GROUPS, "three bare products", 1.2),
    (PAIR_GROUPS, TRL, 0.80),
    (PAIR_GROUPS, LIGER, 0.60),
    (RECOMPUTE, "four bare products", 1.2),
)
FROZEN_TIMES = ((FROZEN, "two bare products", 1.2), (FROZEN, TRL, 0.65))
SMALL_TIMES = ((PAIR_GROUPS, BASELINE, 1.0), (HOST_TARGETS, BASELINE, 1.0))
FORWARD_RATE = 640.0  # TFLOP/s, at least
# Of peaks, gradients included.
PEAKS = ((PAIR_GROUPS, TRL, 0.60),)
FROZEN_PEAKS = ((FROZEN, TRL, 0.5),)
MOST_MEGABYTES = {FORWARD: 50, RECOMPUTE: 1600}
_ROUNDS = 200  # of the in-place gradient


def parts(setup: Setup) -> list[Part]:
    """In order of importance."""
    large, small = setup.large, setup.small
    found = [
        Part("times, head trains", 60, lambda: _times(setup, large, TIMES)),
        Part("times, head frozen", 45, lambda: _times(setup, frozen(large), FROZEN_TIMES)),
        Part("peaks, head trains", 30, lambda: _peaks(setup, large, PEAKS)),
        Part("peaks, head frozen", 30, lambda: _peaks(setup, frozen(large), FROZEN_PEAKS)),
        Part("times, small", 15, lambda: _times(setup, small, SMALL_TIMES)),
        Part("in place and not", 15, lambda: _in_place(setup)),
        Part("training step", 45, lambda: _training(setup)),
        Part("memcheck", 60, lambda: _sanitizer(setup, "memcheck")),
        Part("times, small and frozen", 10, lambda: _times(setup, frozen(small), ())),
        Part("racecheck", 60, lambda: _sanitizer(setup, "racecheck")),
    ]
    return [dataclasses.replace(part, seconds=setup.short_of(part.seconds)) for part in found]


# --- times and peaks ----------------------------------------------------------------------------

Goal = tuple[str, str, float]


def _times(setup: Setup, workload: Workload, goals: tuple[Goal, ...]) -> dict[str, Any]:
    """Forward and backward of every peer, forward only, and the bare products, interleaved."""
    inputs = make_inputs(workload, setup.device)
    losses, skipped = checked_losses(list(dict.fromkeys([*setup.peers, *OURS])), inputs)
    calls: dict[str, Callable[[], object]] = _bare_products(workload, inputs)
    bare = list(calls)
    calls[FORWARD] = schedule_step("forward", inputs)
    for name, loss in losses.items():
        calls[name] = functools.partial(_step, loss)
    if not workload.frozen:
        calls[HOST_TARGETS] = schedule_step("pair_groups", inputs, host_targets=True)
    watch = Stopwatch(setup.device)
    seconds = watch.interleaved(calls, setup.rounds, before=lambda: clear_gradients(inputs))
    products = [seconds.pop(name) for name in bare]
    seconds["one bare product"] = products[0]
    for word, counted in (("two", (1, 1, 0)), ("three", (1, 1, 1)), ("four", (2, 1, 1))):
        seconds[f"{word} bare products"] = [
            sum(n * each for n, each in zip(counted, of_round, strict=True))
            for of_round in zip(*products, strict=True)
        ]
    rate = [product_flop(workload) / each / TERA for each in seconds[FORWARD]]
    reached = {"goal": FORWARD, "than": "TFLOP/s", "at least": FORWARD_RATE, "found": _median(rate)}
    found = [_goal(goal, seconds, skipped) for goal in goals]
    if workload == setup.large:
        found.append(reached | {"met": _median(rate) >= FORWARD_RATE})
    rows = [
        {
            "what": name,
            "ms": milliseconds(values),
            "of naive": spread_of_ratios(values, seconds.get(BASELINE)) or "",
            "seconds": values,
        }
        for name, values in seconds.items()
    ]
    return {"workload": workload.name, "of": rows, "goals": found, "not run": skipped}


def _step(loss: Loss) -> None:
    loss().backward()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _goal(goal: Goal, values: dict[str, list[float]], skipped: dict[str, str]) -> dict[str, Any]:
    """Whether a ratio, formed within each round, is met; None where one of the two is missing."""
    name, baseline, limit = goal
    found = {"goal": name, "than": baseline, "at most": limit}
    missing = [each for each in (name, baseline) if each not in values]
    if missing:
        why = "; ".join(f"{each}: {skipped.get(each, 'not measured')}" for each in missing)
        return found | {"met": None, "why": why}
    ratio = spread_of_ratios(values[name], values[baseline])
    return found | {"found": ratio, "met": ratio["median"] <= limit}


def _bare_products(workload: Workload, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Logits, their gradient times the head, and times hidden states, of all scored rows."""
    narrow = inputs.hidden.dtype
    hidden = inputs.hidden.detach().flatten(0, 1)
    weight = inputs.weight.detach()
    logits = torch.empty(workload.rows, workload.vocabulary, device=hidden.device, dtype=narrow)
    gradient = torch.randn(logits.shape, device=hidden.device, dtype=narrow)
    of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
    return {
        "logits": lambda: product(hidden, weight.T, logits),
        "of hidden": lambda: product(gradient, weight, of_hidden),
        "of weight": lambda: product(gradient.T, hidden, of_weight),
    }


def _peaks(setup: Setup, workload: Workload, goals: tuple[Goal, ...]) -> dict[str, Any]:
    """Peak memory beyond the inputs, gradients included."""
    inputs = make_inputs(workload, setup.device)
    forward = schedule_step("forward", inputs)
    found = {FORWARD: setup.peak(forward)}
    names, skipped = runnable(list(dict.fromkeys([*setup.peers, *OURS])), inputs)
    del inputs, forward
    for name in names:
        try:
            found[name] = setup.peak(make_step(workload, name, setup.device))
        except Exception as failure:
            if name in OURS:
                raise
            skipped[name] = first_line(failure)
    reached = [_goal(goal, {name: [n] for name, n in found.items()}, skipped) for goal in goals]
    reached += [
        {"goal": name, "than": "MB", "at most": most, "found": found[name]}
        | {"met": found[name] <= most}
        for name, most in MOST_MEGABYTES.items()
        if name in found and not workload.frozen
    ]
    rows = [{"what": name, "peak MB": n} for name, n in found.items()]
    return {"workload": workload.name, "of": rows, "goals": reached, "not run": skipped}


# --- races and memory ---------------------------------------------------------------------------


def _in_place(setup: Setup) -> list[dict[str, Any]]:
    """Gradients in the memory of what they are made of, against those no one else's reads lie in.

    Products in fp32 become narrower rows: a row's front is written while its tail is still being
    read. Exponentials keep their width, and a row's target is written by one thread at the end.
    """
    vocabulary = setup.large.vocabulary
    # The second has no aligned rows.
    return [row for columns in (vocabulary, vocabulary - 5) for row in _of_columns(setup, columns)]


def _of_columns(setup: Setup, columns: int) -> Iterator[dict[str, Any]]:
    draw = {"generator": torch.Generator(setup.device).manual_seed(columns), "device": setup.device}
    products = torch.randn(setup.group_rows, columns, **draw).mul_(6)
    targets = torch.randint(0, columns, products.shape[:1], **draw)
    coef = torch.randn(setup.group_rows, **draw)
    logps, lse, _ = kernels.row_statistics(products, targets, Epilogue())
    of_rows, held = (targets, lse, coef, Epilogue()), torch.empty_like(products)

    def of_products(dtype: torch.dtype) -> torch.Tensor:
        return kernels.row_gradients_(held.copy_(products), *of_rows, dtype)

    for dtype in (torch.bfloat16, torch.float16):
        apart = kernels.row_gradients_(products.clone(), *of_rows, torch.float32).to(dtype)
        shape = {"of": f"products to {dtype}", "columns": columns}
        yield shape | _differences(setup, functools.partial(of_products, dtype), apart)

    block = 256
    peaks = torch.nn.functional.pad(products, (0, -columns % block), value=-torch.inf)
    peaks = peaks.unflatten(1, (-1, block)).amax(2)
    of_block = peaks.repeat_interleave(block, 1)[:, :columns]
    exponentials = (products - of_block).exp_().mul_(kernels.SCALE).half()
    del of_block
    given, of_half = (peaks, block, targets, logps, lse, coef), torch.empty_like(exponentials)

    def of_exponentials() -> torch.Tensor:
        kernels.gradients_(of_half.copy_(exponentials), *given)
        return of_half

    apart = exponentials.float()
    kernels.gradients_(apart, *given)
    shape = {"of": f"exponentials, {of_half.dtype}", "columns": columns}
    yield shape | _differences(setup, of_exponentials, apart.half())


def _differences(
    setup: Setup, run: Callable[[], torch.Tensor], apart: torch.Tensor
) -> dict[str, Any]:
    """Rounds in which the gradient in place is not the other one, and by how much at the last."""
    first = None
    differ = {"from out of place": 0, "from the first": 0}
    rounds = 2 if setup.rehearsal else _ROUNDS
    for _ in range(rounds):
        grad = run()
        first = grad.clone() if first is None else first
        differ["from out of place"] += not torch.equal(grad, apart)
        differ["from the first"] += not torch.equal(grad, first)
    found: dict[str, Any] = {"rounds": rounds, "differ": differ}
    if differ["from out of place"]:
        off = (grad.double() - apart.double()).abs()
        found["largest difference"] = off.max().item()
        found["elements"] = int((off > 0).sum())
    return found


def _sanitizer(setup: Setup, tool: str) -> dict[str, Any]:
    """A small step of every schedule under compute-sanitizer."""
    if setup.rehearsal:
        return {"plans": small_step.run(setup.small, setup.device)}
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(binary):
        raise NotHereError("compute-sanitizer is not on this machine")
    # Every tensor an allocation of its own, so that its end is known.
    environment = surroundings(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    script = python(str(ROOT / "bench/gpu/small_step.py"))
    # What torch asks the driver in vain at its start is no error of a kernel.
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
    command = [binary, *options, *script]
    code, said = run_for(command, max(30.0, min(150.0, setup.call.left())), environment)
    found = {"exit code": code, "said": said[-6000:]}
    if code != 0:
        raise RuntimeError(f"{tool} ended by {code}: {said[-2000:]}")
    return found


# --- a training step ----------------------------------------------------------------------------


def _training(setup: Setup) -> dict[str, Any]:
    """A step of a Llama of random weights: forward, loss, backward, AdamW. No reference model.

    "trunk" has no head at all: what no loss can save.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as failure:
        raise NotHereError(first_line(failure)) from failure

    # Llama-3.2-1B's.
    sizes = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    pairs, prompt, length = 4, 128, 640
    if setup.rehearsal:
        sizes = {
            "vocab_size": 83,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        pairs, prompt, length = 1, 2, 5
    torch.manual_seed(0)
    dtype = torch.bfloat16
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=length)
    with torch.device(setup.device):
        model = LlamaForCausalLM(config).to(dtype).train()
    generator = torch.Generator(setup.device).manual_seed(0)
    shape = (2 * pairs, length)
    ids = torch.randint(0, sizes["vocab_size"], shape, generator=generator, device=setup.device)
    mask = torch.ones_like(ids)
    mask[:, :prompt] = 0
    targets = shift_targets(ids, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=setup.device != "cpu")

    def step(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss_of(hidden).backward()
        optimizer.step()
        optimizer.zero_grad()

    def given(hidden: torch.Tensor) -> Inputs:
        return Inputs(hidden, model.lm_head.weight, targets, None, backend=setup.large.backend)

    example = given(torch.empty(*shape, sizes["hidden_size"], device=setup.device, dtype=dtype))
    wanted = [name for name in (BASELINE, TRL, LIGER) if name in setup.peers]
    names, skipped = runnable([*wanted, PAIR_GROUPS, RECOMPUTE], example)
    calls = {"trunk": functools.partial(step, lambda hidden: hidden.float().mean())}
    for name in names:
        calls[name] = functools.partial(
            step, lambda hidden, name=name: PEERS[name].prepare(given(hidden))()
        )
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as failure:
            if name in OURS or name in ("trunk", BASELINE):
                raise
            skipped[name] = first_line(failure)
            del calls[name]
            optimizer.zero_grad()
    seconds = Stopwatch(setup.device).interleaved(calls, setup.rounds)
    rows = []
    for name, values in seconds.items():
        gc.collect()
        rows.append(
            {
                "step": name,
                "ms": milliseconds(values),
                "of naive": spread_of_ratios(values, seconds[BASELINE]),
                "peak MB": setup.peak(calls[name]),
                "seconds": values,
            }
        )
    parameters = sum(each.numel() for each in model.parameters())
    batch = f"{pairs} pairs of {length} tokens, {prompt} of them prompt"
    return {"model": f"Llama, {parameters:,} parameters, {batch}", "of": rows, "not run": skipped}
