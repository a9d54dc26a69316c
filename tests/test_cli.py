"""The commands as someone types them, and what they are told when something is wrong."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qiusuo
from qiusuo import cli
from qiusuo.model.cost import measure
from qiusuo.model.families import config_from_file
from qiusuo.runs.folder import RunFolder
from tests.commands import Answer, Ask, asker, refused
from tests.model.shapes import tiny_model
from tests.model.test_published import V3
from tests.training import lives

SMALL = ["--set", "stages.0.steps=3", "--set", "stages.0.validation_steps=0"]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lives.write_corpus(tmp_path_factory.mktemp("corpus") / "road.jsonl")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QIUSUO_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asker(monkeypatch, capsys)


# Words


def test_help_lists_the_commands(ask: Ask) -> None:
    answer = ask("--help")
    assert answer.code == 0
    for name in (
        "quickstart train pull chat serve export doctor inspect plan report keys accounts prices"
    ).split():
        assert re.search(rf"^ *{name} +\w", answer.out, re.MULTILINE), name
        assert ask(name, "--help").code == 0


def test_version(ask: Ask) -> None:
    assert ask("--version") == (0, f"qiusuo {qiusuo.__version__}\n", "")


def test_real_processes(home: Path) -> None:
    """Both ways in: the console script, and ``python -m qiusuo``."""
    import subprocess

    script = Path(sys.executable).with_name("qiusuo")
    words = [str(script)] if script.is_file() else lives.command()
    found = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"qiusuo {qiusuo.__version__}\n"
    done = lives.run_command(home, "train", "secnds")
    refused(Answer(done.returncode, done.stdout, done.stderr))


def test_an_unknown_command(ask: Ask) -> None:
    answer = ask("trian")
    assert answer.code == 2
    assert "No such command 'trian'" in answer.err


# Mistakes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train"], "give a RECIPE, or --resume --run FOLDER"),
        (["train", "secnds"], "did you mean 'seconds'?"),
        (["train", "seconds", "--set", "stages.0.steps"], "expected KEY=VALUE"),
        (["train", "seconds", "--set", "stages.x.steps=1"], "there is no stage 'x'"),
        (["train", "seconds", "--stage", "pretrian"], "no stage 'pretrian'; did you mean"),
        (["train", "--resume"], "--resume needs --run FOLDER"),
        (["train", "--resume", "--run", "nowhere"], "nowhere is not a run folder"),
        (["train", "seconds", "--resume", "--run", "x"], "give neither RECIPE nor --set"),
        (["train", "seconds", "--device", "warp"], "warp"),
        (["quickstart", "--recipe", "secnds"], "did you mean 'seconds'?"),
        (["inspect", "no/such/place"], "no/such/place"),
        (["inspect", "secnds"], "did you mean the recipe 'seconds'?"),
        (["pull", "tinyshakespear"], "tinyshakespeare"),
        (["report", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(ask: Ask, words: list[str], expected: str) -> None:
    assert expected in refused(ask(*words))


def test_a_wrong_key_names_the_nearest(ask: Ask) -> None:
    answer = ask("train", "seconds", "--set", "stages.0.optimizer.lerning_rate=1")
    assert answer.code == 1
    assert answer.err.startswith("qiusuo: ")
    assert "stages.0.optimizer.lerning_rate is not a key; did you mean 'learning_rate'?" in (
        answer.err
    )
    assert not Path("runs").exists()


def test_a_config_of_another_family(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type 'gpt2' is not one of" in refused(ask("inspect", tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in refused(ask("inspect", tmp_path / "config.json"))


def test_rates_that_explode(ask: Ask, corpus: Path) -> None:
    recipe = lives.write_recipe(Path("tiny.toml"), lives.recipe_table(corpus, checkpoint_steps=1))
    rates = ("learning_rate", "adamw_learning_rate")
    words = [word for rate in rates for word in ("--set", f"stages.0.optimizer.{rate}=1e30")]
    message = refused(ask("train", recipe, "--run", "run", *words))
    assert re.search(r"step [2-9]: loss is \S+, gradient norm \S+: not finite", message)
    status = RunFolder.open("run", lock=False).status()
    assert status["state"] == "failed"
    assert status["error"] in message
    assert lives.last_checkpoint(Path("run")).name == f"step-{status['step']:08d}"


def test_a_corpus_that_is_too_small(ask: Ask) -> None:
    lives.write_corpus(Path("short.jsonl"), 3)
    words = ["--set", 'stages.0.data.corpora=[{source="short.jsonl"}]', "--run", "run"]
    big = [
        *("--set", "stages.0.sequence_length=10000"),
        *("--set", "model.max_position_embeddings=10000"),
    ]
    message = refused(ask("train", "seconds", *words, *big, "--set", "tokenizer.kind='characters'"))
    assert "fewer than one window of 10002" in message
    Path("short.jsonl").write_text("")
    assert "short" in refused(ask("train", "seconds", *words[:2]))


# Training


def test_train_in_the_default_folder(ask: Ask, corpus: Path) -> None:
    recipe = lives.write_recipe(Path("tiny.toml"), lives.recipe_table(corpus))
    answer = ask("train", recipe, *SMALL)
    assert (answer.code, answer.err) == (0, "")
    assert "Run folder   runs/tiny\n" in answer.out
    assert "Report       runs/tiny/report.html\n" in answer.out
    assert lives.steps_done(Path("runs/tiny")) == [1, 2, 3]
    assert ask("train", recipe, *SMALL).code == 0
    assert Path("runs/tiny-2/model/model.safetensors").is_file()
    before = Path("runs/tiny/log.jsonl").read_bytes()
    assert "already holds a run; resume it" in refused(ask("train", recipe, "--run", "runs/tiny"))
    answer = ask("train", "--resume", "--run", "runs/tiny")
    assert answer.code == 0
    assert "runs/tiny is finished" in answer.out
    assert Path("runs/tiny/log.jsonl").read_bytes() == before


def test_report_draws_anew(ask: Ask, corpus: Path) -> None:
    recipe = lives.write_recipe(Path("tiny.toml"), lives.recipe_table(corpus))
    assert ask("train", recipe, *SMALL, "--run", "run").code == 0
    Path("run/report.html").write_text("nothing")
    answer = ask("report", "run")
    assert answer == (0, "run/report.html\n", "")
    assert "<html" in Path("run/report.html").read_text(encoding="utf-8")


def quick(corpus: Path, *more: str) -> list[str]:
    source = f'stages.0.data.corpora=[{{source="{corpus}"}}]'
    words = ["--recipe", "seconds", "--run", "run", "--set", source, *SMALL, *more]
    return ["quickstart", "--no-page", *words, "--set", "tokenizer.kind='characters'"]


def test_quickstart_trains_then_goes_on_then_starts_over(ask: Ask, corpus: Path) -> None:
    first = ask(*quick(corpus))
    assert (first.code, first.err) == (0, "")
    assert "《" in first.out  # the prompt, and what the model made of it
    assert "Parameters" in first.out
    assert "Run folder   run\n" in first.out
    log, weights = Path("run/log.jsonl"), Path("run/model/model.safetensors")
    before, made = log.read_bytes(), weights.stat().st_mtime_ns

    again = ask(*quick(corpus))
    assert (again.code, again.err) == (0, "")
    assert "Going on with the finished run in run" in again.out
    assert "step 1/3" not in again.out
    assert "《" in again.out
    assert log.read_bytes() == before
    assert weights.stat().st_mtime_ns == made

    fresh = ask(*quick(corpus, "--fresh"))
    assert fresh.code == 0
    assert "step 1/3" in fresh.out
    assert log.read_bytes() != before  # other times
    assert lives.steps_done(Path("run")) == [1, 2, 3]


def test_quickstart_goes_on_with_an_unfinished_run(
    ask: Ask, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        lives.interrupt_at(patch, 2)
        stopped = ask(*quick(corpus))
    assert stopped.code == 130
    assert "Stopped and saved. Go on with" in stopped.out
    assert lives.steps_done(Path("run")) == [1, 2]
    answer = ask(*quick(corpus))
    assert answer.code == 0
    assert "Going on with the unfinished run in run" in answer.out
    assert lives.steps_done(Path("run")) == [1, 2, 3]


def test_quickstart_never_removes_what_is_no_run(ask: Ask, corpus: Path) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    refused(ask(*quick(corpus, "--fresh")))
    refused(ask(*quick(corpus)))
    assert Path("run/thesis.txt").read_text() == "years of work"


# Inspecting


def test_inspect_of_v3_says_that_it_does_not_fit(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config.json").write_text(json.dumps(V3))
    monkeypatch.setattr("qiusuo.model.cost.available_memory", lambda: 16 << 30)
    answer = ask("inspect", "config.json")
    assert (answer.code, answer.err) == (0, "")
    assert re.search(r"^Parameters +671,026,419,200 *$", answer.out, re.MULTILINE)
    assert re.search(
        r"^Active per token +36,6\d\d,\d{3},\d{3} \(5\.5%\) *$", answer.out, re.MULTILINE
    )
    assert "576 elements (every head's keys and values: 40,960)" in answer.out
    assert "It cannot hold this model at any of these precisions." in answer.out
    assert answer.out.count("does not fit") == 5
    assert ": fits" not in answer.out


def test_inspect_where_it_fits(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    qiusuo.LanguageModel(tiny_model(), None).save("model")
    monkeypatch.setattr("qiusuo.model.cost.available_memory", lambda: 1 << 30)
    answer = ask("inspect", "model", "--context", "1000")
    cost = measure(config_from_file("model"))
    assert f"{cost.parameters:,}" in answer.out
    assert "Cache of 1,000 tokens" in answer.out
    assert answer.out.count(": fits") == 5
    assert "cannot hold" not in answer.out
    monkeypatch.setattr("qiusuo.model.cost.available_memory", lambda: cost.parameters)
    answer = ask("inspect", "model", "--context", "1")
    assert answer.out.count("does not fit") >= 3
    assert "int4 (blocks of 32)" in answer.out
    assert "cannot hold" not in answer.out


def test_inspect_of_a_recipe_and_its_run(ask: Ask, corpus: Path) -> None:
    by_name = ask("inspect", "seconds")
    assert by_name.code == 0
    source = Path(cli.__file__).parent / "recipes" / "seconds.toml"
    shutil.copy(source, "mine.toml")
    *facts, _free_memory = by_name.out.splitlines()
    assert ask("inspect", "mine.toml").out.splitlines()[:-1] == facts
    recipe = lives.write_recipe(Path("tiny.toml"), lives.recipe_table(corpus))
    assert ask("train", recipe, *SMALL, "--run", "run").code == 0
    cost = measure(qiusuo.load("run").config)
    run = ask("inspect", "run")
    assert f"{cost.parameters:,}" in run.out
    assert f"{cost.mtp_parameters:,}" in run.out
    assert run.out.splitlines()[:5] == ask("inspect", "run/model").out.splitlines()[:5]


def test_pull_without_a_name_lists_what_there_is(ask: Ask) -> None:
    answer = ask("pull")
    assert answer.code == 0
    assert re.search(r"^tinyshakespeare +\S", answer.out, re.MULTILINE)


def test_every_error_that_a_person_can_mend_is_there() -> None:
    for module, name in cli.MENDABLE.items():
        assert issubclass(getattr(importlib.import_module(module), name), Exception)
    assert len(cli.mendable()) == len(cli.MENDABLE) + 1


def test_a_wrong_word_is_refused_before_anything_heavy_is_loaded() -> None:
    """In a fresh process: PyTorch alone takes seconds."""
    code = """
import sys
from qiusuo import cli
sys.argv = ["qiusuo", "quantize", "m", "out", "--to", "int5"]
try:
    cli.main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
    assert done.stderr == "qiusuo: 'int5' is not one of int8, int4\n"
