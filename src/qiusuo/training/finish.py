"""What a finished run leaves behind: the model, the facts about it, its card and its report."""

from __future__ import annotations

from typing import Any

import torch

from qiusuo.checkpoint.huggingface import write_huggingface
from qiusuo.checkpoint.stored import KINDS
from qiusuo.data.catalogue import catalogue
from qiusuo.data.corpora import open_corpus
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.cost import measure
from qiusuo.model.transformer import Transformer
from qiusuo.runs.card import write_model_card
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import FollowedRun, RunFolder
from qiusuo.runs.report import write_report
from qiusuo.runs.summary import write_summary
from qiusuo.training.given_tasks import stage_tasks
from qiusuo.training.recipe import Recipe
from qiusuo.training.scene import StageWork
from qiusuo.training.sections import SamplesSection
from qiusuo.training.stages import PretrainStage, Stage
from qiusuo.training.state import StageState
from qiusuo.training.validation import Validation

CACHE_BYTES = 2  # the cache of a served model is bf16


def write_model(
    run: RunFolder, recipe: Recipe, stage: Stage, state: StageState, tokenizer: Tokenizer
) -> None:
    """Write the model of a run whose last stage is done: by all processes together."""
    samples = getattr(stage, "samples", SamplesSection())
    sampling = {"temperature": samples.temperature, "top_p": samples.top_p}
    with state.stored(tokenizer, sampling) as checkpoint:
        if checkpoint is not None:
            write_huggingface(checkpoint, run.model_path, KINDS[_saved_dtype(recipe)])


def _saved_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.save_dtype == "bfloat16" else torch.float32


def finish_run(run: RunFolder, recipe: Recipe, stage: Stage, work: StageWork) -> str | None:
    """Write adapter, summary, card and report beside the model. Returns the reason where there is
    no report."""
    state = work.state
    validation: Validation | None = getattr(work, "last_validation", None)
    if state.adapter is not None and recipe.base is not None:  # beside it, for others to merge
        state.adapter.save(run.path / "adapter", recipe.base, _saved_dtype(recipe))
    write_summary(run.path, facts(recipe, state, validation))
    run.set_status("finished", stage=stage.name, step=state.run_step, steps=state.run_step)
    write_model_card(run.path, run.model_path)
    return draw_report(run)


def draw_report(run: RunFolder) -> str | None:
    """Draw report.html; the reason where it cannot be drawn. Not beside another who writes."""
    if isinstance(run, FollowedRun):
        return None
    try:
        write_report(run.path)
    except RunError as error:
        return str(error)
    return None


def mend_papers(run: RunFolder) -> None:
    """Write the card and the report of a finished run that was killed before it had them."""
    if isinstance(run, FollowedRun):
        return
    if not run.card_path.exists():
        write_model_card(run.path, run.model_path)
    if not run.report_path.exists():
        draw_report(run)


def facts(recipe: Recipe, state: StageState, validation: Validation | None) -> dict[str, Any]:
    """The table of a run, label to value with its unit."""
    cost = measure(state.model.config)
    latent, expanded = cost.cache_elements, cost.expanded_cache_elements
    table: dict[str, Any] = {
        "Parameters": cost.parameters + cost.mtp_parameters,
        "Active parameters": cost.active,
        "Tokens seen": state.tokens,
        "Training time": {"value": round(state.seconds, 1), "unit": "s"},
    }
    if validation is not None:
        table |= _measured(state.model, validation)
    table["Cache per token"] = {"value": latent * CACHE_BYTES, "unit": "bytes in bf16"}
    table["Cache per token, every head its own"] = {
        "value": expanded * CACHE_BYTES,
        "unit": "bytes in bf16",
    }
    table["Cache saved by sharing"] = {"value": round(expanded / latent, 1), "unit": "times"}
    table["License"] = recipe.license
    if recipe.languages:
        table["Languages"] = list(recipe.languages)
    if recipe.base is not None:
        known = catalogue().get(recipe.base)
        table["Base"] = recipe.base + (f" ({known.licence})" if known is not None else "")
    table["Data"] = [
        {"name": corpus.name, "license": corpus.licence, "source": corpus.source}
        for corpus in map(open_corpus, _corpora(recipe))
    ]
    return table


def _corpora(recipe: Recipe) -> list[str]:
    """Every corpus that is learnt from, or that problems are made of, each once."""
    learnt = [
        entry.source
        for stage in recipe.stages
        if isinstance(stage, PretrainStage)
        for entry in stage.data.corpora
    ]
    entries = [entry for stage in recipe.stages for entry in stage_tasks(stage)]
    entries += [*recipe.evaluation.tasks, *recipe.evaluation.answers]
    return list(dict.fromkeys([*learnt, *(entry.corpus for entry in entries if entry.corpus)]))


def _measured(model: Transformer, validation: Validation) -> dict[str, Any]:
    table: dict[str, Any] = {
        "Validation loss": {"value": round(validation.loss, 4), "unit": "nats per token"},
        "Validation": {
            "value": round(validation.bits_per_character, 4),
            "unit": "bits per character",
        },
        "Validation tokens": validation.tokens,
    }
    if validation.load.counts:
        worst = max(validation.load.max_violation().values())
        table["Busiest expert above its share"] = {"value": round(100 * worst), "unit": "%"}
    for depth, agreement in enumerate(validation.mtp_agreement):
        which = f" (module {depth + 1})" if len(validation.mtp_agreement) > 1 else ""
        table[f"MTP agreement{which}"] = {"value": round(100 * agreement, 1), "unit": "%"}
    return table
