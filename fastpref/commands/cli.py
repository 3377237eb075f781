"""The commands: `fastpref train`, `launch`, `verify`, `bench`, `plan` and `tune`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

from fastpref.backends import BACKENDS, choose_backend
from fastpref.commands.benchmark.workloads import HEADS
from fastpref.commands.plan import (
    GPUS,
    LINKS,
    MOST_PAIRS,
    MOST_TOKENS,
    budget_and_why,
    estimates,
    head_shape,
    largest_batch,
    planned,
    problem_for,
    token_lengths,
    trunk_tokens,
)
from fastpref.commands.tables import new_table, show
from fastpref.commands.verify import SHAPES, Result, objectives_to_verify, verify
from fastpref.objectives import hyperparameters, objective_names
from fastpref.planner import SCHEDULES, Exchange, Layout, Problem

app = typer.Typer(
    help="Preference tuning without logits: train a model, verify the numbers on this machine.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
console = Console()
errors = Console(stderr=True)

_LAUNCH = Path(__file__).with_name("launch")
ENGINES = [path.stem for path in sorted(_LAUNCH.glob("*.yaml"))]
_HYPERPARAMETERS = "Hyperparameters (the objective's defaults where not given)"
_RUN = "The run"
_MEMORY = "Memory and precision"
_VERIFIED_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _hyperparameter(flag: str, text: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=_HYPERPARAMETERS, show_default=False)


def _run_option(text: str, *flags: str, panel: str = _RUN) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=panel)


@app.command("train")
def train_command(
    model: Annotated[str, typer.Option(help="Checkpoint directory or model name.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Pairs: prompt, chosen, rejected, for some objectives score_chosen and "
            "score_rejected, and if you like a weight and a beta of each, as JSON lines or array "
            "(.gz too), Parquet, Arrow, CSV, or a directory of them."
        ),
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
    more: Annotated[
        list[str] | None,
        _hyperparameter("--set", "NAME=VALUE, any other field of the objective; repeatable"),
    ] = None,
    length_normalized: Annotated[
        bool | None,
        _hyperparameter("--length-normalized/--summed", "averages per token or sums"),
    ] = None,
    balance: Annotated[
        bool | None,
        _hyperparameter(
            "--balance/--no-balance",
            "AdaDPO's balance on any objective: the chosen reward times min(P_w / P_l, C), of "
            "probabilities per token, C = 2. AdaDPO always has it",
        ),
    ] = None,
    balance_ceiling: Annotated[
        float | None,
        _hyperparameter("--balance-ceiling", "C, the most it may multiply by; switches it on"),
    ] = None,
    balance_source: Annotated[
        str | None,
        _hyperparameter(
            "--balance-source",
            "policy (P) or implicit_reward (P over the reference's); switches it on",
        ),
    ] = None,
    eval_data: Annotated[Path | None, _run_option("Pairs to evaluate on.")] = None,
    holdout: Annotated[int, _run_option("Keep the last N pairs for evaluation.")] = 0,
    epochs: Annotated[float, _run_option("Passes over the data.")] = 1.0,
    max_steps: Annotated[
        int, _run_option("Weight updates, whatever --epochs says; -1 for --epochs.")
    ] = -1,
    learning_rate: Annotated[
        float | None,
        _run_option("Peak of the cosine schedule; if not given 1e-6, with --lora 2e-4."),
    ] = None,
    batch_size: Annotated[int, _run_option("Pairs a device and batch.")] = 2,
    grad_accum: Annotated[int, _run_option("Batches a weight update.")] = 1,
    max_length: Annotated[
        int,
        _run_option("Tokens at which a sequence is cut; a pair whose prompt fills it is left out."),
    ] = 1024,
    lora: Annotated[
        bool, _run_option("Train LoRA adapters on all linear layers.", "--lora")
    ] = False,
    lora_rank: Annotated[int | None, _run_option("Rank of the adapters; 16 if not given.")] = None,
    dtype: Annotated[
        str,
        _run_option(
            "float32, bfloat16, or auto: bfloat16 on an accelerator that has it. Of products, and "
            "of weights that LoRA freezes; weights that train stay float32, since bfloat16 would "
            "round their updates away.",
            panel=_MEMORY,
        ),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, _run_option("Recompute activations.", "--gradient-checkpointing", panel=_MEMORY)
    ] = False,
    padding_free: Annotated[
        bool,
        _run_option("Batches are one row without padding.", "--padding-free", panel=_MEMORY),
    ] = False,
    share_prompt: Annotated[
        str,
        _run_option(
            "true: chosen and rejected attend to one copy of their prompt, in such a row; auto: "
            "where that pays.",
            panel=_MEMORY,
        ),
    ] = "false",
    precompute_ref: Annotated[
        bool, _run_option("Reference log-probabilities once, before training.")
    ] = True,
    schedule: Annotated[
        str, _run_option(f"Of the loss: {', '.join(SCHEDULES)}.", panel=_MEMORY)
    ] = "auto",
    seed: Annotated[int, _run_option("Of data order and adapters.")] = 0,
    resume: Annotated[
        bool,
        _run_option(
            "Save a checkpoint an epoch, and continue from the last one in OUTPUT. Only the length "
            "may change, and what leaves the weights as they are; a longer run's learning rate "
            "follows the longer cosine from there on.",
            "--resume",
        ),
    ] = False,
) -> None:
    """Tune a causal language model on preference pairs; curves and numbers go to OUTPUT."""
    from fastpref.commands.train import TrainSettings, train

    given: dict[str, Any] = {
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
    }
    try:
        given["balance"] = _balance(objective, balance, balance_ceiling, balance_source)
        given |= _more_fields(more or [], given)
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
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            padding_free=padding_free,
            share_prompt=share_prompt,
            precompute_ref=precompute_ref,
            schedule=schedule,
            seed=seed,
            resume=resume,
        )
        train(settings, console)
    except (ValueError, TypeError, OSError) as problem:
        _fail(str(problem))


def _balance(
    objective: str, switch: bool | None, ceiling: float | None, source: str | None
) -> bool | dict[str, Any] | None:
    """What the three options say together, as `make_objective` takes it."""
    fields = {"ceiling": ceiling, "source": source}
    fields = {name: value for name, value in fields.items() if value is not None}
    if switch is not False:
        return fields or switch
    for name in fields:
        raise ValueError(f"--no-balance contradicts --balance-{name}")
    if hyperparameters(objective).get("balance") is not None:
        raise ValueError(
            f"--no-balance contradicts --objective {objective}, whose balance defines it"
        )
    return switch


def _more_fields(texts: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Fields by `--set NAME=VALUE`, a JSON value or else a text."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.replace("-", "_")
        if not (name and sign):
            raise ValueError(f"--set takes NAME=VALUE, got {text!r}")
        if name in fields or given.get(name) is not None:
            raise ValueError(f"{name} is given twice")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


@app.command("launch")
def launch_command(
    engine: Annotated[str, typer.Argument(help=f"One of {', '.join(ENGINES)}.")],
) -> None:
    """Print the path of a configuration for accelerate launch, which starts `-m fastpref train`.

    accelerate launch --config_file "$(fastpref launch fsdp2)" --num_processes 8 -m fastpref train …
    """
    if engine not in ENGINES:
        _fail(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
    typer.echo(_LAUNCH / f"{engine}.yaml")


@app.command("verify")
def verify_command(
    device: Annotated[str, typer.Option(help="Device; default the accelerator, or cpu.")] = "",
    backend: Annotated[str, typer.Option(help=f"One of {', '.join(BACKENDS)}.")] = "auto",
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(_VERIFIED_DTYPES)}; repeatable.")
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
        if device or backend != "auto" or dtype or objective:
            _fail("--compile takes --output only: it compiles every kernel for every architecture")
        _report_compilation(output)
        return
    if output is not None:
        _fail("--output writes the table of --compile")
    device = _usable_device(device)
    names = dtype or list(_VERIFIED_DTYPES)
    unknown = set(names) - set(_VERIFIED_DTYPES)
    if unknown:
        _fail(f"unknown dtype {sorted(unknown)}; expected some of {list(_VERIFIED_DTYPES)}")
    dtypes = {name: getattr(torch, name) for name in names}
    chosen = objectives_to_verify()
    if objective:
        unknown = set(objective) - set(chosen)
        if unknown:
            _fail(f"unknown objective {sorted(unknown)}; expected some of {list(chosen)}")
        chosen = {name: chosen[name] for name in objective}
    try:
        choose_backend(backend, torch.device(device))
    except (ValueError, RuntimeError) as problem:
        _fail(str(problem))

    title = f"largest error / allowed error, {device}, {len(SHAPES)} shapes a cell"
    table = new_table(title, "objective", "schedule", *dtypes, text=2)
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
    show(console, table)
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
        typer.Option(
            help="SmolLM2 checkpoint for accuracy on text and training steps.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    trainer: Annotated[
        bool,
        typer.Option(help="Whole training steps alone, of --model: as under TRL, packed, shared."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Directory for the JSON and charts.")] = None,
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
    from fastpref.commands.benchmark.trainer import run_trainers
    from fastpref.commands.train import check_directory, check_model

    if trainer:
        if workload or peers or compare:
            _fail("--trainer measures no heads: leave out --workload, --peers and --compare")
        if model is None and not quick:
            _fail("--trainer needs --model, or --quick for a look at a tiny one")

    names = [n for n in PEERS if not peers or any(p.lower() in n.lower() for p in peers)]
    if not names:
        _fail(f"no peer is called {peers}; there are {list(PEERS)}")
    unknown = set(workload or []) - set(HEADS)
    if unknown:
        _fail(f"unknown workload {sorted(unknown)}; expected some of {list(HEADS)}")
    old = None if compare is None else _earlier_run(compare)
    device = _usable_device(device)
    try:
        if model is not None:
            check_model(str(model))
        if out is not None:
            check_directory(out)
    except OSError as problem:
        _fail(str(problem))
    planned = suite.suite_for(device, quick=quick, heads=workload)
    directory = None if model is None else str(model)
    save = {} if out is None else {"save": lambda results: charts.write_results(results, out)}
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        if trainer:
            results = run_trainers(directory, device, progress, quick=quick, **save)
        else:
            results = suite.run_suite(planned, names, device, directory, progress, **save)
    report.print_report(results, console)
    if out is not None:
        written = charts.write_results(results, out)
        for path in (written, *charts.write_charts(results, out)):
            console.print(f"wrote {path}", soft_wrap=True)
    if old is not None:
        worse = report.regressions(results, old)
        console.print("\n".join(worse) or "nothing became slower or larger beyond the spread")
        if worse:
            raise typer.Exit(1)


@app.command("plan")
def plan_command(
    model: Annotated[str, typer.Option(help="Checkpoint directory or model name; config only.")],
    pairs: Annotated[int, typer.Option(help="Pairs a device and step.", min=1, max=MOST_PAIRS)] = 8,
    length: Annotated[
        int, typer.Option(help="Scored tokens of a response.", min=1, max=MOST_TOKENS)
    ] = 1024,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "h200",
    lora: Annotated[bool, typer.Option(help="The head is frozen.")] = False,
    tp: Annotated[
        int, typer.Option(help="Ranks that share the vocabulary, of the same pairs.", min=1)
    ] = 1,
    fsdp: Annotated[
        int, typer.Option(help="Ranks that shard the head's weight, each with its pairs.", min=1)
    ] = 1,
    cp: Annotated[
        int, typer.Option(help="Ranks that share the positions of every sequence.", min=1)
    ] = 1,
    free: Annotated[
        float | None, typer.Option(help="Free memory in GB; default all of the GPU's.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="logits_budget in MiB; default as in a run that finds --free."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Pairs, as for train: counts what padding and shared prompts take."),
    ] = None,
) -> None:
    """Predict FLOP, bytes and a time floor of every schedule, and of naive, TRL and Liger.

    Nothing is run and no weight is read. The floor is what the GPU's matrix rate and bandwidth
    allow; the largest batch is the most pairs whose hidden states and loss fit the free memory,
    of which a run takes at most an eighth for logits.

    Of several ranks, what the one with the largest share of the vocabulary and of the positions
    has to do, and what it sends.
    """
    from fastpref.commands.train import check_model

    if gpu not in GPUS:
        _fail(f"unknown GPU {gpu!r}; expected one of {list(GPUS)}")
    if free is not None and not 0 < free < math.inf:
        _fail(f"--free must be positive and finite, got {free}")
    if 2 * pairs * length > MOST_TOKENS:
        _fail(f"{pairs} pairs of 2 × {length} tokens are more than the {MOST_TOKENS:,} planned for")
    try:
        check_model(model)
        hidden_size, vocabulary = head_shape(model)
    except FileNotFoundError as error:
        _fail(str(error))
    except (OSError, ValueError, AttributeError) as error:
        _fail(f"no config of a causal language model at {model!r}: {str(error).splitlines()[0]}")
    spec = GPUS[gpu]
    room = int(spec.memory if free is None else free * 1e9)
    bytes_ = None if budget is None else budget * 2**20
    whole = problem_for(hidden_size, vocabulary, pairs=pairs, length=length, lora=lora)
    layout = Layout(tp, fsdp, cp)
    try:
        problem = layout.of_rank(whole)
    except ValueError as error:
        _fail(str(error))
    is_whole = cp == 1  # each sequence on a rank
    table = new_table(
        f"{pairs} pairs of 2 × {length} tokens, H {hidden_size}, V {vocabulary}, bf16, {gpu}"
        + f", one of {tp * fsdp * cp} ranks" * (tp * fsdp * cp > 1),
        *("", "products", "TFLOP", "peak GB", "floor ms", f"pairs in {room / 1e9:.3g} GB"),
    )
    try:
        for each in estimates(problem, bytes_, room, whole=is_whole):
            table.add_row(
                f"{each.name} (auto)" if each.automatic else each.name,
                f"{each.products:g} U",
                f"{each.flop / 1e12:.1f}",
                f"{each.extra_bytes / 1e9:.2f}",
                f"{1e3 * each.floor_seconds(spec):.1f}",
                _at_least(largest_batch(each.name, problem, room, bytes_, whole=is_whole), length),
                style="bold" if each.automatic else None,
            )
        reason = planned(problem, bytes_, room, whole=is_whole).reason
    except ValueError as error:
        _fail(str(error))
    show(console, table)
    if not lora and is_whole:
        console.print(f"pair groups: {budget_and_why(problem, bytes_, room)}.")
    console.print(f"auto: {reason}. Predictions, not measurements; peak beyond inputs and weights.")
    if exchanges := layout.exchanges(whole):
        _show_exchanges(layout, whole, exchanges)
    if data is not None:
        _show_trunk_tokens(model, data, pairs)


def _show_exchanges(layout: Layout, whole: Problem, exchanges: list[Exchange]) -> None:
    table = new_table(
        "a rank sends, a step", "", "", "ranks", "MB", *(f"ms, {link}" for link in LINKS), text=2
    )
    for each in exchanges:
        times = (f"{1e3 * each.sent / rate:.3f}" for rate in LINKS.values())
        operation = each.operation.replace("_", "-")
        table.add_row(each.what, operation, str(each.ranks), f"{each.sent / 1e6:,.3f}", *times)
    show(console, table)
    held, gathered = layout.head_bytes(whole)
    console.print(
        f"The head: {held / 1e9:.3f} GB on a rank"
        + f", {gathered / 1e9:.3f} GB while it is gathered" * bool(gathered)
        + ". Links at their published rates, "
        + ", ".join(f"{link} {rate / 1e9:g} GB/s a direction" for link, rate in LINKS.items())
        + "."
    )
    rows, most = layout.tp, layout.of_rank(whole).vocabulary
    if rows * most != whole.vocabulary:
        console.print(
            f"{whole.vocabulary:,} tokens do not divide by {rows}: ranks have {most:,} of them, "
            f"the last {max(0, whole.vocabulary - (rows - 1) * most):,}, and wait for the largest."
        )


def _show_trunk_tokens(model: str, data: Path, pairs: int) -> None:
    try:
        lengths = token_lengths(model, data)
    except (ValueError, OSError) as problem:
        _fail(str(problem))
    tokens = trunk_tokens(lengths, pairs)
    table = new_table(
        f"{len(lengths)} pairs of {data.name}, {pairs} a batch", "", "trunk tokens", "of padded"
    )
    for name, count in tokens.items():
        table.add_row(name, f"{count:,}", f"{count / tokens['padded']:.2f}")
    show(console, table)


@app.command("tune")
def tune_command(
    model: Annotated[
        str, typer.Option(help="Take H and V from its config: a directory or model name.")
    ] = "",
    hidden_size: Annotated[
        int | None, typer.Option(help="H of the head; 4096 if not given.", min=1)
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="V of the head; 128256 if not given.", min=2)
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    output: Annotated[
        Path | None, typer.Option(help="The file to write; default in the user's cache.")
    ] = None,
) -> None:
    """Measure on this GPU which launch configurations are fastest, and keep them for every run.

    Takes some minutes, most of them compiling. Every candidate's numbers are compared with the
    default's before it is timed; a winner is faster in three of four interleaved rounds. The file
    holds for GPUs of this name and this version of Triton; FASTPREF_CONFIGS=FILE names another.

    Without a GPU: a dry run, tiny sizes through Triton's interpreter, of which nothing is kept
    unless --output says where.
    """
    import fastpref_kernels

    if not fastpref_kernels.HAS_TRITON:
        _fail("the package triton is not installed")
    if dtype not in ("bfloat16", "float16"):
        _fail(f"--dtype must be bfloat16 or float16, got {dtype!r}: others have nothing to tune")
    head = _head_of(model, hidden_size, vocabulary)
    dry = _usable_device("") == "cpu"
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        _interpret_instead(dtype, output)
    from fastpref_kernels import configs

    from fastpref.commands.train import check_directory
    from fastpref.commands.tune import questions, run

    sizes = questions.dry_sizes(dtype) if dry else questions.sizes_of(*head, dtype)
    path = output or configs.tuned_path(configs.device_name(torch.device(sizes.device)))
    kept = output is not None or not dry
    try:
        if kept:
            check_directory(path.parent)
    except OSError as problem:
        _fail(str(problem))
    if dry:
        console.print("no GPU: a dry run through the interpreter; these times mean nothing")
    asked = list(questions.questions(dry))
    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(asked) + 1)

        def show_next(name: str) -> None:
            progress.update(task, description=name, advance=bool(progress.tasks[0].description))

        answers, unanswered = run.ask_all(asked, sizes, 1 if dry else 5, show_next)
        show_next("whole steps")
        steps = run.steps(sizes, run.winners(answers), 1 if dry else 5)
        progress.update(task, completed=len(asked) + 1)
    _report_tuning(answers, unanswered, steps)
    if kept:
        run.write(path, run.winners(answers), sizes, steps)
        console.print(f"wrote {path}", soft_wrap=True)
    if not answers:
        raise typer.Exit(1)


def _head_of(model: str, hidden_size: int | None, vocabulary: int | None) -> tuple[int, int]:
    """H and V, of a model or as given."""
    if not model:
        return hidden_size or 4096, vocabulary or 128256
    if hidden_size or vocabulary:
        _fail("--model has its own H and V: leave out --hidden-size and --vocabulary")
    from fastpref.commands.train import check_model

    try:
        check_model(model)
        return head_shape(model)
    except (OSError, ValueError, AttributeError) as error:
        _fail(f"no config of a causal language model at {model!r}: {str(error).splitlines()[0]}")


def _interpret_instead(dtype: str, output: Path | None) -> NoReturn:
    """The same in a process that interprets: Triton decides it at its import."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "from fastpref.commands.cli import app; app()",
        "tune",
    ]
    command += ["--dtype", dtype, *(["--output", str(output)] if output else [])]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False)
    raise typer.Exit(run.returncode)


def _report_tuning(answers: list[Any], unanswered: dict[str, str], steps: list[Any]) -> None:
    from fastpref.commands.tune.run import text_of

    table = new_table(
        "fastest of what ran, against what ships", "", "entry", "ms", "of shipped", text=2
    )
    for answer in answers:
        found = answer.row_of(answer.after)
        ms, ratio = found["ms"]["median"], found["of default"]
        table.add_row(
            answer.name,
            text_of(answer.after) if answer.changed else "as shipped",
            f"{ms:.3g}",
            escape(f"{ratio['median']:.2f} [{ratio['low']:.2f}–{ratio['high']:.2f}]"),
            style="bold" if answer.changed else None,
        )
    show(console, table)
    table = new_table("whole steps", "", "before\nms", "after\nms", "of before")
    for step in steps:
        if "why" in step:
            table.add_row(step["step"], "", "", "no room")
            continue
        figures = step["before ms"], step["after ms"], step["ratio"]["median"]
        table.add_row(step["step"], *(f"{figure:.3g}" for figure in figures))
    show(console, table)
    for answer in answers:
        for candidate, why in answer.left_out.items():
            console.print(escape(f"left out: {answer.name}: {candidate}: {why}"), style="dim")
    for name, why in unanswered.items():
        console.print(f"[red]not measured:[/red] {escape(name)}: {escape(why)}")


def default_device() -> str:
    """The accelerator's type, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def _at_least(pairs: int, length: int) -> str:
    """A largest batch; the search for it ends somewhere."""
    return f"≥ {pairs}" if pairs >= min(MOST_PAIRS, MOST_TOKENS // (2 * length)) else str(pairs)


def _usable_device(name: str) -> str:
    """The device asked for, by default the accelerator or the CPU; ends where it does not work."""
    name = name or default_device()
    try:
        torch.zeros(1, device=name).item()
    # What is raised depends on the device: AssertionError for a torch without CUDA, and so on.
    except Exception as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        _fail(f"no device {name!r} here: {reason}")
    return name


def _earlier_run(path: Path) -> dict[str, Any]:
    """A bench.json to compare with."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        _fail(f"no earlier run to compare with: {path}: {problem}")
    if not isinstance(found, dict) or not {"speed", "memory"} <= found.keys():
        _fail(f"{path} is no bench.json: it has no speed and memory to compare with")
    return found


def _report_compilation(output: Path | None) -> None:
    import fastpref_kernels

    if not fastpref_kernels.HAS_TRITON:
        _fail("the package triton is not installed")
    from fastpref.commands import compile_report
    from fastpref.commands.train import check_directory

    if output is not None:
        try:
            check_directory(output.parent)
        except OSError as problem:
            _fail(str(problem))
    cases = track(
        compile_report.compile_all(), "compiling", total=None, console=console, transient=True
    )
    found = list(cases)
    for table in compile_report.tables_of(found):
        show(console, table)
        console.print()
    if output is not None:
        compile_report.write(found, output)
    faulty = sum(bool(faults) for _, faults in found)
    console.print(f"{len(found)} kernels compiled, {faulty or 'none'} with a fault")
    if faulty:
        raise typer.Exit(1)


def _cell(results: list[Result]) -> str:
    worst = max(results, key=lambda r: math.inf if math.isnan(r.ratio) else r.ratio)
    colour = "green" if all(result.passed for result in results) else "bold red"
    ratio = f"{worst.ratio:.2f}" if worst.ratio < 1000 else f"{worst.ratio:.1e}"
    return f"[{colour}]{ratio}[/] {worst.quantity}"


def _fail(message: str) -> NoReturn:
    errors.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(2)
