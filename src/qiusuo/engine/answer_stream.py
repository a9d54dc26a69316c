"""An answer's tokens to what a client sees: thought, content, calls of tools, an end at a stop.

Stop strings are looked for in the content alone. A thought restates the question and would end on
a harness's `Question:` before any answer (vLLM matches there, and has that as an open bug; hosted
APIs do not); and the frame of a call, or its arguments, would be cut by a mere line end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.tool_format import ToolFormat
from qiusuo.engine.answer_events import Event, Kind, merged
from qiusuo.engine.origins import Origins
from qiusuo.engine.sampler import Drawn
from qiusuo.engine.stops import StopStrings
from qiusuo.engine.text_stream import Part, TextStream, ThoughtSplitter
from qiusuo.engine.tool_calls import parser_of


class AnswerStream:
    """``push`` every token but the one that ends the answer, then ``finish``.

    ``thought_open``: whether the prompt left a thought open; None for plain text, where nothing is
    a thought and no white space a frame. ``tools`` is None where calls are plain text too.
    ``continued``: the answer, or the thought that is open, goes on with words of the prompt.
    ``keep_drawn``: the events tell which tokens they came from; every push then has its own.

    ``stopped`` is the stop string that was met: the answer is over, and later tokens are dropped.
    It may appear in ``finish`` as well. ``reasoning_tokens`` are those up to the one that closed
    the thought, 0 where there was none."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        thought_open: bool | None,
        stops: Sequence[str] = (),
        tools: ToolFormat | None = None,
        continued: bool = False,
        keep_drawn: bool = False,
    ) -> None:
        self.text = TextStream(tokenizer)
        self.origins = Origins() if keep_drawn else None
        self.splitter = None if thought_open is None else ThoughtSplitter(thought_open)
        if self.splitter is not None and continued:
            self.splitter.begun, self.splitter.may_open = True, False
        self.calls = None if tools is None else parser_of(tools)
        self.stops = StopStrings(stops)
        self.tokens = self.reasoning_tokens = 0

    @property
    def stopped(self) -> str | None:
        return self.stops.stopped

    @property
    def in_thought(self) -> bool:
        return self.splitter is not None and self.splitter.part is Part.THOUGHT

    def push(self, token: int, drawn: Drawn | None = None) -> list[Event]:
        if self.stopped is not None:
            return []
        thinking = self.in_thought
        self.tokens += 1
        if self.origins is not None and drawn is not None:
            self.origins.token(drawn)
        events = self._read(self.text.push(token))
        if thinking or self.in_thought:
            self.reasoning_tokens = self.tokens
        return events

    def finish(self, reason: str) -> list[Event]:
        """What was held back. ``reason``: "stop" if the model was done, else ("length") it was cut
        off, and a call that is not whole ends with a flaw."""
        if self.stopped is not None:
            return []
        events = self._read(self.text.finish())
        if self.splitter is not None:
            events += self._events(self.splitter.finish())
        if self.calls is not None:
            events += self._stopped_at(self.calls.finish(cut=reason != "stop"))
        return merged([*events, *self._content(self.stops.finish())])

    def _read(self, text: str) -> list[Event]:
        if self.origins is None:
            return self._events(self._parts(text))
        events: list[Event] = []
        for character in text:
            thinking = self.in_thought
            marks = () if thinking or self.calls is None else self.calls.marks
            self.origins.character(character, marks)
            events += self._events(self._parts(character))
            if thinking != self.in_thought:  # it was the last of a mark
                self.origins.skip()
        return merged(events)

    def _parts(self, text: str) -> Iterable[tuple[Part, str]]:
        return [(Part.ANSWER, text)] if self.splitter is None else list(self.splitter.push(text))

    def _events(self, parts: Iterable[tuple[Part, str]]) -> list[Event]:
        events: list[Event] = []
        for part, text in parts:
            if part is Part.THOUGHT:
                drawn = () if self.origins is None else self.origins.thought(text)
                events.append(Event(Kind.THOUGHT, text, drawn=drawn))
            elif self.calls is None:
                events += self._stopped_at([Event(Kind.CONTENT, text)] if text else [])
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
                if self.origins is not None:
                    self.origins.hold(event.text)
                given += self._content(self.stops.push(event.text)[0])
            else:
                if event.kind is Kind.CALL_BEGIN:
                    given += self._content(self.stops.finish())
                if self.origins is not None:
                    self.origins.skip()
                given.append(event)
        return given

    def _content(self, text: str) -> list[Event]:
        drawn = () if self.origins is None else self.origins.content(len(text))
        return [Event(Kind.CONTENT, text, drawn=drawn)] if text else []
