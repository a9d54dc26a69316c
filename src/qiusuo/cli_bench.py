"""`qiusuo bench`: words for measurements of this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Measure this machine.")


@bench.callback()
def _root() -> None:
    """What holds for all of them."""


@bench.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's path or built-in name.")] = "quickstart",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key: --set stages.pretrain.batch_size=8."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of which the median counts.")] = 10,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Where the time of a training step goes: a recipe's model on random tokens, part by part,
    against the rate of a large matrix product."""
    from qiusuo.terminal import show_step
    from qiusuo.training.recipe import read_recipe
    from qiusuo.training.step_profile import profile_step

    profile = profile_step(read_recipe(recipe, set_), steps, device)
    if out is not None:
        out.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
    show_step(profile)
