"""The commands: `fastpref train`, `verify`, `bench` and `plan`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from fastpref.backends import BACKENDS
from fastpref.commands.benchmark.workloads import HEADS
from fastpref.commands.plan import GPUS, estimates, head_shape, largest_batch, problem_for
from fastpref.commands.verify import SHAPES, Result, objectives_to_verify, verify
from fastpref.objectives import objective_names
from fastpref.planner import SCHEDULES, make_plan

app = typer.Typer(
    help="Preference tuning without logits: train a model, verify the numbers on this machine.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
console = Console()

_HYPERPARAMETERS = "Hyperparameters (the objective's defaults where not given)"
_RUN = "The run"


def _hyperparameter(flag: str, text: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=_HYPERPARAMETERS, show_default=False)


def _run_option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_RUN)


@app.command("train")
def train_command(
    model: Annotated[str, typer.Option(help="Checkpoint directory or model name.")],
    data: Annotated[
        Path, typer.Option(help="JSON lines: prompt, chosen, rejected, score_chosen, …")
    ],
    output: Annotated[Path, typer.Option(help="Directory for model, curves.png, results.json.")],
    objective: Annotated[
        str, typer.Option(help=f"One of {', '.join(objective_names())}.")
    ] = "unidpo",
    beta: Annotated[float | None, _hyperparameter("--beta", "β, margin scale")] = None,
    label_smoothing: Annotated[
        float | None, _hyperparameter("--label-smoothing", "ε of DPO and AdaDPO")
    ] = None,
    alpha: Annotated[float | None, _hyperparameter("--alpha", "α, R-DPO's length penalty")] = None,
    eta: Annotated[float | None, _hyperparameter("--eta", "η, Uni-DPO's quality weight")] = None,
    tau_ref: Annotated[
        float | None, _hyperparameter("--tau-ref", "τ_ref, Uni-DPO's constant margin")
    ] = None,
    gamma: Annotated[
        float | None, _hyperparameter("--gamma", "γ: SimPO's margin, Uni-DPO's focus")
    ] = None,
    nll_weight: Annotated[
        float | None, _hyperparameter("--nll-weight", "λ of CPO and Uni-DPO")
    ] = None,
    tau_good: Annotated[
        float | None, _hyperparameter("--tau-good", "τ_good, least score for Uni-DPO's NLL")
    ] = None,
    odds_weight: Annotated[float | None, _hyperparameter("--odds-weight", "λ of ORPO")] = None,
    length_normalized: Annotated[
        bool | None,
        _hyperparameter("--length-normalized/--summed", "averages per token or sums"),
    ] = None,
    balance: Annotated[
        bool | None,
        _hyperparameter("--balance/--no-balance", "adaptive balance (AdaDPO) on any objective"),
    ] = None,
    balance_clip: Annotated[
        float | None, _hyperparameter("--balance-clip", "κ, its bound; switches it on")
    ] = None,
    eval_data: Annotated[Path | None, _run_option("Pairs to evaluate on.")] = None,
    holdout: Annotated[int, _run_option("Keep the last N pairs for evaluation.")] = 0,
    epochs: Annotated[float, _run_option("Passes over the data.")] = 1.0,
    max_steps: Annotated[int, _run_option("Stop after so many steps; -1 for all.")] = -1,
    learning_rate: Annotated[float, _run_option("Peak of the cosine schedule.")] = 1e-6,
    batch_size: Annotated[int, _run_option("Pairs a device and step.")] = 2,
    grad_accum: Annotated[int, _run_option("Steps a weight update.")] = 1,
    max_length: Annotated[int, _run_option("Tokens at which a sequence is cut.")] = 1024,
    lora: Annotated[bool, _run_option("Train LoRA adapters on all linear layers.")] = False,
    lora_rank: Annotated[int, _run_option("Rank of the adapters.")] = 16,
    bf16: Annotated[bool, _run_option("Train in bfloat16 autocast.")] = False,
    gradient_checkpointing: Annotated[bool, _run_option("Recompute activations.")] = False,
    precompute_ref: Annotated[
        bool, _run_option("Reference log-probabilities once, before training.")
    ] = True,
    schedule: Annotated[str, _run_option(f"One of {', '.join(SCHEDULES)}.")] = "auto",
    seed: Annotated[int, _run_option("Of data order and adapters.")] = 0,
    resume: Annotated[
        bool, _run_option("Save checkpoints and continue from the last one.")
    ] = False,
) -> None:
    """Tune a causal language model on preference pairs; curves and numbers go to OUTPUT."""
    from fastpref.commands.train import TrainSettings, train

    given = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "alpha": alpha,
        "eta": eta,
        "tau_ref": tau_ref,
        "gamma": gamma,
        "nll_weight": nll_weight,
        "tau_good": tau_good,
        "odds_weight": odds_weight,
        "length_normalized": length_normalized,
        "balance": balance if balance_clip is None else {"ceiling": balance_clip},
    }
    settings = TrainSettings(
        model=model,
        data=data,
        output=output,
        objective=objective,
        hyperparameters={name: value for name, value in given.items() if value is not None},
        eval_data=eval_data,
        holdout=holdout,
        epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        grad_accum=grad_accum,
        max_length=max_length,
        lora=lora,
        lora_rank=lora_rank,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        precompute_ref=precompute_ref,
        schedule=schedule,
        seed=seed,
        resume=resume,
    )
    try:
        train(settings, console)
    except (ValueError, OSError) as problem:
        console.print(f"[red]error:[/red] {problem}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


@app.command("verify")
def verify_command(
    device: Annotated[str, typer.Option(help="Device; default the accelerator, or cpu.")] = "",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float64, float32, bfloat16, float16; repeatable.")
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="Only these objectives; repeatable.")
    ] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile the Triton kernels for all GPUs instead."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="With --compile: write the table there, as JSON.")
    ] = None,
) -> None:
    """Compare every objective and schedule with the float64 reference on this machine.

    The table shows the largest error over all shapes as a share of the allowed one, and which
    quantity has it: log-probabilities ℓ, loss L or a gradient. Exit status 1 if any exceeds 1.

    With --compile: registers, shared memory and spills of every Triton kernel on five GPU
    architectures, none of which need be here. Exit status 1 if any spills or does not fit.
    """
    if compile_:
        _report_compilation(output)
        return
    device = device or default_device()
    names = dtype or ["float64", "float32", "bfloat16", "float16"]
    dtypes = {name: getattr(torch, name, None) for name in names}
    chosen = objectives_to_verify()
    if objective:
        unknown = set(objective) - set(chosen)
        if unknown:
            _fail(f"unknown objective {sorted(unknown)}; expected some of {list(chosen)}")
        chosen = {name: chosen[name] for name in objective}
    for name, value in dtypes.items():
        if not isinstance(value, torch.dtype) or not value.is_floating_point:
            _fail(f"unknown dtype {name!r}")
    if backend not in BACKENDS:
        _fail(f"unknown backend {backend!r}; expected one of {BACKENDS}")

    table = Table(title=f"largest error / allowed error, {device}, {len(SHAPES)} shapes a cell")
    table.add_column("objective", no_wrap=True)
    table.add_column("schedule", no_wrap=True)
    for name in dtypes:
        table.add_column(name, justify="right", no_wrap=True)
    failures = checks = 0
    for name, each in track(chosen.items(), "verifying", console=console, transient=True):
        cells: dict[str, list[str]] = {}
        for dtype_ in dtypes.values():
            found = [verify(each, shape, dtype_, device, backend) for shape in SHAPES]
            for schedule in found[0]:
                results = [result for by_schedule in found for result in by_schedule[schedule]]
                failures += sum(not result.passed for result in results)
                checks += len(results)
                cells.setdefault(schedule, []).append(_cell(results))
        for schedule, of_dtypes in cells.items():
            table.add_row(name, schedule, *of_dtypes)
    console.print(table)
    verdict = "all within the allowed error" if not failures else f"{failures} beyond it"
    console.print(f"{checks} comparisons with float64, {verdict}")
    if failures:
        raise typer.Exit(1)


@app.command("bench")
def bench_command(
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Only these heads: {', '.join(HEADS)}; repeatable.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A small batch, within two minutes.")] = False,
    peers: Annotated[
        list[str] | None, typer.Option(help="Only peers whose name contains this; repeatable.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="SmolLM2 checkpoint for accuracy on text and training steps."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for bench.json and charts.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier bench.json: say what became slower or larger.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device; default the accelerator, or cpu.")] = "",
) -> None:
    """Time, memory and accuracy beside naive, TRL, Liger, CCE and torch, on the same inputs.

    Ratios are medians of interleaved rounds with the middle half in brackets. With --compare the
    exit status is 1 if anything of fastpref got worse beyond the spread of both runs.
    """
    from fastpref.commands.benchmark import charts, report, suite
    from fastpref.commands.benchmark.peers import PEERS

    names = [n for n in PEERS if not peers or any(p.lower() in n.lower() for p in peers)]
    if not names:
        _fail(f"no peer is called {peers}; there are {list(PEERS)}")
    unknown = set(workload or []) - set(HEADS)
    if unknown:
        _fail(f"unknown workload {sorted(unknown)}; expected some of {list(HEADS)}")
    old = json.loads(compare.read_text()) if compare else None
    device = device or default_device()
    planned = suite.suite_for(device, quick=quick, heads=workload)
    directory = None if model is None else str(model)
    save = {} if out is None else {"save": lambda results: charts.write_results(results, out)}
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        results = suite.run_suite(planned, names, device, directory, progress, **save)
    report.print_report(results, console)
    if out is not None:
        for path in (out / "bench.json", *charts.write_charts(results, out)):
            console.print(f"wrote {path}", soft_wrap=True)
    if old is not None:
        worse = report.regressions(results, old)
        console.print("\n".join(worse) or "nothing became slower or larger beyond the spread")
        if worse:
            raise typer.Exit(1)


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Option(help="Checkpoint directory or model name; config only.")],
    pairs: Annotated[int, typer.Option(help="Pairs a device and step.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Scored tokens of a response.", min=1)] = 1024,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h200",
    lora: Annotated[bool, typer.Option(help="The head is frozen.")] = False,
    tp: Annotated[int, typer.Option(help="Ranks that share the vocabulary.", min=1)] = 1,
    free: Annotated[
        float | None, typer.Option(help="Free memory in GB; default all of the GPU's.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="logits_budget in MiB.")] = None,
) -> None:
    """Predict FLOP, bytes and a time floor of every schedule, and of naive, TRL and Liger.

    Nothing is run and no weight is read. The floor is what the GPU's matrix rate and bandwidth
    allow; the largest batch is the most pairs whose hidden states and loss fit the free memory.
    """
    if gpu not in GPUS:
        _fail(f"unknown GPU {gpu!r}; expected one of {list(GPUS)}")
    try:
        hidden_size, vocabulary = head_shape(model)
    except (OSError, ValueError, AttributeError) as error:
        _fail(f"no config of a causal language model at {model!r}: {str(error).splitlines()[0]}")
    spec = GPUS[gpu]
    room = int((free or spec.memory / 1e9) * 1e9)
    bytes_ = None if budget is None else budget * 2**20
    problem = problem_for(
        hidden_size, vocabulary, pairs=pairs, length=length, lora=lora, tensor_parallel=tp
    )
    table = Table(
        title=f"{pairs} pairs of 2 × {length} tokens, H {hidden_size}, V {vocabulary}, bf16, {gpu}"
    )
    for heading in (
        "",
        "products",
        "TFLOP",
        "peak GB",
        "floor ms",
        f"pairs in {room / 1e9:.0f} GB",
    ):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    try:
        for each in estimates(problem, bytes_):
            table.add_row(
                f"{each.name} (auto)" if each.automatic else each.name,
                f"{each.products:g} U",
                f"{each.flop / 1e12:.1f}",
                f"{each.extra_bytes / 1e9:.2f}",
                f"{1e3 * each.floor_seconds(spec):.1f}",
                str(largest_batch(each.name, problem, room, bytes_)),
                style="bold" if each.automatic else None,
            )
        reason = make_plan(problem, pairs=True, budget=bytes_).reason
    except ValueError as error:
        _fail(str(error))
    console.print(table)
    console.print(f"auto: {reason}. Predictions, not measurements; peak beyond inputs and weights.")


def default_device() -> str:
    """The accelerator's type, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def _report_compilation(output: Path | None) -> None:
    import fastpref_kernels

    if not fastpref_kernels.HAS_TRITON:
        _fail("the package triton is not installed")
    from fastpref.commands import compile_report

    cases = track(
        compile_report.compile_all(), "compiling", total=None, console=console, transient=True
    )
    found = list(cases)
    console.print(compile_report.table_of(found))
    if output is not None:
        compile_report.write(found, output)
    faulty = sum(bool(faults) for _, faults in found)
    console.print(f"{len(found)} kernels compiled, {faulty or 'none'} with a fault")
    if faulty:
        raise typer.Exit(1)


def _cell(results: list[Result]) -> str:
    worst = max(results, key=lambda r: math.inf if math.isnan(r.ratio) else r.ratio)
    colour = "green" if all(result.passed for result in results) else "bold red"
    return f"[{colour}]{worst.ratio:.2f}[/] {worst.quantity}"


def _fail(message: str) -> None:
    console.print(f"[red]error:[/red] {message}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)
