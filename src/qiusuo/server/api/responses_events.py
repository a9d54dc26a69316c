"""An answer as the items of a response, event by event, in the order of DeepSeek's stream.

An item is a thought, a text or a call. What is told of an item while it grows and what stands in
the response in the end are made here from the same pieces, so a response that is not streamed is
what its own stream would have ended with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qiusuo.engine.answer_events import Event, Flaw, Kind
from qiusuo.engine.asking import Usage
from qiusuo.server.api.chat_chunks import call_id, finish_reason
from qiusuo.server.api.errors import ApiError
from qiusuo.server.api.responses_items import sealed
from qiusuo.server.api.responses_request import ResponsesRequest
from qiusuo.server.api.token_texts import TokenTexts

Told = dict[str, Any]
CUT_OFF = "the server ended the answer before it was whole"


@dataclass
class _Growing:
    """The item that is being told."""

    kind: str  # "reasoning", "message" or "function_call"
    id: str
    index: int
    call: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Told] = field(default_factory=list)

    @property
    def place(self) -> Told:
        return {"item_id": self.id, "output_index": self.index}

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def part(self, text: str) -> Told:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = list(self.logprobs) if text else []
        return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}


class ResponseEvents:
    """``push`` every event of the answer, then ``finish`` or ``fail``; ``response`` is the whole.

    ``texts``: where log-probabilities were asked for."""

    def __init__(
        self,
        request_id: str,
        created: int,
        model: str,
        body: ResponsesRequest,
        texts: TokenTexts | None = None,
    ) -> None:
        self.request_id, self.texts, self.seal = request_id, texts, body.wants_seal
        self.output: list[Told] = []
        self.response = _opening(request_id, created, model, body)
        self._growing: _Growing | None = None
        self._items = self._calls = self._events = 0

    def begin(self) -> Iterator[Told]:
        yield self._event("created", response=dict(self.response))
        yield self._event("in_progress", response=dict(self.response))

    def push(self, event: Event) -> Iterator[Told]:
        match event.kind:
            case Kind.THOUGHT:
                yield from self._go_on("reasoning", event)
            case Kind.CONTENT:
                yield from self._go_on("message", event)
            case Kind.CALL_BEGIN:
                yield from self._close(phase="commentary")
                yield from self._begin("function_call", "fc", event.name or "")
            case Kind.ARGUMENTS:
                yield self._delta("function_call_arguments", event.text)
            case Kind.CALL_END:
                cut = event.flaw is Flaw.UNFINISHED
                yield from self._close("incomplete" if cut else "completed")

    def finish(self, reason: str, usage: Usage) -> Iterator[Told]:
        """``reason``: the engine's finish_reason."""
        told = finish_reason(reason)
        if told == "insufficient_system_resource":
            yield from self.fail(ApiError(503, CUT_OFF), usage)
            return
        if told == "length":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        yield from self._end("incomplete" if told == "length" else "completed", usage)

    def fail(self, error: ApiError, usage: Usage | None = None) -> Iterator[Told]:
        self.response["error"] = {"code": "server_error", "message": error.message}
        yield from self._end("failed", usage)

    # -- items ------------------------------------------------------------------------------

    def _go_on(self, kind: str, event: Event) -> Iterator[Told]:
        if self._growing is None or self._growing.kind != kind:
            yield from self._close()
            yield from self._begin(kind, "rs" if kind == "reasoning" else "msg")
        if kind == "reasoning":
            yield self._delta("reasoning_text", event.text, content_index=0)
        else:
            logprobs = [self.texts.told(one) for one in event.drawn] if self.texts else []
            self._item.logprobs += logprobs
            yield self._delta("output_text", event.text, content_index=0, logprobs=logprobs)

    def _begin(self, kind: str, letters: str, name: str = "") -> Iterator[Told]:
        index = self._items
        item = _Growing(kind, f"{letters}_{self.request_id}_{index}", index, name=name)
        self._items, self._growing = index + 1, item
        if kind == "function_call":
            item.call = call_id(self._calls)
            self._calls += 1
        yield self._event(
            "output_item.added", item=self._told("in_progress"), output_index=item.index
        )
        if kind != "function_call":
            part = item.part("")
            yield self._event("content_part.added", content_index=0, part=part, **item.place)

    def _delta(self, what: str, text: str, **more: Any) -> Told:
        self._item.pieces.append(text)
        return self._event(f"{what}.delta", delta=text, **more, **self._item.place)

    def _close(self, status: str = "completed", phase: str = "final_answer") -> Iterator[Told]:
        item = self._growing
        if item is None:
            return
        text, place = item.text, item.place
        if item.kind == "function_call":
            yield self._event("function_call_arguments.done", arguments=text, **place)
        else:
            part, place = item.part(text), place | {"content_index": 0}
            if item.kind == "reasoning":
                yield self._event("reasoning_text.done", text=text, **place)
            else:
                logprobs = part["logprobs"]
                yield self._event("output_text.done", text=text, logprobs=logprobs, **place)
            yield self._event("content_part.done", part=part, **place)
        done = self._told(status, phase)
        self.output.append(done)
        self._growing = None
        yield self._event("output_item.done", item=done, output_index=item.index)

    @property
    def _item(self) -> _Growing:
        assert self._growing is not None
        return self._growing

    def _told(self, status: str, phase: str = "final_answer") -> Told:
        """The item as it stands; while it grows without its text."""
        item, grown = self._item, status != "in_progress"
        told: Told = {"type": item.kind, "id": item.id, "status": status}
        if item.kind == "function_call":
            arguments = item.text if grown else ""
            return told | {"call_id": item.call, "name": item.name, "arguments": arguments}
        content = [item.part(item.text)] if grown else []
        if item.kind == "message":
            return told | {"role": "assistant", "phase": phase, "content": content}
        seal = sealed(item.text) if grown and self.seal else None
        return told | {"content": content, "summary": [], "encrypted_content": seal}

    # -- the response -----------------------------------------------------------------------

    def _end(self, status: str, usage: Usage | None) -> Iterator[Told]:
        yield from self._close("completed" if status == "completed" else "incomplete")
        self.response |= {"status": status, "output": self.output}
        if status != "failed":
            self.response["completed_at"] = int(time.time())
        if usage is not None:
            self.response["usage"] = usage_told(usage)
        yield self._event(status, response=self.response)

    def _event(self, kind: str, **fields: Any) -> Told:
        number = self._events
        self._events += 1
        return {"type": f"response.{kind}", **fields, "sequence_number": number}


def usage_told(usage: Usage) -> Told:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _opening(request_id: str, created: int, model: str, body: ResponsesRequest) -> Told:
    """The response before there is an answer: what was asked, and what was left out as it holds."""
    reasoning, text = body.reasoning, body.text
    choice = body.tool_choice or "auto"
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "content_filters": None,
        "error": None,
        "frequency_penalty": 0.0,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "moderation": None,
        "output": [],
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "prompt_cache_retention": None,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _format(body), "verbosity": text.verbosity if text else None},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [one.model_dump() for one in body.tools or () if one.type == "function"],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def _format(body: ResponsesRequest) -> Told:
    form = body.text.format if body.text else None
    if form is None or form.type != "json_schema":
        return {"type": form.type if form else "text"}
    return form.model_dump(by_alias=True)
