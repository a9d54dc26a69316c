"""Pairs of answers of which one is preferred, for DPO.

    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}

one object a line, in the shapes that TRL and most public sets have. A text is a message of the
user's or the assistant's. Where `chosen` and `rejected` are whole conversations, what they begin
with alike is the prompt; a `prompt` beside them may repeat that beginning. `tools` and `thinking`
as in dialogues.py.

Both answers stand behind one and the same prompt, or their probabilities could not be compared: if
one of them has a thought, the other has an empty one. What the assistant says within the prompt is
context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qiusuo.data.chat_template import Message, check_messages
from qiusuo.data.dialogues import dialogue_examples, read_thinking, read_tools, thought_of
from qiusuo.data.errors import DataError
from qiusuo.data.examples import Example, StoredExamples
from qiusuo.data.json_lines import check_fields, read_records
from qiusuo.data.tokenizer import Tokenizer

Messages = list[Message]


class Pair(NamedTuple):
    """Two answers to the same prompt; only their tokens count."""

    chosen: Example
    rejected: Example


class Preferences:
    """The pairs of a file, by number, with a fingerprint as `ExampleSource` has it."""

    def __init__(self, chosen: StoredExamples, rejected: StoredExamples) -> None:
        self._chosen, self._rejected = chosen, rejected
        self.length = chosen.length
        self.longest = max(chosen.longest, rejected.longest)
        both = f"{chosen.fingerprint} {rejected.fingerprint}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    def pair(self, index: int) -> Pair:
        """The same for the same number, always."""
        return Pair(self._chosen.example(index), self._rejected.example(index))


def read_preferences(path: str | Path, tokenizer: Tokenizer) -> Preferences:
    """The pairs of a .jsonl file (also .gz, .xz), in its order. `DataError` names the file and
    line that cannot be used."""
    pairs = list(_pairs(path, tokenizer))
    if not pairs:
        raise DataError(f"no pairs in {path}: it is empty")
    return Preferences(
        StoredExamples(pair.chosen for pair in pairs),
        StoredExamples(pair.rejected for pair in pairs),
    )


def _pairs(path: str | Path, tokenizer: Tokenizer) -> Iterator[Pair]:
    for place, record in read_records(path):
        check_fields(record, ("chosen", "rejected"), place)
        try:
            prompt, chosen, rejected = _split(record)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        tools, thinking = read_tools(record, place), read_thinking(record, place)
        if thinking is None and any(_thinks(message) for message in chosen + rejected):
            thinking = True
        yield preference_pair(
            tokenizer, prompt, chosen, rejected, tools=tools, thinking=thinking, origin=place
        )


def preference_pair(
    tokenizer: Tokenizer,
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    *,
    tools: list[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    origin: str = "",
) -> Pair:
    """`DataError`, which names `origin`, unless both answers are one example each, the prompts are
    the same and the answers are not."""
    context: Messages = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in prompt
    ]
    sides: list[Example] = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        where = f"{origin}: {name}" if origin else name
        examples = dialogue_examples(
            tokenizer, [*context, *answer], tools=tools, thinking=thinking, origin=where
        )
        if len(examples) > 1:
            raise DataError(
                f"{where} has {len(examples)} turns that no single prompt leads to, since the "
                "chat template leaves out earlier thoughts: compare the last turn only"
            )
        sides.append(examples[0])
    pair = Pair(*sides)
    starts = [example.tokens[: example.counted.index(True)] for example in pair]
    if starts[0] != starts[1]:
        raise DataError(
            f"{origin or 'this pair'}: the chat template writes different prompts for the two "
            "answers: begin both with a message of the assistant's, in the same way"
        )
    if pair.chosen.tokens == pair.rejected.tokens:
        raise DataError(
            f"{origin or 'this pair'}: chosen and rejected are the same: leave the line out"
        )
    return pair


def _split(record: Mapping[str, Any]) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected answer."""
    said = record.get("prompt")
    prompt = None if said is None else _messages(said, "prompt", "user")
    chosen = _messages(record["chosen"], "chosen", "assistant")
    rejected = _messages(record["rejected"], "rejected", "assistant")
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        if prompt is None:
            raise DataError(
                "there is no prompt: add one, or give chosen and rejected as whole conversations "
                "that begin with it"
            )
        return prompt, chosen, rejected
    length = _alike(chosen, rejected)
    start = chosen[:length]
    if prompt is not None and not _repeats(prompt, start):
        raise DataError(
            "chosen and rejected do not begin with the assistant, nor with the prompt: give the "
            "prompt once, or at the beginning of both"
        )
    if not start or not chosen[length:] or not rejected[length:]:
        raise DataError(
            "chosen and rejected must begin with the same prompt and go on with an answer each"
        )
    return start, chosen[length:], rejected[length:]


def _messages(said: object, field: str, role: str) -> Messages:
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    if not isinstance(said, list):
        raise DataError(f"{field} must be a text or a list of messages, not {said!r:.80}")
    try:
        check_messages(said)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error
    return said


def _alike(chosen: Messages, rejected: Messages) -> int:
    """How many messages both begin with."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


def _repeats(prompt: Messages, start: Messages) -> bool:
    """Whether this is what both begin with, the system's words perhaps left out."""
    asked = [message for message in start if message["role"] != "system"]
    return prompt in (start, asked)


def _thinks(message: Message) -> bool:
    return message["role"] == "assistant" and thought_of(message) is not None
