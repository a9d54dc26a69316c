"""How a problem is put to a model, and how its words are read: one way for training and measuring.

Everything goes through the tokenizer's chat template, so a model is trained, measured and served on
the same tokens. The models made here get `Problem.prompt` as the user's message, pulled ones
`Problem.question`. The template's generation prompt may open a thought (`<think>`), close it before
it began (`</think>`), or do neither; verifiers read whole responses, so what the prompt opened is
put before what the model wrote.

    prompt    <bos><｜User｜>07+35=<｜Assistant｜><think>
    words     07+35=321</think>321<eos>
    response  <think>07+35=321</think>321
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from qiusuo.data.chat_template import Message
from qiusuo.data.errors import DataError, unknown
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.tasks.task import END_THINK, THINK, Problem, response_of

Ask = Literal["prompt", "question"]
MARKS = re.compile(f"({THINK}|{END_THINK})")
PROBES = ("1+1=2?", " ?\n", "\n\n? <", "\t?")  # what a template might trim or escape
PROBE_TOKENS = 64  # at the end of a prompt; a vocabulary without the marks spells them out


def text_of(problem: Problem, ask: Ask) -> str:
    """What the user says to ask it."""
    return problem.prompt if ask == "prompt" else problem.question


@dataclass(frozen=True)
class Asker:
    """`ask`: which text of a problem is the user's message. `thinking` asks the template for a
    thought; those that do not know the question render the same either way. `system` is said first,
    None for nothing.

    `DataError` for a tokenizer without a chat template, at the first prompt."""

    tokenizer: Tokenizer
    ask: Ask = "prompt"
    thinking: bool = True
    system: str | None = None

    def __post_init__(self) -> None:
        if self.ask not in get_args(Ask):
            raise unknown("way to ask", self.ask, get_args(Ask))

    def messages(self, problem: Problem) -> list[Message]:
        """The conversation, up to the user's message."""
        return self._turns(self.text(problem))

    def text(self, problem: Problem) -> str:
        """The user's message."""
        return text_of(problem, self.ask)

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The tokens that the model goes on from, the generation prompt included."""
        text = self.text(problem)
        if self._frame is None or any(mark in text for mark in self.tokenizer.special_tokens):
            return self._rendered(self.messages(problem))
        before, after = self._frame
        return [*before, *self.tokenizer.encode(text), *after]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]] | None:
        """The ids before and behind the user's message, where the template puts it between two
        special tokens as it stands: then the message's own ids are all that changes, and a
        template costs as much as all else in making a problem. None where it does not."""
        encode, special = self.tokenizer.encode, set(self.tokenizer.special_tokens.values())
        whole = self._rendered(self._turns(PROBES[0]))
        inner = encode(PROBES[0])
        starts = [at for at in range(len(whole)) if whole[at : at + len(inner)] == inner and at > 0]
        if len(starts) != 1:
            return None
        [at] = starts
        before, after = whole[:at], whole[at + len(inner) :]
        if not after or before[-1] not in special or after[0] not in special:
            return None
        as_they_stand = all(
            self._rendered(self._turns(text)) == [*before, *encode(text), *after] for text in PROBES
        )
        return (before, after) if as_they_stand else None

    @cached_property
    def opened(self) -> str:
        """What the generation prompt leaves a response with: `<think>`, `</think>` or nothing."""
        ids = self._rendered(self._turns("?"))
        tail = self.tokenizer.decode(ids[-PROBE_TOKENS:]).rstrip()
        return next((mark for mark in (END_THINK, THINK) if tail.endswith(mark)), "")

    def response(self, text: str) -> str:
        """The whole response, as `Task.verify` reads it, from the text a model wrote (with its
        marks, without the end token). Words without any mark, where none was opened, are an answer
        without a thought."""
        if self.opened or THINK in text or END_THINK in text:
            return self.opened + text
        return response_of("", text)

    def answer_ids(self, response: str) -> list[int]:
        """The inverse, to learn from: the tokens of a response (as `Task.solution` gives it) behind
        the prompt, the end token last. Of what they say only the marks of a thought may be special
        tokens.

        `DataError` for a response with a thought where the prompt has closed it, for one without a
        closed thought, and for a tokenizer without an end token."""
        if self.tokenizer.eos_id is None:
            raise DataError("the tokenizer names no eos_token: nothing can end an answer")
        thought, end, answer = response.partition(END_THINK)
        if not end:
            raise DataError(f"a response needs {END_THINK} before its answer, not {response!r:.80}")
        thought = thought.removeprefix(THINK)
        if self.opened == END_THINK:
            if thought:
                raise DataError(
                    "a response with a thought cannot stand behind a prompt that ends in "
                    f"{END_THINK}: ask with thinking, or leave the thought empty"
                )
            text = answer
        elif self.opened == THINK:
            text = f"{thought}{END_THINK}{answer}"
        else:
            text = response_of(thought, answer) if thought else answer
        return [*self._encoded(text), self.tokenizer.eos_id]

    def _turns(self, text: str) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": text}]

    def _rendered(self, messages: list[Message]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, thinking=self.thinking)

    def _encoded(self, text: str) -> list[int]:
        """Marks that are no tokens of this vocabulary are text, and stay with theirs."""
        special = self.tokenizer.special_tokens
        if THINK not in special or END_THINK not in special:
            return self.tokenizer.encode(text)
        pieces = filter(None, MARKS.split(text))
        return [
            index
            for piece in pieces
            for index in ([special[piece]] if piece in special else self.tokenizer.encode(piece))
        ]
