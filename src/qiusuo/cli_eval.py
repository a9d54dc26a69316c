"""`qiusuo eval`: words for a measurement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qiusuo.engine.language_model import LanguageModel


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="A model folder, a run, a .gguf file or a pulled name; or --url."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task's name or .py file, with difficulties: chains:4-5 (repeatable)."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Bits per character of this file or folder (repeatable)."),
    ] = None,
    count: Annotated[int, typer.Option(help="Problems of each task, over its difficulties.")] = 500,
    samples: Annotated[int, typer.Option(help="Of each problem, for pass@k; 0: greedy only.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    ask: Annotated[
        str | None,
        typer.Option(
            help="prompt (bare) or question (in words); without it prompt where the model knows "
            "characters only, those of the task among them."
        ),
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Ask for a thought first, or for none; without it a model here is asked for one, "
            "a server does as it likes.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    seed: Annotated[int, typer.Option(help="Of problems, draws and intervals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server: http://localhost:8000/v1.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="QIUSUO_API_KEY", help="For the server.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model's name on the server; not needed if it has one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; without it: as it was saved.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Hold the weights in int8 or int4.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="int8: keep a context in about half the memory of bfloat16.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps ...")] = "cpu",
) -> None:
    """Measure a model: accuracy and pass@k on tasks, bits per character of texts."""
    from qiusuo.evaluation.answers import EvaluationError
    from qiusuo.evaluation.command import Load, Server, Settings, run
    from qiusuo.evaluation.plan import read_asked_task

    if (model is None) == (url is None):
        raise EvaluationError("give a MODEL, or --url of a server that has it: one of the two")
    if ask not in (None, "prompt", "question"):
        raise EvaluationError(f"--ask is prompt or question, not {ask!r}")
    settings = Settings(
        count=count,
        samples=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        ask=ask,  # type: ignore[arg-type]
        thinking=thinking,
        system=system,
    )
    subject: Server | Load
    if model is None:
        assert url is not None
        subject, name = Server(url, model_name, key), model_name or url
    else:
        subject, name = partial(_load, model, dtype, device, quantize, cache), model
    run(subject, name, [read_asked_task(one) for one in task or []], text or [], settings, out)


def _load(
    model: str, dtype: str | None, device: str, quantize: str | None, cache: str | None
) -> LanguageModel:
    from qiusuo.engine.loading import load
    from qiusuo.evaluation.command import MANY
    from qiusuo.terminal import show_progress

    with show_progress(f"loading {model}") as progress:
        return load(model, dtype, device, progress, MANY, quantize=quantize, cache=cache)
