"""`qiusuo eval` as someone types it."""

import json
from pathlib import Path

import pytest

from qiusuo.tasks.chains import PlainChains
from qiusuo.tasks.task import problems
from tests.commands import Ask, asker, refused
from tests.evaluation.models import tiny_lm
from tests.evaluation.stand_in_server import StandIn, completion, failure


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    monkeypatch.delenv("QIUSUO_API_KEY", raising=False)
    return asker(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_lm().save(folder)
    return folder


def solve(body: dict, number: int):
    """A server that knows the plain sums of an even target, and is wrong by one at others."""
    text = body["messages"][-1]["content"].removeprefix("What is ").partition("?")[0]
    total = sum(map(int, text.split("+")))
    return completion(str(total + total % 2))


def test_a_model_here(ask, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("07+35=321\n" * 30)
    out = tmp_path / "results.json"
    words = ["--task", "chains:2-3", "--task", "parity:12", "--text", text, "--out", out]
    limits = ["--count", "6", "--samples", "2", "--max-tokens", "8", "--seed", "3"]
    answer = ask("eval", model, *words, *limits)
    assert answer.code == 0, answer.err
    told = json.loads(out.read_text())
    assert told["complete"] is True
    assert told["asked"]["chains"] == {
        "ask": "prompt", "thinking": True, "system": None, "opened": "<think>",
    }  # fmt: skip
    rows = [(one["task"], one["difficulty"], one["problems"]) for one in told["scores"]]
    assert rows == [("chains", 2, 3), ("chains", 3, 3), ("chains", None, 6), ("parity", 12, 6)]
    assert all(set(one["sampled"]["rates"]) == {"pass@1", "pass@2"} for one in told["scores"])
    assert told["texts"][str(text)]["characters"] == 300
    assert "text.txt: " in answer.out
    assert "asked with ask 'prompt', thinking True, opened '<think>'" in answer.out
    lines = [line.split() for line in answer.out.splitlines() if line.startswith("chains ")]
    assert [line[1:3] for line in lines[:3]] == [["2", "3"], ["3", "3"], ["all", "6"]]
    again = ask("eval", model, *words, *limits)
    assert again.out == answer.out


def test_without_a_thought_in_words_and_greedy_only(ask, model, tmp_path):
    out = tmp_path / "results.json"
    how = ["--no-thinking", "--ask", "question", "--samples", "0", "--count", "2"]
    answer = ask("eval", model, "--task", "chains-plain:2", *how, "--max-tokens", "4", "--out", out)
    assert answer.code == 0, answer.err
    told = json.loads(out.read_text())
    assert told["asked"]["chains-plain"]["opened"] == "</think>"
    assert told["asked"]["chains-plain"]["ask"] == "question"
    assert told["scores"][0]["sampled"] is None
    assert "pass@" not in answer.out


def test_a_server(ask, tmp_path):
    out = tmp_path / "results.json"
    with StandIn(solve) as server:
        words = ["--url", server.url, "--key", "sk-2", "--task", "chains-plain:2"]
        answer = ask("eval", *words, "--count", "20", "--samples", "2", "--out", out)
    assert answer.code == 0, answer.err
    chosen = problems(PlainChains(), "test", 0, [2], 20, unique=True)
    even = sum(sum(problem.data["terms"]) % 2 == 0 for problem in chosen)
    [score] = json.loads(out.read_text())["scores"]
    assert score["greedy"]["rates"]["accuracy"]["value"] == even / 20
    assert score["sampled"]["rates"]["pass@2"]["value"] == even / 20
    assert f"{100 * even / 20:.1f} (" in answer.out
    assert set(server.keys) == {"Bearer sk-2"}
    assert "sk-2" not in out.read_text() + answer.out


def test_what_was_measured_before_a_server_fails_is_kept(ask, tmp_path):
    out = tmp_path / "results.json"

    def answer(body: dict, number: int):
        return solve(body, number) if number < 4 else failure(400, "the credit is used up")

    with StandIn(answer) as server:
        words = ["--url", server.url, "--task", "chains-plain:2-3", "--samples", "0"]
        answer = ask("eval", *words, "--count", "8", "--out", out)
    assert "400: the credit is used up" in refused(answer)
    told = json.loads(out.read_text())
    assert told["complete"] is False
    assert [one["difficulty"] for one in told["scores"]] == [2]
    assert "chains-plain" in answer.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a MODEL, or --url"),
        (["MODEL", "--url", "http://localhost"], "one of the two"),
        (["MODEL"], "nothing to measure: give --task or --text"),
        (["MODEL", "--task", "chain:2"], "unknown task 'chain': did you mean 'chains'"),
        (["MODEL", "--task", "chains:x"], "behind the colon go difficulties"),
        (["MODEL", "--task", "chains:5-4"], "the first difficulty is above the last"),
        (["MODEL", "--task", "chains:1-4"], "difficulties 2 to 30, not 1"),
        (["MODEL", "--task", "chains", "--ask", "nicely"], "--ask is prompt or question"),
        (["MODEL", "--task", "chains", "--samples", "-1"], "samples must be in 0"),
        (["MODEL", "--task", "chains", "--out", "no/where.json"], "cannot write no/where.json"),
        (["MODEL", "--text", "none.txt"], "no file or folder none.txt"),
        (["--url", "http://localhost", "--text", "none.txt"], "--text needs the model here"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(ask, words, said, tmp_path):
    absent = tmp_path / "absent"  # loading it would fail with another message
    assert said in refused(ask("eval", *(absent if word == "MODEL" else word for word in words)))
