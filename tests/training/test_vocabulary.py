"""The one tokenizer of a run: whatever its stages ask and answer can be written in it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.evaluation.asking import Asker
from qiusuo.training.given_tasks import problem_at, task_of
from qiusuo.training.recipe import Recipe, RecipeError
from qiusuo.training.sections import TaskEntry
from qiusuo.training.vocabulary import run_tokenizer
from tests.training import lives, tasks

CHARACTERS = [
    {"task": "parity", "difficulties": [8, 12]},
    {"task": "chains", "difficulties": [2, 5]},
    {"task": "chains-plain", "difficulties": [3]},
    {"task": "sums", "difficulties": [2]},
    {"task": "arithmetic", "difficulties": [2]},
    {"task": "countdown", "difficulties": [3]},
    {"task": "word-problems", "difficulties": [2]},
]


def asked_and_answered(entry: dict[str, Any], tokenizer: Tokenizer, recipe: Recipe) -> list[int]:
    """The tokens of some prompts and solutions."""
    ask = recipe.ask
    asker = Asker(tokenizer, ask.text, ask.thinking, ask.system)
    section = TaskEntry.model_validate(entry)
    tokens: list[int] = []
    for index in range(40):
        problem = problem_at(section, "test", 9, index)
        for thought in (True, False):
            response = task_of(section).solution(problem, random.Random(index), thought=thought)
            tokens += [*asker.prompt_ids(problem), *asker.answer_ids(response)]
    return tokens


@pytest.mark.parametrize("ask", ["prompt", "question"])
@pytest.mark.parametrize("entry", CHARACTERS, ids=lambda entry: entry["task"])
def test_characters_of_tasks(entry: dict[str, Any], ask: str, tmp_path: Path) -> None:
    stages = tasks.sft(sources=[{"task": entry}]), tasks.rl(tasks=[entry]), tasks.sample()
    system = {"text": ask, "system": "Zählt!"}
    for number, stage in enumerate(stages[:2]):
        recipe = tasks.recipe(stage, ask=system)
        tokenizer = run_tokenizer(recipe, tmp_path / str(number))
        unknown = tokenizer.token_id("<unk>")
        assert unknown not in asked_and_answered(entry, tokenizer, recipe)
        assert unknown not in tokenizer.encode("Zählt!")


def test_characters_of_tasks_that_are_only_looked_at(tmp_path: Path) -> None:
    entry = {"task": "chains", "difficulties": [3]}
    recipe = tasks.recipe(tasks.sft(), evaluation={"tasks": [entry]})
    tokenizer = run_tokenizer(recipe, tmp_path / "tokenizer")
    assert tokenizer.token_id("<unk>") not in asked_and_answered(entry, tokenizer, recipe)


@pytest.mark.parametrize("frequency", [1, 3])
def test_characters_of_text_and_of_tasks_behind_it(
    corpus: Path, tmp_path: Path, frequency: int
) -> None:
    """However rare a character of a text must not be: those of tasks are all there."""
    text = lives.recipe_table(corpus)["stages"][0]
    settings = {"kind": "characters", "min_frequency": frequency}
    recipe = tasks.recipe(text, tasks.sft(), tokenizer=settings)
    tokenizer = run_tokenizer(recipe, tmp_path / "tokenizer")
    unknown = tokenizer.token_id("<unk>")
    assert unknown not in asked_and_answered(tasks.PARITY, tokenizer, recipe)
    assert unknown not in tokenizer.encode("路漫漫 the road")
    # The folder's is the run's, from now on.
    assert run_tokenizer(recipe, tmp_path / "tokenizer").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_characters_of_files(tmp_path: Path, suffix: str) -> None:
    """As they are meant, not as JSON may spell them."""
    said = [
        {"role": "user", "content": "何以\nparler?"},
        {"role": "assistant", "content": "說", "reasoning_content": "ñ"},
    ]
    file = tmp_path / f"talk{suffix}"
    line = json.dumps({"messages": said}, ensure_ascii=True) + "\n"
    file.write_bytes(gzip.compress(line.encode()) if suffix.endswith("gz") else line.encode())
    recipe = tasks.recipe(tasks.sft(sources=[{"file": str(file)}]))
    tokenizer = run_tokenizer(recipe, tmp_path / "tokenizer")
    assert tokenizer.token_id("<unk>") not in tokenizer.encode("何以\nparler? 說ñ".replace(" ", ""))


def test_a_file_that_is_not_there_is_named_before_anything_is_done(tmp_path: Path) -> None:
    recipe = tasks.recipe(tasks.sft(sources=[{"file": str(tmp_path / "talk.jsonl")}]))
    with pytest.raises(DataError, match=r"talk\.jsonl"):
        lives.live(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_bytes_are_in_every_bpe(corpus: Path, tmp_path: Path) -> None:
    bpe = {"kind": "bpe", "vocab_size": 400}
    text = lives.recipe_table(corpus)["stages"][0]
    for number, stages in enumerate(([text, tasks.rl()], [tasks.sft(), tasks.rl()])):
        recipe = tasks.recipe(*stages, tokenizer=bpe)
        tokenizer = run_tokenizer(recipe, tmp_path / str(number))
        entry = {"task": "countdown", "difficulties": [3]}  # that no stage names
        tokens = asked_and_answered(entry, tokenizer, recipe)
        assert all(token < tokenizer.vocab_size for token in tokens)
        problem = problem_at(TaskEntry.model_validate(entry), "train", 0, 0)
        assert tokenizer.decode(tokenizer.encode(problem.question)) == problem.question


def test_a_run_on_a_base_speaks_as_the_base(taught: Path, tmp_path: Path) -> None:
    recipe = tasks.recipe(tasks.sft(), base=taught)
    tokenizer = run_tokenizer(recipe, tmp_path / "tokenizer")
    assert tokenizer.fingerprint == Tokenizer.load(taught).fingerprint


def test_a_base_without_a_tokenizer_is_refused(taught: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in taught.iterdir():
        if file.name != "tokenizer.json":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RecipeError, match=r"has no tokenizer\.json"):
        run_tokenizer(tasks.recipe(tasks.sft(), base=bare), tmp_path / "tokenizer")


def test_options_of_a_task_may_be_lists(tmp_path: Path) -> None:
    poems = tmp_path / "poems.jsonl"
    poems.write_text(json.dumps({"text": "x"}) + "\n")
    entry = TaskEntry(task="verse", difficulties=(1,), options={"titles": ["秋思", "江上"]})
    assert task_of(entry) is task_of(entry.model_copy())
