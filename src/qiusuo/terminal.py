"""What the commands show in a terminal: tables of facts, costs and downloads."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qiusuo.runs.words import format_bytes, format_fact

HIDDEN_FACTS = ("License", "Languages", "Data", "Limits")  # for the card, not for the table


def facts_table(summary: dict[str, Any]) -> Table:
    """A run's summary."""
    table = _plain_table()
    for label, value in summary.items():
        if label not in HIDDEN_FACTS:
            table.add_row(label, format_fact(value))
    return table


def show_cost(model: str, context: int | None) -> None:
    """Parameters, cache and memory of a model folder, a config.json or a recipe; no weights."""
    from qiusuo.model.cost import BYTES_PER_WEIGHT, available_memory, measure

    config = _find_config(model)
    cost = measure(config)
    context = context or config.max_position_embeddings
    table = _plain_table()
    table.add_row("Parameters", f"{cost.parameters:,}")
    if cost.mtp_parameters:
        table.add_row("MTP parameters", f"{cost.mtp_parameters:,}")
    table.add_row("Active per token", f"{cost.active:,} ({cost.active / cost.parameters:.1%})")
    latent, expanded = 2 * cost.cache_elements, 2 * cost.expanded_cache_elements
    layers = config.num_hidden_layers
    table.add_row(
        "Cache per token and layer",
        f"{config.cache_width} elements (expanded keys and values: "
        f"{cost.expanded_cache_elements // layers:,})",
    )
    table.add_row(
        "Cache per token",
        f"{format_bytes(latent)} in bf16 (expanded: {format_bytes(expanded)}, "
        f"{expanded / latent:.1f} times)",
    )
    cache = latent * context
    table.add_row(f"Cache of {context:,} tokens", format_bytes(cache))
    free = available_memory()
    for precision in BYTES_PER_WEIGHT:
        need = cost.weight_bytes(precision) + cache
        verdict = "fits" if need < free else "does not fit"
        table.add_row(f"Memory in {precision}", f"{format_bytes(need)}: {verdict}")
    console = Console()
    console.print(table)
    smallest = min(map(cost.weight_bytes, BYTES_PER_WEIGHT)) + cache
    here = f"{format_bytes(free)} free on this machine."
    if smallest >= free:
        here += " It cannot hold this model at any of these precisions."
    console.print(here, soft_wrap=True)


@contextmanager
def show_download(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with speed and time left; gives what ``pull`` calls with (done, total)."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def _find_config(model: str) -> Any:
    from qiusuo.model.checks import ConfigError
    from qiusuo.model.families import config_from_file
    from qiusuo.training.recipe import built_in_recipes, read_recipe

    path = Path(model)
    if not path.exists() and model not in built_in_recipes() and path.suffix != ".toml":
        near = difflib.get_close_matches(model, built_in_recipes(), 1)
        raise ConfigError(
            f"{path} is not there: expected a model folder, a run folder, a config.json or a recipe"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if path.suffix == ".toml" or (not path.exists() and model in built_in_recipes()):
        recipe = read_recipe(model)
        if recipe.tokenizer.kind != "bpe":
            print("The vocabulary comes with the tokenizer; counted here with 4,096 tokens.")
        return recipe.model_for(recipe.tokenizer.vocab_size)
    if (path / "model" / "config.json").is_file():
        path = path / "model"
    return config_from_file(path)
