"""What several processes can train together; the rest is refused before anything is begun."""

from __future__ import annotations

from collections.abc import Iterable

from qiusuo.training.recipe import Recipe, RecipeError
from qiusuo.training.stages import PretrainStage, SftStage, Stage


def check_shared(recipe: Recipe, stages: Iterable[Stage], processes: int) -> None:
    """RecipeError where these stages cannot be lived by so many processes."""
    if processes == 1:
        return
    if recipe.adapter is not None:
        raise RecipeError(
            f"an adapter ({recipe.adapter.kind}) trains in one process, not in {processes}: leave "
            "--nproc out"
        )
    for stage in stages:
        if not isinstance(stage, PretrainStage | SftStage):
            raise RecipeError(
                f"stage {stage.name} is of kind {stage.kind}, which trains in one process, not in "
                f"{processes}: live the stages before it with --stage, then go on without --nproc"
            )
        if stage.batch_size % processes:
            raise RecipeError(
                f"stage {stage.name}: {processes} processes cannot share batch_size "
                f"{stage.batch_size} evenly: make it a multiple of {processes}"
            )
        if stage.compile:
            raise RecipeError(f"stage {stage.name}: compile = true needs one process: take it out")
