"""A small bilingual corpus and a vocabulary learnt from it, shared by the room's tests."""

from __future__ import annotations

import random

import pytest

from qiusuo.data.tokenizer import Tokenizer


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of 3 to 60 words, some Chinese."""
    generator = random.Random(seed)
    words = "the quick brown fox jumps over lazy dog 123 春眠 不觉晓 处处 闻啼鸟 ，。\n".split(" ")
    return [
        f"{i} " + " ".join(generator.choices(words, k=generator.randint(3, 60)))
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(200)


@pytest.fixture(scope="session")
def bpe(documents: list[str]) -> Tokenizer:
    return Tokenizer.train_bpe(documents, 400)


@pytest.fixture(scope="session")
def characters(documents: list[str]) -> Tokenizer:
    return Tokenizer.train_characters(documents)
