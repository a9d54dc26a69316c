"""Replies of a model in this process."""

import random

import pytest
import torch

from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation import answers
from qiusuo.evaluation.answers import (
    EvaluationError,
    ModelAnswerer,
    check_model,
    default_ask,
    is_of_characters,
)
from qiusuo.evaluation.asking import Asker
from qiusuo.tasks.chains import Chains
from qiusuo.tasks.task import problems
from qiusuo.tasks.verse import Verse
from tests.evaluation.models import tiny_lm

PROBLEMS = list(problems(Chains(), "test", 0, [2, 3, 4], 12))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm()


def answerer(lm: LanguageModel, **how: object) -> ModelAnswerer:
    return ModelAnswerer(lm, Asker(lm.tokenizer, **how))


def test_a_greedy_reply_is_what_the_model_writes_alone(lm):
    replies = answerer(lm).answers(PROBLEMS, samples=1, temperature=0.0, max_tokens=12, seed=0)
    asker = Asker(lm.tokenizer)
    for problem, [reply] in zip(PROBLEMS, replies, strict=True):
        written: list[int] = []
        while len(written) < 12 and lm.tokenizer.eos_id not in written:
            logits_TW = lm.logits(asker.prompt_ids(problem) + written)
            written.append(int(logits_TW[-1].argmax()))
        ended = lm.tokenizer.eos_id in written
        text = lm.tokenizer.decode(written[:-1] if ended else written)
        assert reply.response == "<think>" + text
        assert reply.tokens == len(written)
        assert reply.finish == ("stop" if ended else "length")


def test_samples_keep_their_marks_draw_apart_and_can_be_repeated(lm, monkeypatch):
    sampling = dict(samples=6, temperature=1.0, max_tokens=24, seed=5)
    heard: list[int] = []
    first = answerer(lm).answers(PROBLEMS, progress=heard.append, **sampling)
    assert [len(row) for row in first] == [6] * 12
    assert sum(heard) == 72
    assert any("</think>" in one.response for row in first for one in row)
    assert all(len({one.response for one in row}) > 1 for row in first)
    assert answerer(lm).answers(PROBLEMS, **sampling) == first
    assert answerer(lm).answers(PROBLEMS, **sampling | {"seed": 6}) != first
    # In several calls every problem still has draws of its own.
    monkeypatch.setattr(answers, "ANSWERS_AT_ONCE", 12)
    same = [PROBLEMS[0]] * 6
    rows = answerer(lm).answers(same, progress=heard.append, **sampling)
    assert heard[-3:] == [12, 12, 12]
    assert len({tuple(one.response for one in row) for row in rows}) == 6


def test_what_does_not_fit_is_told(lm):
    long = tiny_lm(max_position_embeddings=8)
    with pytest.raises(EvaluationError, match="context holds 8"):
        answerer(long).answers(PROBLEMS, samples=1, temperature=0.0, max_tokens=4, seed=0)


def test_a_model_that_diverged_fails_answer_by_answer():
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.lm_head.weight.fill_(torch.nan)
    replies = answerer(lm).answers(PROBLEMS[:2], samples=1, temperature=0.0, max_tokens=4, seed=0)
    assert [reply.finish for [reply] in replies] == ["error", "error"]
    assert all(reply.error for [reply] in replies)


def test_who_gets_the_bare_prompt():
    chains, verse = Chains(), Verse()
    characters = Tokenizer.train_characters([Chains.alphabet])
    assert default_ask(chains, characters) == "prompt"
    assert default_ask(chains, Tokenizer.train_characters(["01="])) == "question"
    assert default_ask(chains, Tokenizer.train_bpe(["07+35=321 " * 9], 300)) == "question"
    titles = "".join(verse.problem(1, random.Random(i)).prompt for i in range(999))
    assert default_ask(verse, Tokenizer.train_characters([titles])) == "prompt"
    assert default_ask(verse, characters) == "question"
    assert is_of_characters(characters)


def test_a_base_model_cannot_be_asked(lm):
    assert check_model(lm, "mine") is lm.tokenizer
    bare = Tokenizer(lm.tokenizer.backend)
    with pytest.raises(DataError, match=r"mine has no chat template.*--text"):
        check_model(LanguageModel(lm.model, bare), "mine")
    with pytest.raises(DataError, match="mine has no chat template"):
        check_model(LanguageModel(lm.model, None), "mine")
