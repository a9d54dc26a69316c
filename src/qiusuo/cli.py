"""The command line: words for what the rooms do, and no logic of its own."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qiusuo import cli_bench, cli_eval, cli_money, cli_plan
from qiusuo.version import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Qiusuo (求索): the whole DeepSeek recipe, from text to a model you own.",
)

app.add_typer(cli_money.keys, name="keys")
app.add_typer(cli_money.accounts, name="accounts")
app.add_typer(cli_money.prices, name="prices")
app.add_typer(cli_bench.bench, name="bench")
app.command("eval")(cli_eval.evaluate)
app.command("plan")(cli_plan.plan)

RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key: --set stages.pretrain.steps=100 (repeatable)."),
]
ModelArgument = Annotated[
    str, typer.Argument(help="A model folder, a run, a .gguf file or a pulled name.")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; without it: as it was saved.")
]
QuantizeOption = Annotated[
    str | None, typer.Option(help="Hold the weights in int8 or int4 (made each time it is loaded).")
]
CacheOption = Annotated[
    str | None, typer.Option(help="int8: keep a context in about half the memory of bfloat16.")
]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps ...")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qiusuo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """What holds for every command."""


@app.command()
def quickstart(
    fresh: Annotated[bool, typer.Option(help="Start over instead of going on.")] = False,
    run: RunOption = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name or path.")] = "quickstart",
    set_: SetOption = None,
    device: DeviceOption = "cpu",
    page: Annotated[bool, typer.Option(help="Show it on a page; else in the terminal alone.")] = (
        True
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page.")] = 8000,
) -> None:
    """Train a small DeepSeek-V3 on the built-in text, watched on a page, and let it write; goes on
    when run again."""
    from qiusuo.quickstart import is_recipe_of, remove_run
    from qiusuo.quickstart import quickstart as start
    from qiusuo.training.recipe import RecipeError, read_recipe

    read = read_recipe(recipe, set_)
    path = run or Path("runs") / read.name
    if set_ and not fresh and not is_recipe_of(path, read):
        raise RecipeError(f"{path} has another recipe: give --fresh to train anew with --set")
    if fresh and path.exists():
        remove_run(path)
    if page:
        from qiusuo.quickstart_page import quickstart_with_page
        from qiusuo.server.settings import Settings

        words = ["--recipe", recipe, "--run", str(path), "--device", device]
        words += [word for change in set_ or [] for word in ("--set", change)]
        finished = quickstart_with_page(path, words, Settings(port=port))
    else:
        finished = start(read, path, device)
        if not finished:
            typer.echo("Stopped and saved. Go on with: make run, or qiusuo quickstart")
    if not finished:
        raise typer.Exit(130)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's path or built-in name.")] = None,
    set_: SetOption = None,
    run: RunOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --run.")] = False,
    stage: Annotated[str | None, typer.Option(help="Live only this stage.")] = None,
    device: DeviceOption = "cpu",
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine that share the work (or torchrun)."),
    ] = None,
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Processes send tokens to experts.")
    ] = False,
) -> None:
    """Live a recipe: train its stages in a run folder."""
    from qiusuo.train_command import Order, carry_out

    order = Order(recipe, tuple(set_ or ()), run, resume, stage, device, expert_parallel)
    if code := carry_out(order, nproc):
        raise typer.Exit(code)


@app.command()
def pull(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A name of the list, owner/name on Hugging Face, or an address; without it: "
            "the list."
        ),
    ] = None,
) -> None:
    """Fetch a model or a corpus, checked and resumable."""
    from qiusuo.checkpoint.open import pull_model
    from qiusuo.data.pull import check_reference
    from qiusuo.terminal import show_catalogue, show_progress

    if name is None:
        show_catalogue()
        return
    check_reference(name)
    with show_progress(name) as progress:
        path = pull_model(name, progress=progress)
    typer.echo(f"{name} is in {path}")


@app.command()
def chat(
    model: ModelArgument,
    message: Annotated[
        list[str] | None, typer.Option("--message", "-m", help="Ask this and leave (repeatable).")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this mass.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Of the draws, to repeat them; without it: always others.")
    ] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Ask for a thought first.")] = False,
    thinking_budget: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which a thought is closed.")
    ] = None,
    draft: Annotated[
        str, typer.Option(help="Guess words: auto, mtp, ngram, none, or a smaller model.")
    ] = "auto",
    cache_gb: Annotated[
        float | None, typer.Option(help="For the cache; without it a share of what is free.")
    ] = None,
    keep_prefixes: Annotated[
        Path | None, typer.Option(help="Keep what was read in this folder, over restarts.")
    ] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Talk with a model in the terminal."""
    _check_choice(quantize, ("int8", "int4"), "quantize ")
    _check_choice(cache, ("int8",), "cache ")
    from qiusuo.chat import Conversation, check_draft, converse, limits_for
    from qiusuo.engine.sampling import Sampling
    from qiusuo.terminal import load_shown

    check_draft(draft)
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    options |= {"top_p": top_p, "seed": seed}
    try:
        Sampling(**options)  # before minutes of loading
        limits = limits_for(cache_gb, keep_prefixes)
        loaded = load_shown(model, dtype, device, limits, draft, quantize, cache)
        loaded.describe()  # makes the cache
    except ValueError as error:
        if isinstance(error, mendable()):
            raise
        raise typer.BadParameter(str(error)) from error
    options |= {"thinking": thinking, "thinking_budget": thinking_budget}
    conversation = Conversation(loaded, options, system=system)
    for question in message or []:
        conversation.ask(question)
    if message is None and not converse(conversation):
        raise typer.Exit(1)


@app.command()
def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Models: folders, runs, .gguf files, pulled names.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What to call them, in their order (repeatable).")
    ] = None,
    host: Annotated[str, typer.Option(help="Other than 127.0.0.1 needs keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    database: Annotated[
        Path | None, typer.Option(help="Keys, ledger, conversations; without it beside the cache.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder of runs that the studio shows.")] = (
        Path("runs")
    ),
    cache_gb: Annotated[
        float | None,
        typer.Option(help="For each model's cache; without it a share of what is free."),
    ] = None,
    draft: Annotated[
        str, typer.Option(help="auto, mtp, ngram, none, or a smaller model.")
    ] = "auto",
    keep_prefixes: Annotated[
        Path | None, typer.Option(help="Keep what was read in this folder, over restarts.")
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call (repeatable).")
    ] = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    cache: CacheOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Serve models: the DeepSeek, OpenAI and Anthropic API, and a page to use and to watch them."""
    _check_choice(quantize, ("int8", "int4"), "quantize ")
    _check_choice(cache, ("int8",), "cache ")
    from qiusuo.engine.limits import Limits
    from qiusuo.server.serving import serve as start
    from qiusuo.server.settings import Settings, default_database

    room = None if cache_gb is None else int(cache_gb * 1e9)
    settings = Settings(
        host=host,
        port=port,
        database=database or default_database(),
        runs=runs,
        origins=tuple(origin or ()),
        dtype=dtype,
        quantize=quantize,
        cache=cache,
        device=device,
        draft=draft,
        limits=Limits(cache_bytes=room, prefix_folder=keep_prefixes),
    )
    start(settings, models or [], name or [])


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new folder (hf) or a .gguf file.")],
    to: Annotated[
        str | None, typer.Option(help="hf or gguf; without it by the name of OUT.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16; for hf also fp8, for gguf also q8_0. Without it: "
            "as it is stored, bfloat16 if that is quantised."
        ),
    ] = None,
    mtp: Annotated[bool, typer.Option(help="With the multi-token prediction modules.")] = True,
) -> None:
    """Write a model as a Hugging Face folder or a GGUF file, without loading it whole."""
    from qiusuo.checkpoint.export import export as write
    from qiusuo.checkpoint.open import open_checkpoint
    from qiusuo.terminal import describe_written, show_progress

    checkpoint = open_checkpoint(model)
    with show_progress(out.name) as progress:
        path = write(checkpoint, out, to, dtype, mtp=mtp, progress=progress)
    typer.echo(f"{model} is in {path}{describe_written(path)}")


@app.command()
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help="int8 or int4.")],
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="For int4: text that is like what the model will read (a file, a folder, a "
            "corpus; repeatable), to find which columns matter. The model is loaded for it."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="To read of it.")] = 32768,
) -> None:
    """Write a model in 8 or 4 bits, to run faster and in less memory, without loading it whole."""
    _check_choice(to, ("int8", "int4"))
    if calibrate and to != "int4":
        from qiusuo.checkpoint.files import CheckpointError

        raise CheckpointError(f"--calibrate is for int4: {to} has no use for it")
    from qiusuo.checkpoint.calibration import calibrate_on
    from qiusuo.checkpoint.open import open_checkpoint
    from qiusuo.checkpoint.quantize import check_quantizable, quantize_checkpoint
    from qiusuo.terminal import show_progress, show_quantized

    checkpoint = open_checkpoint(model)
    check_quantizable(checkpoint, out, to)
    calibration = None
    if calibrate:
        with show_progress("reading") as progress:
            calibration = calibrate_on(checkpoint, calibrate, calibration_tokens, progress)
    with show_progress(out.name) as progress:
        made = quantize_checkpoint(checkpoint, out, to, progress, calibration)
    show_quantized(made)
    if calibration is not None:
        typer.echo(f"Calibrated on {calibration.tokens:,} tokens of {', '.join(calibrate or ())}")
    typer.echo(f"{model} is in {out}")


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="As for `chat`; without it, only which kernels compute here."),
    ] = None,
) -> None:
    """Examine a checkpoint: is it whole, does it fit together, does it run, and on what?"""
    from qiusuo.terminal import show_examination

    if not show_examination(model):
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A model, a run, a .gguf file, a config.json or a recipe.")
    ],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context to plan for.")
    ] = None,
) -> None:
    """Say what a model costs: parameters, active parameters, cache and memory, without weights."""
    from qiusuo.terminal import show_cost

    show_cost(model, context)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw the run's report.html anew."""
    from qiusuo.runs.folder import RunFolder
    from qiusuo.runs.report import write_report

    RunFolder.open(run, lock=False)  # refuses what is no run
    typer.echo(write_report(run))


def main() -> None:
    """Errors that a user can mend are one message; anything else keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter shows a "?"
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as error:
        if not isinstance(error, mendable()):
            raise
        complain(error)
        sys.exit(1)


def complain(error: Exception) -> None:
    """Say what a person can mend in one message. Of several processes that train, another says what
    they all met or what stopped it."""
    from qiusuo.terminal import without_controls

    rank = os.environ.get("RANK", "0")
    if rank != "0":
        from qiusuo.training.parallel.world import ElsewhereError
        from qiusuo.training.scene import TrainingError

        if isinstance(error, ElsewhereError | TrainingError):
            return
    place = "" if rank == "0" else f" (process {rank})"
    print(f"qiusuo{place}: {without_controls(str(error))}", file=sys.stderr, flush=True)


MENDABLE = {
    "qiusuo.checkpoint.files": "CheckpointError",
    "qiusuo.data.errors": "DataError",
    "qiusuo.evaluation.answers": "EvaluationError",
    "qiusuo.kernels.native": "KernelError",
    "qiusuo.model.checks": "ConfigError",
    "qiusuo.runs.durable": "RunError",
    "qiusuo.server.failure": "ServerError",
    "qiusuo.tasks.task": "TaskError",
    "qiusuo.training.layout": "PlanError",
    "qiusuo.training.parallel.world": "ElsewhereError",
    "qiusuo.training.recipe": "RecipeError",
    "qiusuo.training.scene": "TrainingError",
}


def mendable() -> tuple[type[Exception], ...]:
    """Errors that a user can mend. One was only raised where its module is loaded: to load them all
    for a message would take seconds."""
    loaded = ((sys.modules.get(module), name) for module, name in MENDABLE.items())
    return (OSError, *(getattr(module, name) for module, name in loaded if module is not None))


def _check_choice(value: str | None, choices: tuple[str, ...], of: str = "") -> None:
    """Refuse a word that is none of the choices before anything heavy is loaded."""
    if value is not None and value not in choices:
        from qiusuo.checkpoint.files import CheckpointError

        raise CheckpointError(f"{of}{value!r} is not one of {', '.join(choices)}")
