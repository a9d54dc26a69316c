"""The first ten minutes: train the built-in recipe, then read what the model writes.

A second call goes on with the finished run: it loads the model, writes again, and takes openings
from the keyboard where there is one.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.loading import load
from qiusuo.runs.folder import RunFolder, read_recipe, read_status
from qiusuo.runs.summary import read_summary
from qiusuo.tasks.task import END_THINK, THINK
from qiusuo.terminal import facts_table, outcomes_table
from qiusuo.training.recipe import Recipe, parse_recipe
from qiusuo.training.stages import PretrainStage
from qiusuo.training.train import resume_run, start_run, train


def quickstart(recipe: Recipe, path: Path, device: str = "cpu") -> bool:
    """Train, or go on with what is at ``path``, by its own recipe. False where interrupted."""
    console = Console()
    state = read_status(path).get("state") if path.exists() else None
    if state == "finished":
        recipe = parse_recipe(read_recipe(path), where=str(path))
        console.print(f"Going on with the finished run in {path} (--fresh or FRESH=1 trains anew).")
    else:
        recipe, run = _open(recipe, path, console)
        with run:
            if not train(recipe, run, device=device):
                return False
    lm = load(path)
    _write(lm, recipe, console)
    console.print(facts_table(read_summary(path)))
    if (table := outcomes_table(path)) is not None:
        console.print()
        console.print(table)
        console.print()
    console.print(f"Run folder   {path}", soft_wrap=True)
    if (path / "report.html").is_file():
        console.print(f"Report       {path / 'report.html'}", soft_wrap=True)
    if state == "finished" and sys.stdin.isatty():
        _converse(lm, recipe, console)
    return True


def is_recipe_of(path: Path, recipe: Recipe) -> bool:
    """Whether the run at ``path`` has this very recipe, or there is none yet."""
    return not (path / "recipe.toml").is_file() or recipe == parse_recipe(read_recipe(path))


def _open(recipe: Recipe, path: Path, console: Console) -> tuple[Recipe, RunFolder]:
    if (path / "recipe.toml").is_file():
        console.print(
            f"Going on with the unfinished run in {path} (--fresh or FRESH=1 starts over)."
        )
        return resume_run(path)
    return recipe, start_run(recipe, path)


def remove_run(path: Path) -> None:
    """Only ever a run folder: anything else in the way is an error of ``RunFolder``."""
    RunFolder.open(path).close()
    shutil.rmtree(path)


def _write(lm: LanguageModel, recipe: Recipe, console: Console, **more: Any) -> None:
    samples = next((s.samples for s in recipe.stages if isinstance(s, PretrainStage)), None)
    if samples is None:
        return
    prompts = more.get("prompts") or list(samples.prompts)
    completions = lm.generate(
        prompts,
        max_tokens=samples.max_tokens,
        temperature=samples.temperature,
        top_p=samples.top_p,
        seed=time.time_ns() % 2**32,
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        written = completion.text
        for tag in (THINK, END_THINK):  # marks for programs; what stands between them stays
            written = written.replace(tag, "")
        console.print(f"[bold]{_escape(prompt)}[/bold]{_escape(written)}", end="\n\n")


def _converse(lm: LanguageModel, recipe: Recipe, console: Console) -> None:
    console.print("Give an opening and the model goes on (empty line or Ctrl-D ends).")
    while True:
        try:
            opening = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not opening:
            return
        _write(lm, recipe, console, prompts=[opening])


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
