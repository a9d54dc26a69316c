"""Bits per character: how surprised a model is by a text, comparable across vocabularies.

The sum of -log2 p(token | all before it) over the text, divided by its characters. Documents stand
alone, each behind the beginning-of-text token. One longer than the context is read in windows that
overlap by half, and a token counts in the first window that has it: every token is scored once,
with at least half a context before it once there is that much.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qiusuo.data.errors import DataError
from qiusuo.engine.language_model import LanguageModel
from qiusuo.evaluation.answers import EvaluationError
from qiusuo.evaluation.statistics import Estimate, ratio

# B windows, T tokens, D hidden, M scored tokens.

MOST_CONTEXT = 4096  # tokens in a window, whatever the model has room for: attention is T²
BATCH_TOKENS = 4096
LOGITS_ROWS = 512  # of the vocabulary's width, in memory at once
FEW_DOCUMENTS = 10  # below, windows are what is resampled


@dataclass(frozen=True)
class Window:
    """Tokens to read, those from ``first`` on to score (never the very first). ``characters``: of
    its document, by the share of the tokens that are scored here; one token may be half a
    character."""

    document: int
    tokens: list[int]
    first: int
    characters: float


@dataclass(frozen=True)
class Bits:
    """``unit``: what the interval resamples, "documents" or "windows". ``unknown``: the share of
    tokens that are the unknown character, of which a low figure says nothing."""

    per_character: Estimate
    per_token: float
    characters: int
    tokens: int
    documents: int
    unknown: float
    unit: str

    def record(self) -> dict[str, Any]:
        return vars(self) | {"per_character": self.per_character.record()}


def bits_per_character(
    lm: LanguageModel,
    documents: Iterable[str],
    *,
    seed: int = 0,
    context: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bits:
    """Of the documents together. ``context``: tokens of a window, by default the model's, at most
    ``MOST_CONTEXT``. ``progress`` hears (done, all) tokens. DataError where there is nothing to
    score, EvaluationError where the model gives no numbers."""
    tokenizer = lm.needed_tokenizer()
    limit = lm.config.max_position_embeddings
    context = min(limit, MOST_CONTEXT) if context is None else context
    if not 2 <= context <= limit:
        raise DataError(f"the window must have 2 to {limit} tokens, not {context}")
    windows: list[Window] = []
    count = unknown = 0
    for count, text in enumerate(documents, 1):
        body = tokenizer.encode(text)
        unknown += body.count(-1 if tokenizer.unknown_id is None else tokenizer.unknown_id)
        windows += _windows(lm, count - 1, text, body, context)
    if not windows:
        raise DataError("the text has no token that follows another: there is nothing to predict")
    bits = _scored(lm, windows, progress)
    if not math.isfinite(sum(bits)):
        raise EvaluationError("the model's logits are not numbers: it has diverged, or is damaged")
    total = sum(len(one.tokens) - one.first for one in windows)
    by_document = count >= FEW_DOCUMENTS
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for place, (window, one) in enumerate(zip(windows, bits, strict=True)):
        pair = sums[window.document if by_document else place]
        pair[0] += one
        pair[1] += window.characters
    numerators, denominators = zip(*sums.values(), strict=True)
    estimate = ratio(numerators, denominators, seed)
    return Bits(
        per_character=estimate,
        per_token=sum(bits) / total,
        characters=round(sum(one.characters for one in windows)),
        tokens=total,
        documents=count,
        unknown=unknown / total,
        unit="documents" if by_document else "windows",
    )


def _windows(
    lm: LanguageModel, document: int, text: str, body: Sequence[int], context: int
) -> Iterator[Window]:
    tokenizer = lm.needed_tokenizer()
    tokens = [*tokenizer.text_start, *body]
    characters = len(text)
    if not tokenizer.text_start:  # nothing predicts the first token
        characters -= len(tokenizer.decode(tokens[:1]))
    if len(tokens) < 2 or characters < 1:
        return
    scored, start = 1, 0
    while scored < len(tokens):
        end = min(start + context, len(tokens))
        share = (end - scored) / (len(tokens) - 1)
        yield Window(document, tokens[start:end], scored - start, characters * share)
        scored, start = end, end - context // 2


@torch.inference_mode()
def _scored(
    lm: LanguageModel, windows: Sequence[Window], progress: Callable[[int, int], None] | None
) -> list[float]:
    """Bits of each window's scored tokens. Windows of like length are read together: padding
    stands behind a text, where nothing looks at it."""
    bits = [0.0] * len(windows)
    done, everything = 0, sum(len(window.tokens) for window in windows)
    order = sorted(range(len(windows)), key=lambda place: len(windows[place].tokens))
    while order:
        width = len(windows[order[-1]].tokens)  # longest first: memory is short at once or never
        rows = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // width)))]
        for place, one in zip(rows, _batch_bits(lm, [windows[row] for row in rows]), strict=True):
            bits[place] = one
        done += sum(len(windows[row].tokens) for row in rows)
        if progress is not None:
            progress(done, everything)
    return bits


def _batch_bits(lm: LanguageModel, windows: Sequence[Window]) -> list[float]:
    device = lm.model.model.embed_tokens.weight.device
    width = max(len(window.tokens) for window in windows)
    padded = [window.tokens + [0] * (width - len(window.tokens)) for window in windows]
    x_BTD = lm.model(torch.tensor(padded, device=device)).x_BTD
    bits = []
    for x_TD, window in zip(x_BTD, windows, strict=True):
        target_M = torch.tensor(window.tokens[window.first :], device=device)
        x_MD = x_TD[window.first - 1 : len(window.tokens) - 1]
        nats = 0.0
        for start in range(0, len(target_M), LOGITS_ROWS):
            part = slice(start, start + LOGITS_ROWS)
            logits = lm.model.logits(x_MD[part]).float()
            nats += torch.nn.functional.cross_entropy(
                logits, target_M[part], reduction="sum"
            ).item()
        bits.append(nats / math.log(2))
    return bits
