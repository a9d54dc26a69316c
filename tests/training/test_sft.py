"""The stage ``sft``: only what the assistant says is learnt, whatever it is read from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.loading import load
from qiusuo.runs.log import read_log
from qiusuo.tasks.parity import running_parity
from qiusuo.training.losses import language_model_losses, make_window
from qiusuo.training.sft import Finetuning
from tests.training import lives, tasks

Make = Callable[..., Finetuning]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)


@pytest.fixture
def finetuning(tmp_path: Path) -> Make:
    numbers = itertools.count()

    def make(*, top: dict[str, Any] | None = None, **stage: Any) -> Finetuning:
        recipe = tasks.recipe(tasks.sft(**stage), **(top or {}))
        return Finetuning(lives.scene_of(recipe, tmp_path / f"made-{next(numbers)}"))

    return make


def read(work: Finetuning, tokenizer: Tokenizer, batches: int = 1) -> list[tuple[str, str]]:
    """(what stands there, what of it is learnt) of every example."""
    found = []
    for batch in itertools.islice(work.batches, batches):
        rows = zip(batch.tokens_BS, batch.documents_BS, batch.valid_BS, strict=True)
        for tokens_S, documents_S, valid_S in rows:
            for number in range(int(documents_S.max()) + 1):
                mine = documents_S == number
                whole, learnt = tokens_S[mine], tokens_S[mine & valid_S]
                found.append((tokenizer.decode(whole.tolist()), tokenizer.decode(learnt.tolist())))
    return found


END = "<｜end▁of▁sentence｜>"


def test_of_a_task_the_solution_is_learnt_and_nothing_else(
    finetuning: Make, tmp_path: Path
) -> None:
    work = finetuning()
    tokenizer = Tokenizer.load(tmp_path / "made-0" / "tokenizer")
    found = read(work, tokenizer, batches=5)
    assert len(found) > 30
    thoughts = 0
    for whole, learnt in found:
        asked, _, rest = whole.partition("=<｜Assistant｜><think>")
        bits = asked.removeprefix("<｜begin▁of▁sentence｜><｜User｜>")
        trace = running_parity(bits)
        assert rest == learnt
        assert learnt in (f"{trace}</think>{trace[-1]}{END}", f"</think>{trace[-1]}{END}")
        thoughts += learnt.startswith(trace)
    assert 0.25 < thoughts / len(found) < 0.75


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_thoughts(finetuning: Make, tmp_path: Path, share: float) -> None:
    work = finetuning(sources=[{"task": tasks.PARITY, "thought_share": share}])
    tokenizer = Tokenizer.load(tmp_path / "made-0" / "tokenizer")
    for _, learnt in read(work, tokenizer):
        assert learnt.startswith("</think>") == (share == 0)


def test_the_loss_is_the_mean_over_what_is_learnt(finetuning: Make) -> None:
    """By the whole softmax, an example at a time: none sees its neighbours in the row."""
    work, twin = finetuning(mtp_weight=0.0), finetuning()
    batch = next(twin.batches)
    model = work.state.model
    nats, count = 0.0, 0
    rows = zip(batch.tokens_BS, batch.documents_BS, batch.valid_BS, strict=True)
    for tokens_S, documents_S, valid_S in rows:
        for number in range(int(documents_S.max()) + 1):
            tokens, counted = tokens_S[documents_S == number], valid_S[documents_S == number]
            with torch.no_grad():
                logits = model.logits(model(tokens[None, :-1]).x_BTD)[0].log_softmax(-1)
            for place in range(1, len(tokens)):
                if counted[place]:
                    nats -= float(logits[place - 1, tokens[place]])
                    count += 1
    result = work.one_step()
    assert result.tokens == count
    assert result.loss == pytest.approx(nats / count, rel=1e-5)


def test_the_modules_that_look_ahead_go_on_learning(finetuning: Make) -> None:
    batch = next(finetuning().batches)
    model = finetuning().state.model
    window = make_window(batch.tokens_BS, batch.documents_BS, batch.valid_BS, 1, True)
    [ahead] = language_model_losses(model, window).mtp
    ahead.backward()
    module = model.model.mtp_blocks[0]
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_a_run_learns_the_form_of_answers(taught: Path) -> None:
    losses = [r["loss"] for r in read_log(taught.parent / "log.jsonl") if r["kind"] == "step"]
    assert losses[0] > 3
    # Guessing eight bits and their parity costs 9·ln 2 of the 11 tokens with a thought.
    assert sum(losses[-5:]) / 5 < 0.85


# Sources


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"0{number:03b}"},
                {"role": "assistant", "content": "1" * (number + 1)},
            ]
        }
        for number in range(5)
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_file_of_messages(finetuning: Make, talk: Path, tmp_path: Path) -> None:
    work = finetuning(sources=[{"file": str(talk)}])
    tokenizer = Tokenizer.load(tmp_path / "made-0" / "tokenizer")
    found = read(work, tokenizer)
    assert {learnt for _, learnt in found} == {f"{'1' * n}{END}" for n in range(1, 6)}
    assert all(whole.startswith("<｜begin▁of▁sentence｜><｜User｜>0") for whole, _ in found)
    result = work.one_step()
    assert result.loss > 0


def test_sources_are_mixed_by_weight(finetuning: Make, talk: Path, tmp_path: Path) -> None:
    sources = [{"file": str(talk), "weight": 3.0}, {"task": tasks.PARITY, "thought_share": 1.0}]
    work = finetuning(sources=sources)
    tokenizer = Tokenizer.load(tmp_path / "made-0" / "tokenizer")
    found = read(work, tokenizer, batches=40)
    of_file = sum("=" not in whole for whole, _ in found)
    # Of the short ones more are still waiting: a row takes what is long first.
    assert of_file / len(found) == pytest.approx(0.75, abs=0.12)


def test_an_example_longer_than_a_row_is_named(
    finetuning: Make, talk: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"talk\.jsonl line 3 .*sequence_length"):
        finetuning(sources=[{"file": str(talk)}], sequence_length=10)
    with pytest.raises(DataError, match=r"sequence_length"):
        finetuning(sequence_length=10).one_step()


def test_what_was_sampled_is_learnt(taught: Path, tmp_path: Path) -> None:
    """The words that the model found right, and no others."""
    recipe = tasks.recipe(
        tasks.sample(count=8), tasks.sft(steps=2, sources=[{"traces": "sample"}]), base=taught
    )
    run = tmp_path / "run"
    assert lives.live(recipe, run)
    kept = [json.loads(line) for line in (run / "traces" / "sample.jsonl").open()]
    said = set()
    for record in kept:
        user, assistant = record["messages"]
        bits = user["content"].removesuffix("=")
        assert assistant["content"] == running_parity(bits)[-1]
        said.add((bits, f"{assistant['reasoning_content']}</think>{assistant['content']}{END}"))
    scene = lives.scene_of(
        tasks.recipe(
            tasks.sft(sources=[{"file": str(run / "traces" / "sample.jsonl")}]), base=taught
        ),
        tmp_path / "other",
    )
    for whole, learnt in read(Finetuning(scene), scene.tokenizer):
        bits = whole.partition("<｜User｜>")[2].partition("=")[0]
        assert (bits, learnt) in said
    steps = [r for r in read_log(run / "log.jsonl") if r["kind"] == "step"]
    assert [r["stage"] for r in steps] == ["sft", "sft"]
    assert steps[0]["loss"] < 1.5  # its own words do not surprise it


def test_esft_moves_the_chosen_experts_and_nothing_else(tmp_path: Path) -> None:
    base = tmp_path / "base"
    assert lives.live(tasks.recipe(tasks.sft(steps=2)), base)
    chosen = {"kind": "esft", "experts": 0.3}
    run = tmp_path / "chosen"
    recipe = tasks.recipe(tasks.sft(), tasks.sft(name="more"), base=base / "model", adapter=chosen)
    assert lives.live(recipe, run)
    selection = json.loads((run / "experts.json").read_text())["experts"]
    before, after = (load(folder).model.state_dict() for folder in (base, run))
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(tensor, after[name]), name
            continue
        layer = name.split(".layers.")[1].split(".")[0]
        moved = [e for e in range(len(tensor)) if not torch.equal(tensor[e], after[name][e])]
        assert sorted(moved) == sorted(selection[layer]), name
