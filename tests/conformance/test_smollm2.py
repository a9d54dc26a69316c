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
from qiusuo.checkpoint.export import export
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.data.hub_reference import find_model_folder
from qiusuo.doctor import Examination, Mark, examine
from qiusuo.engine.answer_events import Event, Kind

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
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `qiusuo export` writes it; the file it came in goes when it is converted."""
    if find_model_folder("smollm2") is None:
        pytest.skip("smollm2 is not in the cache: qiusuo pull smollm2")
    place = tmp_path_factory.mktemp("smollm2") / "smollm2.gguf"
    return export(open_checkpoint("smollm2"), place, "gguf")


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

    def hear(event: Event) -> None:
        assert event.kind is Kind.CONTENT
        pieces.append(event.text)

    message = folder.chat(QUESTION, max_tokens=20, on_event=hear)
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
    answers = [model.chat(QUESTION, max_tokens=9) for model in (whole, folder)]
    assert answers[0].token_ids == answers[1].token_ids


def test_the_doctor_finds_nothing(file: Path) -> None:
    for place in ("smollm2", str(file)):
        examination = Examination(place)
        assert [found.mark for found in examine(examination)] == [Mark.GOOD] * 7
        assert examination.verdict() == f"Healthy. Talk with it: qiusuo chat {place}"
