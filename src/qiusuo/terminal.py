"""What the commands show in a terminal: tables of facts and costs, progress, findings."""

from __future__ import annotations

import difflib
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.data.cache import show_bytes
from qiusuo.runs.log import read_log
from qiusuo.runs.outcomes import accuracy_words, find_outcomes
from qiusuo.runs.words import format_fact

if TYPE_CHECKING:
    from qiusuo.checkpoint.quantize import Made
    from qiusuo.checkpoint.stored import Checkpoint
    from qiusuo.engine.language_model import LanguageModel
    from qiusuo.engine.limits import Limits
    from qiusuo.model.config import ModelConfig

HIDDEN_FACTS = ("License", "Languages", "Data", "Limits")  # for the card, not for the table


def without_controls(text: str) -> str:
    """Line ends and tabs may pass; escape sequences out of a checkpoint, or of what a model says,
    must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def facts_table(summary: dict[str, Any]) -> Table:
    """A run's summary."""
    table = plain_table()
    for label, value in summary.items():
        if label not in HIDDEN_FACTS:
            table.add_row(label, format_fact(value))
    return table


def outcomes_table(run: Path) -> Table | None:
    """Accuracy on held-out problems after each stage of a run; None where none was measured."""
    outcomes = find_outcomes(read_log(run / "log.jsonl"))
    if outcomes is None:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    told = any(cell and "length" in cell for _, cells in outcomes.rows for cell in cells)
    table.add_column("held-out (tokens)" if told else "held-out problems")
    for words, _ in outcomes.columns:
        table.add_column(words, justify="right")
    for name, cells in outcomes.rows:
        table.add_row(name, *map(_accuracy_and_length, cells))
    return table


def _accuracy_and_length(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return ""
    length = cell.get("length")
    return accuracy_words(cell)[0] + ("" if length is None else f" ({length:.0f})")


def show_cost(model: str, context: int | None) -> None:
    """Parameters, cache and memory of a model folder, a config.json or a recipe; no weights."""
    import torch

    from qiusuo.engine.paged_cache import rows_of
    from qiusuo.kernels.cached_rows import row_bytes
    from qiusuo.model.cost import BYTES_PER_WEIGHT, available_memory, measure

    config, checkpoint = find_config(model)
    cost = measure(config)
    context = context or config.max_position_embeddings
    table = plain_table()
    table.add_row("Architecture", f"{config.model_type}, {config.num_hidden_layers} layers")
    if checkpoint is not None:
        kinds = Counter(tensor.kind for tensor in checkpoint.tensors.values())
        stored = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        size = show_bytes(checkpoint.stored_bytes)
        table.add_row("Stored", f"{checkpoint.format}, {size}: {stored} tensors")
        whole = cost.parameters + cost.mtp_parameters
        if checkpoint.low_bit is not None:
            table.add_row("Bits per weight", f"{8 * checkpoint.stored_bytes / whole:.2f}")
    table.add_row("Parameters", f"{cost.parameters:,}")
    if cost.mtp_parameters:
        table.add_row("MTP parameters", f"{cost.mtp_parameters:,}")
    table.add_row("Active per token", f"{cost.active:,} ({cost.active / cost.parameters:.1%})")
    latent, expanded = 2 * cost.cache_elements, 2 * cost.expanded_cache_elements
    layers = config.num_hidden_layers
    in_int8 = layers * row_bytes(rows_of(config, torch.bfloat16, "int8"))
    table.add_row(
        "Cache per token and layer",
        f"{config.cache_width:,} elements (every head's keys and values: "
        f"{cost.expanded_cache_elements // layers:,})",
    )
    table.add_row(
        "Cache per token",
        f"{show_bytes(latent)} in bf16 (every head's: {show_bytes(expanded)}, "
        f"{expanded / latent:.1f} times), {show_bytes(in_int8)} in int8",
    )
    cache = latent * context
    table.add_row(
        f"Cache of {context:,} tokens",
        f"{show_bytes(cache)}, {show_bytes(in_int8 * context)} in int8",
    )
    free = available_memory()
    for precision in BYTES_PER_WEIGHT:
        need = cost.weight_bytes(precision) + cache
        verdict = "fits" if need < free else "does not fit"
        table.add_row(f"Memory in {precision}", f"{show_bytes(need)}: {verdict}")
    console = Console()
    console.print(table)
    smallest = min(map(cost.weight_bytes, BYTES_PER_WEIGHT)) + cache
    here = f"{show_bytes(free)} free on this machine."
    if smallest >= free:
        here += " It cannot hold this model at any of these precisions."
    console.print(here, soft_wrap=True)


@contextmanager
def show_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with speed and time left, for what calls it with (done, total) bytes: drawn
    from the first call on, gone when all is done, and only on a terminal."""
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
    # Redirected, what is printed meanwhile would go where the bar is: right on one terminal alone.
    redirect = sys.stdout.isatty()
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=redirect,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def show_catalogue() -> None:
    """What can be pulled by name."""
    from qiusuo.data.catalogue import catalogue

    for entry in catalogue().values():
        print(f"{entry.name:22} {entry.kind:7} {entry.summary} ({entry.licence})")


def describe_written(path: Path) -> str:
    """What an export has made: size and types of numbers."""
    from qiusuo.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(path)
    kinds = Counter(tensor.kind for tensor in checkpoint.tensors.values())
    stored = ", ".join(kind for kind, _ in kinds.most_common())
    return f": {show_bytes(checkpoint.stored_bytes)} of {stored}"


def show_quantized(made: Made) -> None:
    """What quantising saved and lost, by kind of tensor."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("numbers", "before", "after", "bits each", "largest error"):
        table.add_column(title, justify="right")
    whole = made.whole
    for kind, group in (*made.groups.items(), ("all", whole)):
        row = kind, f"{group.numbers:,}", show_bytes(group.before), show_bytes(group.after)
        worst = f"{group.error:.2%}" if group.error else "none"
        table.add_row(*row, f"{8 * group.after / group.numbers:.2f}", worst)
    console = Console()
    console.print(table)
    if whole.worst:  # on a line of its own: a name is half as wide as a terminal
        console.print(f"The largest error is that of {whole.worst}", soft_wrap=True)


def load_shown(
    model: str,
    dtype: str | None,
    device: str,
    limits: Limits,
    draft: str,
    quantize: str | None,
    cache: str | None,
) -> LanguageModel:
    """Load a model to talk with, with a progress bar."""
    from qiusuo.engine.loading import load

    with show_progress(f"loading {model}") as progress:
        loaded = load(model, dtype, device, progress, limits, draft, quantize, cache)
    if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
        raise CheckpointError(
            f"{model} has no chat template: it is a base model, which continues texts; in "
            f"Python: qiusuo.load({model!r}).generate([text])"
        )
    return loaded


def show_examination(model: str | None) -> bool:
    """Print the findings of an examination as they come, and its verdict; False for a fault.
    Without a model: only what computes on this machine."""
    from qiusuo.doctor import Examination, Finding, Mark, examine, kernels_in_use

    console = Console(highlight=False)
    signs = {Mark.GOOD: "[green]✓[/green]", Mark.REMARK: "[yellow]![/yellow]"}

    def show(found: Finding) -> None:
        sign = signs.get(found.mark, "[red]✗[/red]")
        text = escape(without_controls(f"{found.subject}: {found.text}"))
        console.print(f"{sign} {text}", soft_wrap=True)

    kernels = kernels_in_use()
    if model is None:
        show(kernels)
        return True
    with show_progress(model) as progress:
        examination = Examination(model, progress)
        for found in examine(examination):
            show(found)
    show(kernels)
    console.print(f"\n{escape(without_controls(examination.verdict()))}", soft_wrap=True)
    return not examination.faults


def plain_table() -> Table:
    """Two columns, a bold label and what it says."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def find_config(model: str) -> tuple[ModelConfig, Checkpoint | None]:
    """The config that ``model`` names; with the checkpoint, where there are weights."""
    from qiusuo.checkpoint.open import find_model, open_checkpoint
    from qiusuo.model.families import config_from_file
    from qiusuo.training.recipe import built_in_recipes, read_recipe

    path = Path(model)
    if path.suffix == ".toml" or (not path.exists() and model in built_in_recipes()):
        recipe = read_recipe(model)
        if recipe.tokenizer.kind != "bpe":
            print("The vocabulary comes with the tokenizer; counted here with 4,096 tokens.")
        return recipe.model_for(recipe.tokenizer.vocab_size), None
    if path.name == "config.json":
        return config_from_file(path), None
    try:
        place = find_model(model)
    except CheckpointError as error:
        recipes = built_in_recipes()
        near = difflib.get_close_matches(model, recipes, 1)
        hint = f"; a config.json or a recipe does too: {', '.join(recipes)}, or a .toml file"
        if near:
            hint = f"; did you mean the recipe {near[0]!r}?"
        if path.exists():
            hint = ""
        raise CheckpointError(f"{error}{hint}") from error
    weightless = place.is_dir() and not any(place.glob("*.safetensors*"))
    if weightless:
        return config_from_file(place), None
    checkpoint = open_checkpoint(place)
    return checkpoint.config, checkpoint
