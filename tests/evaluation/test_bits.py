"""Bits per character against sums over a model's logits, token by token."""

import math
import random

import pytest
import torch

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.answers import EvaluationError
from qiusuo.evaluation.bits import bits_per_character
from qiusuo.evaluation.statistics import ratio
from tests.evaluation.models import tiny_lm
from tests.model.shapes import tiny_model

LETTERS = "abcdefgh \n"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm(LETTERS, max_position_embeddings=32)


def some(lengths: list[int]) -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choice(LETTERS) for _ in range(length)) for length in lengths]


def surprise(lm: LanguageModel, before: list[int], token: int) -> float:
    logprobs_W = lm.logits(before)[-1].log_softmax(-1)
    return -float(logprobs_W[token]) / math.log(2)


def test_a_short_text_is_read_whole(lm):
    [text] = some([20])
    tokens = [*lm.tokenizer.text_start, *lm.tokenizer.encode(text)]
    expected = sum(surprise(lm, tokens[:place], tokens[place]) for place in range(1, 21))
    told = bits_per_character(lm, [text])
    assert told.per_character.value == pytest.approx(expected / 20, abs=1e-4)
    assert told.per_token == pytest.approx(expected / 20, abs=1e-4)
    assert (told.characters, told.tokens, told.documents, told.unknown) == (20, 20, 1, 0)
    assert told.per_character.low is None


@pytest.mark.parametrize(("length", "context"), [(100, 8), (31, 32), (32, 32), (33, 32), (9, 2)])
def test_a_long_text_is_read_in_windows_that_overlap_by_half(lm, length, context):
    [text] = some([length])
    tokens = [*lm.tokenizer.text_start, *lm.tokenizer.encode(text)]
    expected = 0.0
    for place in range(1, len(tokens)):
        hop = context - context // 2
        window = max(0, -(-(place + 1 - context) // hop))  # the first that has it
        expected += surprise(lm, tokens[window * hop : place], tokens[place])
    told = bits_per_character(lm, [text], context=context)
    assert told.per_character.value == pytest.approx(expected / length, abs=1e-4)
    assert told.tokens == length
    assert told.unit == "windows"


def test_documents_of_any_length_together_are_as_each_alone(lm):
    documents = some([5, 40, 1, 17, 90, 3, 25, 64, 2, 8, 30])
    alone = [bits_per_character(lm, [one]).per_character.value for one in documents]
    lengths = [len(one) for one in documents]
    heard: list[tuple[int, int]] = []
    told = bits_per_character(lm, documents, seed=2, progress=lambda *pair: heard.append(pair))
    expected = ratio([a * b for a, b in zip(alone, lengths, strict=True)], lengths, seed=2)
    assert told.unit == "documents"
    assert told.per_character.value == pytest.approx(expected.value, abs=1e-4)
    assert told.per_character.low == pytest.approx(expected.low, abs=1e-4)
    assert told.per_character.high == pytest.approx(expected.high, abs=1e-4)
    assert heard[-1][0] == heard[-1][1]


def test_characters_count_whatever_the_vocabulary(lm):
    """A BPE has fewer tokens than characters; a Chinese character may be several tokens."""
    text = "ababab 求索 " * 8
    tokenizer = Tokenizer.train_bpe([text], 300)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    told = bits_per_character(LanguageModel(model, tokenizer), [text])
    assert told.characters == len(text) != told.tokens
    assert told.per_character.value == pytest.approx(told.per_token * told.tokens / len(text))
    without = Tokenizer(tokenizer.backend)  # no beginning: the first token is not predicted
    less = bits_per_character(LanguageModel(model, without), [text])
    first = len(without.decode(without.encode(text)[:1]))
    assert (less.characters, less.tokens) == (len(text) - first, told.tokens - 1)


def test_unknown_characters_are_told(lm):
    assert bits_per_character(lm, ["abXcX"]).unknown == pytest.approx(0.4)


def test_nothing_to_predict_is_refused(lm):
    with pytest.raises(DataError, match="nothing to predict"):
        bits_per_character(lm, [""])
    with pytest.raises(DataError, match="2 to 32 tokens, not 64"):
        bits_per_character(lm, ["abc"], context=64)


def test_a_model_that_diverged_is_told():
    lm = tiny_lm(LETTERS)
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="not numbers"):
        bits_per_character(lm, ["abc"])
