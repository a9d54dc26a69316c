"""Several processes begin with the numbers of one and write its model, bit for bit, and none has
room for more than its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface, write_huggingface
from qiusuo.checkpoint.load import Held, as_checkpoint, fill_held, load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.stored import Checkpoint
from qiusuo.checkpoint.tensors import EMBEDDING, HEAD, copies
from qiusuo.model.transformer import Transformer
from qiusuo.training.beginning import build_model
from qiusuo.training.parallel.launch import launch
from qiusuo.training.parallel.matrices import own_part
from qiusuo.training.parallel.world import ElsewhereError, Several, join_world
from qiusuo.training.parallel.writing import brought_together
from qiusuo.training.recipe import Recipe
from tests.model.shapes import tiny_model
from tests.training import lives, tasks

SHAPES: dict[str, dict[str, Any]] = {
    "deepseek": {"num_nextn_predict_layers": 1},
    "tied": {"num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
}
VOCABULARY = 67  # rows that no number of processes shares evenly


class _Words:
    """As much of a tokenizer as a model's config asks for."""

    vocab_size, bos_id, eos_id = VOCABULARY, 0, 1


def begin_and_end(recipes: list[Recipe], expert_parallel: bool, folder: Path) -> int:
    """In one of several processes: what each recipe begins with is what one process would begin
    with, and this one has no room for more than its part. What they write is what one would."""
    with join_world("cpu", expert_parallel) as (world, device):
        assert isinstance(world, Several)
        for recipe in recipes:
            words: Any = _Words()
            alone = build_model(recipe, words, recipe.stages[0].name)
            whole = alone.state_dict()
            model = build_model(recipe, words, recipe.stages[0].name, device, world)
            assert model.training
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == (
                model.config.tie_word_embeddings
            )
            held = model.state_dict()
            assert held.keys() == whole.keys()
            for name, own in held.items():
                assert isinstance(own, DTensor) != name.endswith("correction_bias"), name
                together = own.full_tensor() if isinstance(own, DTensor) else own
                assert torch.equal(together, whole[name]), name
                rows = -(-len(own) // world.size) if isinstance(own, DTensor) else len(own)
                room = own_part(own).untyped_storage().nbytes()
                assert room <= rows * own[:1].numel() * own.element_size(), name
            with world.together():
                assert_written_alike(model, alone, world, folder)
            with pytest.raises((OSError, ElsewhereError), match="the disk is full"):
                give_up(model, world)
    return 0


def assert_written_alike(model: Any, alone: Transformer, world: Several, folder: Path) -> None:
    with brought_together(model, world) as tensors:
        if world.leads:
            checkpoint = as_checkpoint(model.config, tensors, None, {})
            write_huggingface(checkpoint, folder / "several", "BF16")
            save_huggingface(alone, folder / "one", dtype=torch.bfloat16)
            mine, theirs = (folder / who / "model.safetensors" for who in ("several", "one"))
            assert mine.read_bytes() == theirs.read_bytes()


def give_up(model: Transformer, world: Several) -> None:
    """In the middle of a tensor: the others must not wait for the next question."""
    with world.together(), brought_together(model, world) as tensors:
        if world.leads:
            tensors[EMBEDDING].rows(1, 3)
            raise OSError("the disk is full")


@pytest.fixture
def recipes(tmp_path: Path) -> list[Recipe]:
    """With random weights, and from a folder whose norms and router biases are no round numbers."""
    save_huggingface(tiny_model(seed=5, **SHAPES["deepseek"]), tmp_path / "base")
    few = {"tie_word_embeddings": True, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    return [
        lives.recipe_for("no corpus"),
        lives.recipe_for("no corpus", model=few),
        tasks.recipe(tasks.sft(), base=tmp_path / "base"),
    ]


@pytest.mark.parametrize(
    ("count", "expert_parallel"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.long),
        pytest.param(3, False, marks=pytest.mark.long),
        pytest.param(4, False, marks=pytest.mark.long),
        pytest.param(4, True, marks=pytest.mark.long),
    ],
)
def test_all_begin_and_end_with_the_numbers_of_one(
    recipes: list[Recipe], count: int, expert_parallel: bool, tmp_path: Path
) -> None:
    assert launch(count, begin_and_end, recipes, expert_parallel, tmp_path, tell=print) == 0


# -- a checkpoint, read in parts ----------------------------------------------------------------


@pytest.fixture(params=SHAPES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    model = tiny_model(seed=3, vocab_size=VOCABULARY, **SHAPES[request.param])
    save_huggingface(model, tmp_path / "m", dtype=torch.float32)
    return open_checkpoint(str(tmp_path / "m"))


def cut(model: Transformer, size: int, rank: int) -> dict[str, Held]:
    """Room for one part of each tensor, as ``Tensor.chunk`` deals them out."""
    found = {}
    for name, tensor in model.state_dict().items():
        chunks = tensor.chunk(size)
        own = chunks[rank] if rank < len(chunks) else tensor[:0]
        first = sum(len(chunk) for chunk in chunks[:rank])
        found[name] = Held(torch.full_like(own, torch.nan), first)
    if model.config.tie_word_embeddings:
        found[HEAD] = found[EMBEDDING]
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_parts_of_a_checkpoint_make_the_whole(
    saved: Checkpoint, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are more processes than experts, and pieces of a tensor of few rows."""
    monkeypatch.setattr("qiusuo.checkpoint.stored.CHUNK_BYTES", 1500)
    whole = load_model(saved)
    parts = [cut(whole, size, rank) for rank in range(size)]
    for part in parts:
        fill_held(saved, part)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(torch.cat([part[name].tensor for part in parts]), tensor), name


def test_no_more_is_read_than_is_held(saved: Checkpoint) -> None:
    """But for what must be compared: copies of embedding and head."""
    rows: list[int] = []

    class Watched:
        def __init__(self, tensor: Any) -> None:
            self.tensor, self.shape = tensor, tensor.shape
            self.kind, self.place = tensor.kind, tensor.place

        def rows(self, start: int, stop: int) -> Tensor:
            found: Tensor = self.tensor.rows(start, stop)
            rows.append(found.numel())
            return found

    compared = {EMBEDDING, HEAD, *copies(saved.config)}
    watched = {name: Watched(tensor) for name, tensor in saved.tensors.items()}
    tensors = {n: saved.tensors[n] if n in compared else watched[n] for n in watched}
    part = cut(load_model(saved), 4, 2)
    fill_held(replace(saved, tensors=tensors), part)  # type: ignore[arg-type]
    assert sum(rows) == sum(h.tensor.numel() for n, h in part.items() if n not in compared)


def test_too_little_memory_is_said_before_anything_is_read(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(saved)
    monkeypatch.setattr("qiusuo.checkpoint.load.available_memory", lambda: 1000)
    with pytest.raises(CheckpointError, match=r"needs .* of memory in float32"):
        fill_held(saved, cut(whole, 2, 0))
