"""`qiusuo eval`: from what was asked to results on the screen and in a file.

Everything that can be refused is refused before a model is loaded. The file is written anew after
each task and text, so what an interruption leaves is whole, and says that it is not complete.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qiusuo.data.atomic import write_file
from qiusuo.data.documents import document_files, read_documents
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.evaluation.answers import (
    Answerer,
    EvaluationError,
    ModelAnswerer,
    check_model,
    default_ask,
)
from qiusuo.evaluation.asking import Ask, Asker
from qiusuo.evaluation.bits import Bits, bits_per_character
from qiusuo.evaluation.evaluate import Score, check_settings, evaluate
from qiusuo.evaluation.plan import AskedTask
from qiusuo.evaluation.server_answers import ServerAnswerer
from qiusuo.evaluation.table import bits_line, faults_line, score_table
from qiusuo.version import __version__

MANY = Limits(max_running=256, step_tokens=2048)  # throughput counts, no one waits for a first word

FILE_WIDTH = 160  # of a table that goes into a file or a pipe, which has none of its own


@dataclass(frozen=True)
class Server:
    """Where a server is, and who asks."""

    url: str
    model: str | None
    key: str | None


@dataclass(frozen=True)
class Settings:
    """What holds for every task. ``ask`` None: by task and tokenizer (``default_ask``).
    ``thinking`` None: asked for from a model here, left to a server."""

    count: int
    samples: int
    temperature: float
    max_tokens: int
    seed: int
    ask: Ask | None
    thinking: bool | None
    system: str | None

    def check(self) -> None:
        check_settings(self.count, self.samples, self.temperature, self.max_tokens, self.seed)


Load = Callable[[], LanguageModel]


def run(
    subject: Server | Load,
    name: str,
    tasks: Sequence[AskedTask],
    texts: Sequence[Path],
    settings: Settings,
    out: Path | None,
) -> dict[str, Any]:
    """Measure, show and write; the results as the file holds them. ``name``: the model's, for the
    record."""
    settings.check()
    _check_texts(subject, texts)
    if not tasks and not texts:
        raise EvaluationError("nothing to measure: give --task or --text")
    if out is not None:
        _check_out(out)
    lm = None if isinstance(subject, Server) else subject()
    results: dict[str, Any] = {
        "qiusuo": __version__,
        "model": name,
        "settings": vars(settings),
        "complete": False,
        "asked": {},
        "scores": [],
        "texts": {},
    }
    scores: list[Score] = []
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    try:
        for asked in tasks:
            answerer = _answerer(subject, lm, name, asked, settings)
            results["asked"][asked.task.name] = answerer.describe()
            for score in _scores(answerer, asked, settings):
                scores.append(score)
                results["scores"].append(score.record())
                _write(out, results)
        for text in texts:
            assert lm is not None
            bits = _bits(lm, text, settings.seed)
            results["texts"][str(text)] = bits.record()
            _write(out, results)
            console.print(bits_line(text.name, bits), markup=False, soft_wrap=True)
        results["complete"] = True
        _write(out, results)
    finally:  # whatever ended it, what there is is shown
        _show(console, scores, results, settings)
    return results


def _scores(answerer: Answerer, asked: AskedTask, settings: Settings) -> Iterator[Score]:
    with _bar(asked.task.name) as step:
        total = settings.count * (1 + settings.samples)
        yield from evaluate(
            answerer,
            asked.task,
            asked.difficulties,
            count=settings.count,
            samples=settings.samples,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            progress=lambda more: step(more, total),
        )


def _bits(lm: LanguageModel, text: Path, seed: int) -> Bits:
    before = 0

    def heard(done: int, total: int) -> None:
        nonlocal before
        step(done - before, total)
        before = done

    with _bar(text.name) as step:
        return bits_per_character(lm, read_documents(text), seed=seed, progress=heard)


def _answerer(
    subject: Server | Load,
    lm: LanguageModel | None,
    name: str,
    asked: AskedTask,
    settings: Settings,
) -> Answerer:
    if isinstance(subject, Server):
        return ServerAnswerer(
            subject.url,
            subject.model,
            subject.key,
            ask=settings.ask or "question",
            system=settings.system,
            thinking=settings.thinking,
        )
    assert lm is not None
    tokenizer = check_model(lm, name)
    ask = settings.ask or default_ask(asked.task, tokenizer)
    thinking = settings.thinking is not False
    return ModelAnswerer(lm, Asker(tokenizer, ask, thinking, settings.system))


def _check_texts(subject: Server | Load, texts: Sequence[Path]) -> None:
    if texts and isinstance(subject, Server):
        raise EvaluationError(
            "--text needs the model here: a server does not give what a text's bits are made of"
        )
    for text in texts:
        document_files(text)  # refuses what cannot be read


def _check_out(out: Path) -> None:
    if out.is_dir() or not out.parent.is_dir():
        raise EvaluationError(f"cannot write {out}: it is a folder, or is to be in one that is not")


def _write(out: Path | None, results: dict[str, Any]) -> None:
    if out is not None:
        text = json.dumps(results, ensure_ascii=False, indent=1) + "\n"
        write_file(out, text.encode())


def _show(
    console: Console, scores: Sequence[Score], results: dict[str, Any], settings: Settings
) -> None:
    if not scores:
        return
    console.print(score_table(scores))
    last = {score.task: score for score in scores}  # of several difficulties, all together
    for line in filter(None, map(faults_line, last.values())):
        console.print(line, markup=False, soft_wrap=True)
    for task, asked in results["asked"].items():
        told = ", ".join(f"{key} {value!r}" for key, value in asked.items() if value is not None)
        console.print(f"{task} was asked with {told}", markup=False, soft_wrap=True)
    samples = (
        f"; {settings.samples} samples each at temperature {settings.temperature:g}"
        if settings.samples
        else ""
    )
    console.print(f"held-out problems, seed {settings.seed}{samples}", soft_wrap=True)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, for what calls it with (more, all); only on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=None)

        def step(more: int, total: int) -> None:
            bar.update(task, advance=more, total=total)

        yield step
