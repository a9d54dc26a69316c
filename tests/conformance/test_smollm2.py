"""A model that somebody else trained, SmolLM2-135M-Instruct: its answers through our code.

It needs `qiusuo pull smollm2` (93 MB) once; without it these tests are skipped. The greedy answer
is also llama.cpp's, for the model as `qiusuo export --to gguf` writes it. For the four-bit file
itself llama.cpp begins with "L'Étoile": "The" and "L" are a tenth of a nat apart, and it rounds
activations to eight bits. Hence float32 below.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import qiusuo
from qiusuo.data.catalogue import find_entry
from qiusuo.data.hub_reference import find_model_folder
from qiusuo.data.pull import member_path
from qiusuo.doctor import Examination, Mark, examine
from qiusuo.engine.text_stream import Part

pytestmark = pytest.mark.long

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PROMPT_IDS = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411),
    *(407, 19712, 8182, 2, 198, 1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1),
    *(520, 9531, 198),
]
ANSWER_IDS = [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.fixture(scope="module")
def file() -> Path:
    path = member_path(find_entry("smollm2"))
    if find_model_folder("smollm2") is None or not path.is_file():
        pytest.skip("smollm2 is not in the cache: qiusuo pull smollm2")
    return path


@pytest.fixture(scope="module")
def folder(file: Path) -> qiusuo.LanguageModel:
    """As it was converted when it was pulled."""
    return qiusuo.load("smollm2")


def test_it_knows_the_capital_of_france(file: Path) -> None:
    folder = qiusuo.load("smollm2", dtype="float32")
    assert folder.tokenizer is not None
    assert folder.tokenizer.apply_chat_template(QUESTION) == PROMPT_IDS
    assert folder.tokenizer.decode(PROMPT_IDS) == PROMPT
    pieces: list[str] = []

    def hear(part: Part, text: str) -> None:
        assert part is Part.ANSWER
        pieces.append(text)

    message = folder.chat(QUESTION, max_tokens=20, on_text=hear)
    assert message.token_ids == ANSWER_IDS
    assert message.content == "".join(pieces) == "The capital of France is Paris."
    assert (message.reasoning_content, message.finish_reason) == (None, "stop")
    assert pieces[:2] == ["The", " capital"]


def test_the_file_and_the_folder_are_one_model(folder: qiusuo.LanguageModel, file: Path) -> None:
    whole = qiusuo.load(file)
    assert whole.config == folder.config
    assert whole.logits(PROMPT_IDS).equal(folder.logits(PROMPT_IDS))
    assert whole.tokenizer is not None
    assert folder.tokenizer is not None
    assert whole.tokenizer.fingerprint == folder.tokenizer.fingerprint
    assert whole.stop_ids == folder.stop_ids == {2}
    assert whole.tokenizer.text_start == folder.tokenizer.text_start
    assert whole.chat(QUESTION, max_tokens=9) == folder.chat(QUESTION, max_tokens=9)


def test_the_doctor_finds_nothing(file: Path) -> None:
    for place in ("smollm2", str(file)):
        examination = Examination(place)
        assert [found.mark for found in examine(examination)] == [Mark.GOOD] * 7
        assert examination.verdict() == f"Healthy. Talk with it: qiusuo chat {place}"
