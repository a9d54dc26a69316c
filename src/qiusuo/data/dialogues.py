"""Conversations to examples: the loss is on what the assistant says, thoughts and end included.

    {"messages": [{"role": "user", "content": "1+1?"},
                  {"role": "assistant", "reasoning_content": "One and one.", "content": "2"}],
     "tools": [...], "thinking": true}

one object a line; `messages` as every API takes them, calls and results of tools too, the rest may
be missing. A thought is `reasoning_content`, or stands in `content` before `</think>`. `"weight":
0` on an assistant's message makes it context only (OpenAI's, Mistral's and axolotl's spelling).
`thinking` says which prompt the answers follow: true also where the thought is empty; without it
the turns with a thought follow the one that opens thoughts.

A turn is learnt behind the very prompt that the model will see when it is its turn: the tokenizer's
template is asked for that prompt and for the conversation with the turn, and what the second has
beyond the first is the answer. Templates leave earlier thoughts out of a prompt, so a conversation
becomes one example as long as each prompt goes on from what was said before, and another where it
does not; each turn counts once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qiusuo.data.chat_template import Message, check_messages
from qiusuo.data.errors import DataError
from qiusuo.data.examples import Example, StoredExamples
from qiusuo.data.json_lines import check_fields, read_records
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import THINK_BEGIN, THINK_END

ABOUT_TRAINING = ("weight", "prefix")
"""Fields of a message that are not said to the model."""


def read_dialogues(path: str | Path, tokenizer: Tokenizer) -> StoredExamples:
    """The examples of a .jsonl file (also .gz, .xz), in its order, each turn of the assistant's
    counted once. `DataError` names the file and line that cannot be used."""
    return StoredExamples(_examples(path, tokenizer))


def _examples(path: str | Path, tokenizer: Tokenizer) -> Iterator[Example]:
    found = False
    for place, record in read_records(path):
        check_fields(record, ("messages",), place)
        found = True
        yield from dialogue_examples(
            tokenizer,
            record["messages"],
            tools=read_tools(record, place),
            thinking=read_thinking(record, place),
            origin=place,
        )
    if not found:
        raise DataError(f"no conversations in {path}: it is empty")


def dialogue_examples(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    origin: str = "",
) -> list[Example]:
    """One conversation; `DataError`, which names `origin`, if nothing can be learnt from it."""
    try:
        counted_turns = _counted_turns(messages)
        turns = [_said(message, thinking) for message in messages]
        reader = _Reader(tokenizer, turns, tools)
        examples: list[Example] = []
        tokens: list[int] = []
        counted: list[bool] = []
        for place in counted_turns:
            prompt, answer = reader.read(place, thinking)
            if prompt[: len(tokens)] != tokens:
                examples.append(Example(tokens, counted, origin))
                tokens, counted = [], []
            counted += [False] * (len(prompt) - len(tokens)) + [True] * len(answer)
            tokens = prompt + answer
    except DataError as error:
        raise DataError(f"{origin or 'this conversation'}: {error}") from error
    return [*examples, Example(tokens, counted, origin)]


def thought_of(message: Message) -> str | None:
    """An assistant's thought, None where there is none and "" where it is empty."""
    thought, content = message.get("reasoning_content"), message.get("content")
    if thought is not None:
        if not isinstance(thought, str):
            raise DataError(f"reasoning_content must be a text, not {thought!r:.80}")
        return thought
    if isinstance(content, str) and THINK_END in content:
        return content.partition(THINK_END)[0].split(THINK_BEGIN, 1)[-1].strip()
    return None


def read_tools(record: Mapping[str, Any], place: str) -> list[Mapping[str, Any]] | None:
    """The `tools` of a line: a list, or one written as text as tables hold it."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{place}: the text of tools is not valid JSON: {error}") from error
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise DataError(f"{place}: tools must be a list of objects, not {tools!r:.80}")
    return tools


def read_thinking(record: Mapping[str, Any], place: str) -> bool | None:
    """What a line says of `thinking`."""
    thinking = record.get("thinking")
    if not isinstance(thinking, bool | None):
        raise DataError(f"{place}: thinking must be true or false, not {thinking!r:.80}")
    return thinking


def _counted_turns(messages: Sequence[Message]) -> list[int]:
    """The places of the assistant's turns to learn, all of them fit for it."""
    check_messages(messages)
    places = []
    for place, message in enumerate(messages):
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise DataError(
                f"message {place} has the weight {weight!r:.80}: it must be 1, or 0 for one that "
                "is context only"
            )
        if message["role"] != "assistant" or weight == 0:
            continue
        if place == 0:
            raise DataError("message 0 is the assistant's: put what it answers before it")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(
                f"message {place} is the assistant's and has neither content nor tool_calls: "
                "write what it says"
            )
        places.append(place)
    if not places:
        raise DataError(
            "there is no message of the assistant's to learn: add one, or leave the line out"
        )
    return places


def _said(message: Message, thinking: bool | None) -> Message:
    """What the template is given of a message."""
    said = {key: value for key, value in message.items() if key not in ABOUT_TRAINING}
    if message["role"] != "assistant":
        return said
    if thinking and thought_of(message) is None:
        said["reasoning_content"] = ""
    if said.get("tool_calls") and said.get("content") == "":
        del said["content"]  # R1's distils and V3 write calls only beside no content at all
    return said


@dataclass(frozen=True)
class _Reader:
    """Asks the template of one conversation for prompts and answers."""

    tokenizer: Tokenizer
    turns: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None

    def read(self, place: int, thinking: bool | None) -> tuple[list[int], list[int]]:
        """The prompt of the assistant's turn at `place`, and the turn up to its end."""
        before, turn = self.turns[:place], self.turns[place]
        thought = thought_of(turn)
        if thinking is False and thought:
            raise DataError(
                f"message {place} has a thought, though thinking is false: leave out one of them"
            )
        asked = thought is not None
        prompt = self._ids(before, asked, prompted=True)
        whole = self._ids([*before, turn], asked)
        bare = self._ids([*before, _without_thought(turn)], asked) if asked else whole
        lost = bool(thought and thought.strip()) and whole == bare
        answer = None if lost else self._beyond(prompt, whole)
        if answer is None and self.tokenizer.opens_thought(prompt):
            answer = self._behind_opened(prompt, thought or "", bare)
        if answer is None and lost:
            raise DataError(
                f"the chat template leaves out the thought of message {place}: use a template "
                "that writes it, leave it out too, give the message the weight 0, or, where the "
                f"template lets it pass, put it into the content behind {THINK_BEGIN}"
            )
        if answer is None:
            raise DataError(
                f"the chat template writes message {place} otherwise than it asks for it: the "
                f"prompt ends in {self.tokenizer.decode(prompt[-12:])!r}, which is not how the "
                "conversation goes on; use a template whose prompt begins what it writes"
            )
        self._check_calls(place, answer)
        return prompt, self._up_to_end(answer)

    def _check_calls(self, place: int, answer: list[int]) -> None:
        text = self.tokenizer.decode(answer)
        for call in self.turns[place].get("tool_calls") or []:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or name not in text:
                raise DataError(
                    f"the chat template leaves out a call in message {place}, {call!r:.80}: use "
                    "a template that writes calls, or give the message the weight 0"
                )

    def _ids(
        self, turns: Sequence[Message], thinking: bool, *, prompted: bool = False
    ) -> list[int]:
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=prompted, thinking=thinking, tools=self.tools
        )

    def _beyond(self, prompt: list[int], whole: list[int]) -> list[int] | None:
        """What `whole` has beyond the prompt; None if its text begins in another way.

        Where one token reaches over the border (two line ends, say), the part beyond is encoded
        apart: the model goes on from the prompt as it is."""
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        shared = _shared(prompt, whole)
        rest = self.tokenizer.decode(prompt[shared:])
        for end in range(shared + 1, len(whole) + 1):
            if whole[end - 1] in self.tokenizer.special_tokens.values():
                return None
            text = self.tokenizer.decode(whole[shared:end])
            if text.endswith("\ufffd"):  # perhaps half a character
                continue
            if text.startswith(rest):
                return self.tokenizer.encode(text.removeprefix(rest)) + whole[end:]
            if not rest.startswith(text):
                return None
        return None

    def _behind_opened(self, prompt: list[int], thought: str, bare: list[int]) -> list[int] | None:
        """The answer where the prompt opens a thought and finished turns are written without, as
        in `bare`: R1's, which has line ends around its thoughts, and V3.1's, which has none."""
        tokenizer = self.tokenizer
        shared = _shared(prompt, bare)
        opening = tokenizer.decode(prompt[shared:])
        if opening.strip() != THINK_BEGIN:
            return None
        inner, outer = ("\n", "\n\n") if opening.endswith("\n") else ("", "")
        mark = tokenizer.encode(THINK_END, allow_special=True)
        content = bare[shared:]
        if content[: len(mark)] == mark:  # V3.1 writes it in front of every finished turn
            content = content[len(mark) :]
        return tokenizer.encode(thought + inner) + mark + tokenizer.encode(outer) + content

    def _up_to_end(self, answer: list[int]) -> list[int]:
        """Up to the end mark, without the line ends that a template may have behind it; with one
        where the template forgets it, or the model would never learn to end."""
        mark = end_mark(self.tokenizer)
        if mark is None:
            return answer
        last = len(answer) - 1 - answer[::-1].index(mark) if mark in answer else -1
        if last >= 0 and not self.tokenizer.decode(answer[last + 1 :]).strip():
            return answer[: last + 1]
        return [*answer, mark]


@functools.lru_cache(maxsize=8)
def end_mark(tokenizer: Tokenizer) -> int | None:
    """The special token that this template writes behind an answer; where it writes none, eos."""
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = tokenizer.apply_chat_template(probe, add_generation_prompt=False)
    markers = set(tokenizer.special_tokens.values())
    last = next((i for i in reversed(range(len(ids))) if ids[i] in markers), None)
    if last is None or tokenizer.decode(ids[last + 1 :]).strip():
        return tokenizer.eos_id
    return ids[last]


def _without_thought(turn: Message) -> Message:
    other = {key: value for key, value in turn.items() if key != "reasoning_content"}
    content = turn.get("content")
    if turn.get("reasoning_content") is None and isinstance(content, str):
        other["content"] = content.partition(THINK_END)[2]
    return other


def _shared(one: list[int], other: list[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
