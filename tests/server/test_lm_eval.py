"""lm-eval's `local-completions`, unmodified, against a real server process: it scores choices by
the log-probabilities of an echoed prompt, and lets texts be continued. The scores must be those
that the model itself gives in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server.api.processes import ServerProcess
from tests.server.api.talkers import talker

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval[api]"
    ),
]

LONG = 300.0  # seconds for a process that imports half the world
OPENING = "Once upon a time"
CHOICES = [" there was a road.", " there were two bears."]
TASKS = {
    "road_choice": """
task: road_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{opening}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "road_story": """
task: road_story
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{opening}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: [" It was"], max_gen_toks: 40}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    """Each task's one sample, as lm-eval wrote it down."""
    place: Path = tmp_path_factory.mktemp("evaluated")
    data = place / "data.jsonl"
    data.write_text(json.dumps({"opening": OPENING, "choices": CHOICES}) + "\n")
    tasks = place / "tasks"
    tasks.mkdir()
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    talker().save(place / "talker")
    home = {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with ServerProcess(place / "talker", place / "db") as server:
        options = {
            "model": "talker",
            "base_url": f"{server.address}/v1/completions",
            "tokenizer": place / "talker",
            "tokenizer_backend": "huggingface",
            "num_concurrent": 2,
            "max_retries": 1,
            "max_length": 512,
        }
        words = ["--model", "local-completions", "--tasks", ",".join(TASKS), "--log_samples"]
        words += ["--model_args", ",".join(f"{key}={value}" for key, value in options.items())]
        words += ["--include_path", str(tasks), "--output_path", str(place / "out")]
        ended = subprocess.run(
            [sys.executable, "-m", "lm_eval", *words],
            env=os.environ | home | {"OPENAI_API_KEY": "none yet"},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    samples = {}
    for name in TASKS:
        [file] = (place / "out").rglob(f"samples_{name}_*.jsonl")
        [samples[name]] = map(json.loads, file.read_text().splitlines())
    return samples


def test_choices_are_scored_as_the_model_scores_them(told) -> None:
    lm = talker()
    start = lm.tokenizer.encode(OPENING)
    for choice, [score] in zip(CHOICES, told["road_choice"]["resps"], strict=True):
        tokens = lm.tokenizer.encode(OPENING + choice)
        assert tokens[: len(start)] == start
        with torch.inference_mode():
            logits_TW = lm.model.logits(lm.model(torch.tensor([tokens])).x_BTD)[0]
        drawn = torch.tensor(tokens[len(start) :])
        logprobs_TW = logits_TW[len(start) - 1 : -1].log_softmax(-1)
        expected = logprobs_TW.gather(1, drawn[:, None]).sum().item()
        greedy = bool((logprobs_TW.argmax(-1) == drawn).all())
        value, is_greedy = score
        assert float(value) == pytest.approx(expected, abs=1e-3)
        assert str(is_greedy) == str(greedy)
    assert told["road_choice"]["acc"] == 1.0


def test_a_text_is_continued_until_a_stop_string(told) -> None:
    assert told["road_story"]["resps"] == [[CHOICES[0]]]
    assert told["road_story"]["exact_match"] == 1.0
