"""A recipe so small that a whole life takes a second, and ways to live it in other processes."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.runs.toml import dump_toml
from qiusuo.training.beginning import attach_adapter, build_model
from qiusuo.training.life import StageLife
from qiusuo.training.recipe import Recipe, parse_recipe
from qiusuo.training.scene import Scene
from qiusuo.training.train import resume_run, start_run, train
from qiusuo.training.vocabulary import run_tokenizer

STEPS = 24
OFTEN: dict[str, Any] = {
    "checkpoint_steps": 4,
    "validation_steps": 0,
    "precision": "bfloat16",
}
WORDS = "the road is long 路漫漫 其修远兮 I will search 吾将上下 而求索 high and low ， 。".split()
MODEL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}


def write_corpus(path: Path, documents: int = 300) -> Path:
    """Sentences of few words: something that a tiny model can learn in a few steps."""
    chance = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            words = chance.choices(WORDS, k=chance.randint(8, 30))
            text = f"{number} {' '.join(words)}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def recipe_table(corpus: Path | str, *, model: dict[str, Any] | None = None, **stage: Any) -> Any:
    """The tiny recipe with some keys of its stage and model changed."""
    table: dict[str, Any] = {
        "name": "tiny",
        "tokenizer": {"kind": "characters"},
        "model": MODEL | (model or {}),
        "stages": [
            {
                "kind": "pretrain",
                "steps": STEPS,
                "sequence_length": 16,
                "batch_size": 8,
                "micro_batch_size": 4,
                "precision": "float32",  # a new process compiles bfloat16 products: seconds
                "checkpoint_steps": 8,
                "validation_steps": 8,
                "validation_tokens": 128,
                "data": {"corpora": [{"source": str(corpus)}], "isolate_documents": True},
                "schedule": {"warmup_steps": 3},
                "balance": {"bias_update_speed": 0.01},
                "samples": {"prompts": ["the"], "max_tokens": 6},
                **stage,
            }
        ],
    }
    return copy.deepcopy(table)


def recipe_for(corpus: Path | str, **changes: Any) -> Recipe:
    return parse_recipe(recipe_table(corpus, **changes))


def scene_of(recipe: Recipe, path: Path, stage: str | None = None) -> Scene[Any]:
    """What a stage (the first where none is named) of a new run in a new folder begins with; its
    records are added to the list ``scene.record.__self__``."""
    run = RunFolder.create(path, recipe.model_dump(mode="json"), version="test")
    section = recipe.stages[0] if stage is None else recipe.stage(stage)
    tokenizer = run_tokenizer(recipe, run.path / "tokenizer")
    model = build_model(recipe, tokenizer, section.name)
    adapter = attach_adapter(recipe, model)
    records: list[dict[str, Any]] = []
    return Scene(recipe, section, run, tokenizer, model, adapter, records.append)


def live(recipe: Recipe, path: Path, **how: Any) -> bool:
    """A new run in this process."""
    with start_run(recipe, path) as run:
        return train(recipe, run, **how)


def go_on(path: Path, **how: Any) -> bool:
    """Resume a run in this process."""
    recipe, run = resume_run(path)
    with run:
        return train(recipe, run, **how)


def live_until(recipe: Recipe, path: Path, step: int) -> None:
    """A new run in this process that gets a Ctrl-C in the middle of ``step``."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, step)
        assert not live(recipe, path)


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C as soon as the step is in the log, before it is over."""
    note = StageLife.note

    def note_and_interrupt(self: Any, record: dict[str, Any]) -> None:
        note(self, record)
        if (record["kind"], record["step"]) == ("step", step):
            signal.raise_signal(signal.SIGINT)

    patch.setattr(StageLife, "note", note_and_interrupt)


def write_recipe(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(dump_toml(table), encoding="utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    """The command line as a process that any interpreter can start."""
    return [sys.executable, "-m", "qiusuo", *map(str, words)]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"QIUSUO_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_command(home: Path, *words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        env=environment(home),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        **how,
    )


TIMES = re.compile(r"seconds|per_second|peak_share")


def losses(path: Path) -> list[dict[str, Any]]:
    """All that the log tells of every step and look, exactly, but for times and speeds."""
    return [
        {key: value for key, value in record.items() if not TIMES.search(key)}
        for record in read_log(path / "log.jsonl")
    ]


def assert_same_life(path: Path, other: Path) -> None:
    """Every number of every step, every sample, try and trace, and every bit of the weights and
    the state."""
    assert losses(path) == losses(other)
    assert samples(path) == samples(other)
    traces = [f"traces/{file.name}" for file in (other / "traces").glob("*")]
    for file in ("model/model.safetensors", "rollouts.jsonl", *traces):
        assert (path / file).exists() == (other / file).exists(), file
        assert not (other / file).exists() or same_bytes(path / file, other / file), file
    states = [torch.load(last_checkpoint(run) / "state.pt") for run in (path, other)]
    for state in states:
        del state["seconds"]
    assert_equal(*states)
    assert state_of(path) == state_of(other) == "finished"


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def last_checkpoint(path: Path) -> Path:
    latest = RunFolder.open(path, lock=False).latest_checkpoint()
    assert latest is not None
    return latest[1]


def samples(path: Path) -> list[dict[str, Any]]:
    return read_log(path / "samples.jsonl")


def steps_done(path: Path) -> list[int]:
    return [r["step"] for r in read_log(path / "log.jsonl") if r["kind"] == "step"]


def state_of(path: Path) -> str:
    return str(RunFolder.open(path, lock=False).status()["state"])
