"""Distillation: distributions on disk, the losses in plain torch, teachers of many kinds."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qiusuo.checkpoint.load import load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.data.errors import DataError
from qiusuo.model.transformer import Transformer
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.training.beginning import attach_adapter, build_model, last_state, state_at_end
from qiusuo.training.distil import Distilling
from qiusuo.training.distil_on_policy import OnPolicy
from qiusuo.training.distributions import (
    About,
    Distributions,
    TaughtExample,
    write_index,
    write_shard,
)
from qiusuo.training.life import StageLife
from qiusuo.training.named_models import named_model
from qiusuo.training.recipe import Recipe, RecipeError, parse_recipe
from qiusuo.training.scene import Scene
from qiusuo.training.state import take_weights
from qiusuo.training.teach import Reading, Teaching
from qiusuo.training.vocabulary import run_tokenizer
from tests.training import lives, tasks

SOURCE = {"task": tasks.PARITY, "thought_share": 0.5}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


def teach(model: Path | str | None, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "teach",
        "sources": [SOURCE],
        "count": 21,
        "batch": 5,
        "micro_batch_size": 3,
        "precision": "float32",
        "checkpoint_steps": 2,
        **({} if model is None else {"model": str(model)}),
        **changes,
    }


def distil(**changes: Any) -> dict[str, Any]:
    return {
        "kind": "distil",
        "steps": 5,
        "sequence_length": 64,
        "batch_size": 4,
        "micro_batch_size": 2,
        "precision": "float32",
        "checkpoint_steps": 2,
        "schedule": {"warmup_steps": 0, "decay_fraction": 0.0},
        "sources": [{"taught": "teach"}],
        **changes,
    }


def on_policy(*teachers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "kind": "distil_on_policy",
        "steps": 5,
        "prompts": 4,
        "answers": 2,
        "max_tokens": 12,
        "micro_batch_size": 3,
        "precision": "float32",
        "checkpoint_steps": 2,
        "schedule": {"warmup_steps": 0, "decay_fraction": 0.0},
        "tasks": [tasks.PARITY],
        "teachers": list(teachers),
        **changes,
    }


def student(teacher: Path, *stages: dict[str, Any], **top: Any) -> Recipe:
    """Half as wide as its teacher, with the teacher's tokens."""
    small = tasks.MODEL | {"hidden_size": 16, "num_hidden_layers": 1}
    tokenizer = {"kind": "path", "path": str(teacher)}
    return tasks.recipe(*stages, tokenizer=tokenizer, model=small, **top)


def alone(model: Transformer, tokens: list[int]) -> Tensor:
    """Log-probabilities [tokens - 1, vocabulary] of one text by itself, in plain torch."""
    x_TD = model(torch.tensor([tokens[:-1]])).x_BTD[0]
    return (x_TD @ model.lm_head.weight.T).log_softmax(-1)


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the middle of a step that may log events only."""
    note = StageLife.note

    def note_and_interrupt(self: Any, record: dict[str, Any]) -> None:
        note(self, record)
        if record["step"] == step and record["kind"] != "rollout":
            signal.raise_signal(signal.SIGINT)

    patch.setattr(StageLife, "note", note_and_interrupt)


def stopped_and_resumed(recipe: Recipe, path: Path, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        assert not lives.live(recipe, path)
    assert lives.go_on(path)


def scene_of_run(path: Path, stage: str) -> Scene[Any]:
    """What a stage of a run begins with, or goes on with, where the run was stopped."""
    run = RunFolder.open(path)
    recipe = parse_recipe(run.recipe)
    tokenizer = run_tokenizer(recipe, path / "tokenizer")
    model = build_model(recipe, tokenizer, stage)
    adapter = attach_adapter(recipe, model)
    checkpoint = last_state(run)
    assert checkpoint is not None
    take_weights(model, adapter, checkpoint)
    return Scene(recipe, recipe.stage(stage), run, tokenizer, model, adapter, lambda record: None)


def gradients_of(work: Distilling | OnPolicy) -> tuple[Any, dict[str, Tensor]]:
    """A step's result, and its gradients instead of an update."""
    found: dict[str, Tensor] = {}

    def keep(loss: float) -> float:
        named = work.state.model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return 1.0

    work.apply_gradients = keep  # type: ignore[method-assign]
    return work.one_step(), found


def assert_gradients(model: Transformer, found: dict[str, Tensor], rtol: float = 1e-3) -> None:
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().item()
            assert torch.allclose(parameter.grad, found[name], atol=rtol * scale + 1e-7), name
            compared += 1
    assert compared > 5


# -- the format -----------------------------------------------------------------------------------


def written(folder: Path, top: int | None, size: int = 7) -> tuple[About, list[TaughtExample]]:
    """Random distributions in two shards."""
    chance = np.random.default_rng(1)
    about = About("someone", tasks.tokenizer().fingerprint, size, top)
    examples = []
    for length in (4, 9, 2, 6, 30):
        counted = [False, *(chance.random(length - 2) < 0.6).tolist(), True]
        rows = chance.normal(size=(sum(counted), top or size)).astype(np.float16)
        ids = None if top is None else chance.integers(0, size, rows.shape)
        tokens = chance.integers(0, size, length).tolist()
        examples.append(TaughtExample(tokens, counted, logprobs_NV=rows, ids_NV=ids))
    parts = (examples[:2], examples[2:])
    shards = [write_shard(folder, n, about, part) for n, part in enumerate(parts)]
    write_index(folder, about, shards)
    return about, examples


@pytest.mark.parametrize(("top", "size"), [(None, 7), (3, 7), (2, 40000)])
def test_what_is_written_is_read(tmp_path: Path, top: int | None, size: int) -> None:
    about, examples = written(tmp_path, top, size)
    found = Distributions(tmp_path, tasks.tokenizer())
    assert (found.length, found.about) == (5, about)
    for index, example in enumerate(examples):
        held = found.example(index)
        assert (held.tokens, held.counted) == (example.tokens, example.counted)
        assert np.array_equal(held.logprobs_NV, example.logprobs_NV)
        assert (held.ids_NV is None) == (top is None)
        assert top is None or np.array_equal(held.ids_NV, example.ids_NV)
    again = Distributions(tmp_path, tasks.tokenizer())
    assert again.fingerprint == found.fingerprint
    rows = examples[0].logprobs_NV
    rows[0, 0] += 1
    write_index(tmp_path, about, [write_shard(tmp_path, 0, about, examples)])
    assert Distributions(tmp_path, tasks.tokenizer()).fingerprint != found.fingerprint


def test_other_programs_read_it(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    _, examples = written(tmp_path, 3)
    held = load_file(tmp_path / "shard-00000.safetensors")
    assert held["offsets"].tolist()[0] == [0, 0]
    assert held["tokens"].tolist() == examples[0].tokens + examples[1].tokens
    assert held["ids"].dtype == np.int16
    assert len(held["logprobs"]) == held["counted"].sum()


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json"):
        Distributions(tmp_path, tasks.tokenizer())
    written(tmp_path, None)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is missing or damaged"):
        Distributions(tmp_path, tasks.tokenizer())
    shard.write_bytes((tmp_path / "shard-00000.safetensors").read_bytes())
    with pytest.raises(DataError, match="the index says"):
        Distributions(tmp_path, tasks.tokenizer())
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        Distributions(tmp_path, tasks.tokenizer())


# -- teach ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 4])
def test_a_teacher_writes_what_it_would_say(taught: Path, tmp_path: Path, top: int | None) -> None:
    recipe = student(taught, teach(taught, top=top), distil())
    scene = lives.scene_of(recipe, tmp_path / "run", "teach")
    work = Teaching(scene)
    work.run(lambda: False)
    found = Distributions(scene.distributions_path("teach"), scene.tokenizer)
    assert (found.length, len(work.shards)) == (21, 5)
    teacher = load_model(open_checkpoint(taught))
    reading = Reading(work.reading.sources, [1.0], 21, work.seed)
    for index, example in enumerate(reading.take(21)):
        held = found.example(index)
        assert (held.tokens, held.counted) == (example.tokens, example.counted)
        with torch.no_grad():
            expected_NW = alone(teacher, example.tokens)[torch.tensor(example.counted[1:])]
        rows = torch.from_numpy(held.logprobs_NV.astype(np.float32))
        if top is not None:
            assert held.ids_NV is not None
            ids = torch.from_numpy(held.ids_NV.astype(np.int64))
            assert torch.allclose(expected_NW.gather(1, ids), rows, atol=1e-4, rtol=2e-3)
            expected_NW = expected_NW.topk(top).values
        assert torch.allclose(rows, expected_NW.clamp_min(-100), atol=1e-4, rtol=2e-3)


def test_a_finite_source_is_read_once() -> None:
    class Finite:
        fingerprint = "a"

        def __init__(self, length: int | None) -> None:
            self.length = length

        def example(self, index: int) -> Any:
            return self.length, index

    both: Any = [Finite(3), Finite(5)]
    reading = Reading(both, [1.0, 2.0], 100, 0)
    assert reading.count == 8
    first = reading.take(3)
    state = reading.state_dict()
    rest = reading.take(100)
    expected = [(3, n) for n in range(3)] + [(5, n) for n in range(5)]
    assert sorted(first + rest) == expected  # type: ignore[comparison-overlap]
    other = Reading(both, [1.0, 2.0], 100, 0)
    other.load_state_dict(state)
    assert other.take(100) == rest
    endless: Any = [Finite(3), Finite(None)]
    assert len(Reading(endless, [1.0, 1.0], 100, 0).take(1000)) == 100


# -- stored ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_learning_what_is_stored_is_learning_from_the_teacher(
    taught: Path, tmp_path: Path, divergence: str
) -> None:
    """A packed step against each text alone, asked of the living teacher: float16 between them."""
    match = {"divergence": divergence, "teacher_share": 0.3}
    stage = distil(match=match, label_weight=0.5, mtp_weight=0.0, balance={"sequence_weight": 0.0})
    recipe = student(taught, teach(taught), stage)
    scene = lives.scene_of(recipe, tmp_path / "run", "teach")
    Teaching(scene).run(lambda: False)
    work = Distilling(dataclasses.replace(scene, stage=recipe.stage("distil")))
    rows = copy.deepcopy(work.loader).taught_batch().rows
    teacher, model = load_model(open_checkpoint(taught)), copy.deepcopy(scene.model)
    total, labels, tokens = torch.zeros(()), torch.zeros(()), 0
    for example in (one for row in rows for one in row):
        here = torch.tensor(example.counted[1:])
        q_NW = alone(model, example.tokens)[here]
        with torch.no_grad():
            p_NW = alone(teacher, example.tokens)[here]
        if divergence == "forward":
            each = p_NW.exp() * (p_NW - q_NW)
        elif divergence == "reverse":
            each = q_NW.exp() * (q_NW - p_NW)
        else:
            m_NW = (0.3 * p_NW.exp() + 0.7 * q_NW.exp()).log()
            each = 0.3 * p_NW.exp() * (p_NW - m_NW) + 0.7 * q_NW.exp() * (q_NW - m_NW)
        total = total + each.sum()
        next_N = torch.tensor(example.tokens[1:])[here]
        labels = labels - q_NW.gather(1, next_N[:, None]).sum()
        tokens += len(next_N)
    ((total + 0.5 * labels) / tokens).backward()
    result, found = gradients_of(work)
    assert result.tokens == tokens
    assert result.loss == pytest.approx(((total + 0.5 * labels) / tokens).item(), rel=2e-3)
    assert result.more["label_loss"] == pytest.approx((labels / tokens).item(), rel=1e-4)
    assert_gradients(model, found, rtol=5e-3)


def test_the_likeliest_tokens_can_be_learnt_forward_only(taught: Path, tmp_path: Path) -> None:
    assert lives.live(student(taught, teach(taught, top=3), distil()), tmp_path / "run")
    backward = distil(match={"divergence": "reverse"})
    with pytest.raises(RecipeError, match="keeps the likeliest 3"):
        lives.live(student(taught, teach(taught, top=3), backward), tmp_path / "other")
    mixed = distil(sources=[{"taught": "a"}, {"taught": "b"}])
    both = (teach(taught, top=3, name="a"), teach(taught, top=4, name="b"), mixed)
    with pytest.raises(RecipeError, match="keep differently much"):
        lives.live(student(taught, *both), tmp_path / "third")


def test_stored_distillation_goes_on_as_if_never_stopped(taught: Path, tmp_path: Path) -> None:
    recipe = student(taught, teach(taught), distil())
    whole, early, late = (tmp_path / name for name in ("whole", "early", "late"))
    assert lives.live(recipe, whole)
    stopped_and_resumed(recipe, early, 3)  # of five steps of the teacher
    stopped_and_resumed(recipe, late, 8)
    for other in (early, late):
        lives.assert_same_life(whole, other)
        for file in sorted((whole / "distributions" / "teach").iterdir()):
            there = other / "distributions" / "teach" / file.name
            assert file.read_bytes() == there.read_bytes(), file.name


def test_shards_after_the_last_checkpoint_are_written_again(taught: Path, tmp_path: Path) -> None:
    recipe = student(taught, teach(taught), distil())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lives.live(recipe, whole)
    with pytest.MonkeyPatch.context() as patch:

        def fail(self: Any) -> None:
            raise OSError("the disk is gone")

        patch.setattr(Teaching, "tell", _after(3, Teaching.tell, fail))
        with pytest.raises(OSError, match="gone"):
            lives.live(recipe, killed)
    assert lives.go_on(killed)
    lives.assert_same_life(whole, killed)


def _after(calls: int, first: Any, then: Any) -> Any:
    left = [calls]

    def called(self: Any) -> None:
        left[0] -= 1
        (first if left[0] >= 0 else then)(self)

    return called


# -- on policy ------------------------------------------------------------------------------------


def test_a_step_is_the_gradient_of_the_weighted_divergences(taught: Path, tmp_path: Path) -> None:
    """Two teachers of different sizes and tasks; each answer alone in plain torch."""
    short = tasks.PARITY | {"weight": 2.0}
    chains = {"task": "chains", "difficulties": [2]}
    recipe = student(
        taught,
        tasks.sft(steps=2, name="small"),
        on_policy(
            {"model": str(taught), "weight": 0.7},
            {"model": "stage:small", "tasks": ["parity"], "weight": 1.5},
            tasks=[short, chains],
            prompts=6,
        ),
    )
    path = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        lives.live(recipe, path)
    scene = scene_of_run(path, "distil_on_policy")
    experts = [
        named_model(scene, name, torch.float32).model for name in (str(taught), "stage:small")
    ]
    work = OnPolicy(scene)
    groups = work.ask()
    model = copy.deepcopy(scene.model)
    assert {group.question.problem.task for group in groups} == {"parity", "chains"}
    total, tokens = torch.zeros(()), 0
    for group in groups:
        parity = group.question.problem.task == "parity"
        for one in group.rollouts:
            text, start = [*one.prompt, *one.answer], len(one.prompt) - 1
            q_NW = alone(model, text)[start:]
            tokens += len(one.answer)
            for expert, weight in zip(experts, (0.7, 1.5 * parity), strict=True):
                with torch.no_grad():
                    p_NW = alone(expert, text)[start:]
                total = total + weight * (q_NW.exp() * (q_NW - p_NW)).sum()
    (total / tokens).backward()
    work.ask = lambda: groups  # type: ignore[method-assign]
    work.rollouts.truncate_after(0)  # those of the run above
    result, found = gradients_of(work)
    assert result.tokens == tokens
    assert result.loss == pytest.approx((total / tokens).item(), rel=1e-4)
    assert_gradients(model, found)
    work.close()


def test_the_student_comes_to_its_teacher(taught: Path, tmp_path: Path) -> None:
    optimizer = {"kind": "adamw", "adamw_learning_rate": 0.01}
    stage = on_policy({"model": str(taught)}, steps=40, prompts=16, optimizer=optimizer)
    path = tmp_path / "run"
    assert lives.live(student(taught, stage), path)
    records = read_log(path / "log.jsonl")
    steps = [record["loss"] for record in records if record["kind"] == "step"]
    assert steps[-1] < 0.25 * steps[0]
    told = [record for record in records if record["kind"] == "rollout"]
    assert told[-1]["divergence"]["parity/8"] < 0.25 * told[0]["divergence"]["parity/8"]
    kept = [json.loads(line) for line in (path / "rollouts.jsonl").open(encoding="utf-8")]
    assert {line["step"] for line in kept} == set(range(1, 41))
    assert all(line["divergence"] >= 0 for line in kept)


def test_on_policy_distillation_goes_on_as_if_never_stopped(taught: Path, tmp_path: Path) -> None:
    recipe = student(
        taught,
        tasks.sft(steps=2, name="small"),
        on_policy({"model": str(taught)}, {"model": "stage:small", "weight": 0.1}),
    )
    assert lives.live(recipe, tmp_path / "whole")
    stopped_and_resumed(recipe, tmp_path / "stopped", 5)
    lives.assert_same_life(tmp_path / "whole", tmp_path / "stopped")


def test_every_task_has_a_teacher(taught: Path) -> None:
    chains = {"task": "chains", "difficulties": [2]}
    stage = on_policy({"model": "x", "tasks": ["chains"]}, tasks=[tasks.PARITY, chains])
    with pytest.raises(RecipeError, match="no teacher for parity"):
        parse_recipe(tasks.table(stage))
    with pytest.raises(RecipeError, match="sums is no task of the stage"):
        parse_recipe(tasks.table(on_policy({"model": "x"}, {"model": "y", "tasks": ["sums"]})))


def test_a_task_of_a_file_is_known_by_its_path(taught: Path, tmp_path: Path) -> None:
    novel = str(tasks.NOVEL["task"])
    teachers = [{"model": str(taught), "tasks": [name]} for name in (novel, "parity")]
    entries = [tasks.NOVEL, tasks.PARITY]
    recipe = student(taught, on_policy(*teachers, tasks=entries, steps=2, prompts=6))
    assert lives.live(recipe, tmp_path / "run")
    tries = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "rollout"]
    told = {name: value for record in tries for name, value in record["divergence"].items()}
    assert len({name.partition("/")[0] for name in told}) == 2
    assert min(told.values()) > 0


# -- teachers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teach", "on_policy"])
def test_a_teacher_of_other_tokens_is_refused(
    undisturbed: Path, taught: Path, tmp_path: Path, kind: str
) -> None:
    stage = teach(undisturbed) if kind == "teach" else on_policy({"model": str(undisturbed)})
    with pytest.raises(RecipeError, match=r"another tokenizer \(\d+ tokens, .*sample with that"):
        lives.live(student(taught, stage), tmp_path / "run")


def test_distributions_of_other_tokens_are_refused(
    undisturbed: Path, taught: Path, tmp_path: Path
) -> None:
    assert lives.live(student(taught, teach(taught)), tmp_path / "run")
    stage = distil(sources=[{"folder": str(tmp_path / "run" / "distributions" / "teach")}])
    assert lives.live(student(taught, stage), tmp_path / "one")
    recipe = student(undisturbed / "model", stage)
    with pytest.raises(DataError, match="vocabulary mismatch"):
        lives.live(recipe, tmp_path / "other")


def test_an_earlier_stage_with_its_adapter_is_a_teacher(taught: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(
        tasks.sft(steps=3, name="before"),
        tasks.sft(steps=2, name="after"),
        teach("stage:before"),
        base=taught,
        adapter={"rank": 2},
    )
    assert lives.live(recipe, tmp_path / "run")
    then = scene_of_run(tmp_path / "run", "before")
    last = last_state(then.run)
    assert last is not None
    take_weights(then.model, then.adapter, state_at_end(then.run, last, "before"))
    found = Distributions(tmp_path / "run/distributions/teach", then.tokenizer)
    example = found.example(3)
    with torch.no_grad():
        expected = alone(then.model, example.tokens)[torch.tensor(example.counted[1:])]
    rows = torch.from_numpy(example.logprobs_NV.astype(np.float32))
    assert torch.allclose(rows, expected, atol=2e-3, rtol=2e-3)


def test_a_teacher_samples_for_its_student(taught: Path, tmp_path: Path) -> None:
    """R1's way: what another model samples is what it would have sampled itself."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    refine = tasks.sft(steps=2, name="refine", sources=[{"traces": "sample"}])
    recipe = student(taught, tasks.sample(model=str(taught)), refine)
    assert lives.live(recipe, ours)
    assert lives.live(tasks.recipe(tasks.sample(), base=taught), theirs)
    kept = (ours / "traces" / "sample.jsonl").read_text(encoding="utf-8")
    assert kept == (theirs / "traces" / "sample.jsonl").read_text(encoding="utf-8")
    assert kept
