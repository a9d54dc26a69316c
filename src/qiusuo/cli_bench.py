"""`qiusuo bench`: words for measurements of this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qiusuo.training.step_profile import StepProfile

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
    from qiusuo.training.recipe import read_recipe
    from qiusuo.training.step_profile import profile_step

    profile = profile_step(read_recipe(recipe, set_), steps, device)
    if out is not None:
        out.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
    show_step(profile)


def show_step(profile: StepProfile) -> None:
    """A training step's parts: their share of the time, and of what the machine could do."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for heading in ("forward", "backward", "share", "GFLOP", "GFLOP/s", "of peak"):
        table.add_column(heading, justify="right")
    timed = sum(part.seconds for part in profile.parts)
    for part in profile.parts:
        rate = part.flops / part.seconds if part.flops else None
        table.add_row(
            part.name,
            f"{part.forward * 1e3:.1f} ms",
            f"{part.backward * 1e3:.1f} ms" if part.backward else "–",
            f"{part.seconds / timed:.0%}",
            f"{part.flops / 1e9:.1f}" if rate else "–",
            f"{rate / 1e9:,.0f}" if rate else "–",
            f"{rate / profile.peak:.0%}" if rate else "–",
        )
    console = Console()
    console.print(table)
    rate = profile.flops / profile.seconds
    console.print(
        f"\nA step of {profile.tokens:,} tokens in {profile.precision}: "
        f"{profile.seconds * 1e3:.1f} ms ({timed * 1e3:.1f} with the clocks above), "
        f"{profile.tokens / profile.seconds:,.0f} tokens/s, {rate / 1e9:,.0f} GFLOP/s, "
        f"{rate / profile.peak:.0%} of a large matrix product's {profile.peak / 1e9:,.0f}",
        highlight=False,
    )
