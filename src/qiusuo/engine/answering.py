"""One answer followed from its tokens to its text, and steered where it was asked to be.

Hangs on a sequence as its ``on_token``: hears every token the moment it is drawn, tells text from
thought and calls (answer_stream.py), ends the answer at a stop string, closes a thought that has
used up its budget, and lets a constraint begin only where the answer itself does.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import THINK_END
from qiusuo.engine.answer_events import Event
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.request import Sequence
from qiusuo.engine.sampler import Drawn

if TYPE_CHECKING:
    from qiusuo.engine.constraint import Matcher

OnEvent = Callable[[Event], None]


class Answering:
    """``thinking_budget``: tokens a thought may have before it is closed for the model.
    ``matcher``: a constraint, for the answer and not for the thought."""

    def __init__(
        self,
        sequence: Sequence,
        stream: AnswerStream,
        *,
        tokenizer: Tokenizer,
        thinking_budget: int | None = None,
        matcher: Matcher | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        self.sequence, self.stream, self.on_event = sequence, stream, on_event
        self.thinking_budget, self.matcher = thinking_budget, matcher
        self.closing = closing_ids(tokenizer)
        self.closed = False
        self.events: list[Event] = []
        self._steer()
        sequence.on_token = self._hear

    def close_thought(self) -> None:
        """Let the model answer now, whatever it still had in mind. Nothing where it does."""
        if self.stream.in_thought and not self.closed:
            self.closed = True
            self.sequence.forced = list(self.closing)
            self.sequence.drafts = []

    def finish(self) -> list[Event]:
        """What was held back; call it once the sequence has ended."""
        self._give(self.stream.finish(self.sequence.finish_reason or "length"))
        if self.stream.stopped is not None and self.sequence.finish_reason == "length":
            self.sequence.finish_reason = "stop"
        return self.events

    def _hear(self, sequence: Sequence, drawn: Drawn) -> str | None:
        self.stream.stops.watching = sequence.answered >= sequence.request.sampling.min_tokens
        if drawn.token not in sequence.request.end_ids:
            self._give(self.stream.push(drawn.token, drawn))
        self._steer()
        return None if self.stream.stopped is None else "stop"

    def _steer(self) -> None:
        if not self.stream.in_thought:
            self.sequence.matcher = self.matcher
        elif self.thinking_budget is not None and self.stream.tokens >= self.thinking_budget:
            self.close_thought()

    def _give(self, events: SequenceOf[Event]) -> None:
        self.events += events
        if self.on_event is not None:
            for event in events:
                self.on_event(event)


def closing_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that close a thought."""
    return tokenizer.encode(THINK_END, allow_special=True)
