"""An answer's tokens to what a client sees: thought, content, calls of tools, an end at a stop.

Stop strings are looked for in the content alone. A thought restates the question and would end on
a harness's `Question:` before any answer (vLLM matches there, and has that as an open bug; hosted
APIs do not); and the frame of a call, or its arguments, would be cut by a mere line end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.answer_events import Event, Kind, merged
from qiusuo.engine.stops import StopStrings
from qiusuo.engine.text_stream import Part, TextStream, ThoughtSplitter
from qiusuo.engine.tool_calls import ToolFormat


class AnswerStream:
    """``push`` every token but the one that ends the answer, then ``finish``.

    ``thought_open``: whether the prompt left a thought open; None for plain text, where nothing is
    a thought and no white space a frame. ``tools`` is None where calls are plain text too.

    ``stopped`` is the stop string that was met: the answer is over, and later tokens are dropped.
    It may appear in ``finish`` as well. ``reasoning_tokens`` are those up to the one that closed
    the thought, 0 where there was none."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        thought_open: bool | None,
        stops: Sequence[str] = (),
        tools: ToolFormat | None = None,
    ) -> None:
        self.text = TextStream(tokenizer)
        self.splitter = None if thought_open is None else ThoughtSplitter(thought_open)
        self.calls = None if tools is None else tools.parser()
        self.stops = StopStrings(stops)
        self.tokens = self.reasoning_tokens = 0

    @property
    def stopped(self) -> str | None:
        return self.stops.stopped

    @property
    def in_thought(self) -> bool:
        return self.splitter is not None and self.splitter.part is Part.THOUGHT

    def push(self, token: int) -> list[Event]:
        if self.stopped is not None:
            return []
        thinking = self.in_thought
        self.tokens += 1
        events = self._events(self._parts(self.text.push(token)))
        if thinking or self.in_thought:
            self.reasoning_tokens = self.tokens
        return events

    def finish(self, reason: str) -> list[Event]:
        """What was held back. ``reason``: "stop" if the model was done, else ("length") it was cut
        off, and a call that is not whole ends with a flaw."""
        if self.stopped is not None:
            return []
        parts = [*self._parts(self.text.finish())]
        if self.splitter is not None:
            parts += self.splitter.finish()
        events = self._events(parts)
        if self.calls is not None:
            events += self._stopped_at(self.calls.finish(cut=reason != "stop"))
        return merged([*events, *_content(self.stops.finish())])

    def _parts(self, text: str) -> Iterable[tuple[Part, str]]:
        return [(Part.ANSWER, text)] if self.splitter is None else list(self.splitter.push(text))

    def _events(self, parts: Iterable[tuple[Part, str]]) -> list[Event]:
        events: list[Event] = []
        for part, text in parts:
            if part is Part.THOUGHT:
                events.append(Event(Kind.THOUGHT, text))
            elif self.calls is None:
                events += self._stopped_at(_content(text))
            else:
                events += self._stopped_at(self.calls.push(text))
        return merged(events)

    def _stopped_at(self, events: Iterable[Event]) -> list[Event]:
        """The events up to a stop string in their content. A call parts the content before it
        from that behind it: no stop string spans both."""
        given: list[Event] = []
        for event in events:
            if self.stopped is not None:
                break
            if event.kind is Kind.CONTENT:
                given += _content(self.stops.push(event.text)[0])
            else:
                if event.kind is Kind.CALL_BEGIN:
                    given += _content(self.stops.finish())
                given.append(event)
        return given


def _content(text: str) -> list[Event]:
    return [Event(Kind.CONTENT, text)] if text else []
