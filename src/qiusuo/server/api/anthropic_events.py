"""An answer as the blocks of a message, event by event, in the order of Anthropic's stream.

The message that is not streamed is made of the same pieces, so it is what its own stream would have
come to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import from_json

from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.asking import Message, Usage
from qiusuo.engine.language_model import LanguageModel
from qiusuo.server.api.chat_chunks import call_id

Told = dict[str, Any]


class MessageEvents:
    """``push`` every event of the answer, then ``finish``; ``message`` is the whole."""

    def __init__(self, request_id: str, model: str, prompt_tokens: int) -> None:
        self.message: Told = {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            # What of it is in the cache is known, and told, at the end.
            "usage": usage_told(Usage(prompt_tokens, 0, 0, 0)),
        }
        self._block: Told | None = None
        self._pieces: list[str] = []
        self._calls = 0

    def begin(self) -> Iterator[Told]:
        yield {"type": "message_start", "message": self.message | {"content": []}}

    def push(self, event: Event) -> Iterator[Told]:
        match event.kind:
            case Kind.THOUGHT:
                if not self._in("thinking"):
                    yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                yield self._piece("thinking_delta", "thinking", event.text)
            case Kind.CONTENT:
                if not self._in("text"):
                    yield from self._open({"type": "text", "text": ""})
                yield self._piece("text_delta", "text", event.text)
            case Kind.CALL_BEGIN:
                use = {"type": "tool_use", "id": call_id(self._calls), "name": event.name}
                self._calls += 1
                yield from self._open(use | {"input": {}})
            case Kind.ARGUMENTS:
                yield self._piece("input_json_delta", "partial_json", event.text)
            case Kind.CALL_END:
                yield from self._close()

    def finish(self, reason: str, stopped: str | None, usage: Usage) -> Iterator[Told]:
        """``reason``: the engine's finish_reason; ``stopped``: the stop sequence that was met."""
        yield from self._close()
        told = {
            "stop_reason": stop_reason(reason, stopped),
            "stop_sequence": stopped if reason == "stop" else None,
        }
        self.message |= told | {"usage": usage_told(usage)}
        yield {"type": "message_delta", "delta": told, "usage": self.message["usage"]}
        yield {"type": "message_stop"}

    # -- blocks -----------------------------------------------------------------------------

    @property
    def _index(self) -> int:
        return len(self.message["content"])

    def _in(self, kind: str) -> bool:
        return self._block is not None and self._block["type"] == kind

    def _open(self, block: Told) -> Iterator[Told]:
        yield from self._close()
        self._block, self._pieces = block, []
        yield {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _piece(self, kind: str, name: str, text: str) -> Told:
        self._pieces.append(text)
        return self._delta({"type": kind, name: text})

    def _delta(self, delta: Told) -> Told:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Told]:
        block, index = self._block, self._index
        if block is None:
            return
        text = "".join(self._pieces)
        match block["type"]:
            case "thinking":  # clients want one, and send it back; nobody looks at it here
                signature = self.message["id"]
                block |= {"thinking": text, "signature": signature}
                yield self._delta({"type": "signature_delta", "signature": signature})
            case "text":
                block["text"] = text
            case _:
                block["input"] = _input(text)
        self.message["content"].append(block)
        self._block = None
        yield {"type": "content_block_stop", "index": index}


def _input(arguments: str) -> Told:
    """The object, as far as it goes: what Anthropic's clients make of a stream that is cut off."""
    try:
        told = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def usage_told(usage: Usage) -> Told:
    """``input_tokens``: those that were not in the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "service_tier": "standard",
    }


def stop_reason(reason: str, stopped: str | None) -> str:
    """What the server cut off, for its own reasons, is told as cut off, too."""
    if reason == "tool_calls":
        return "tool_use"
    if reason != "stop":
        return "max_tokens"
    return "end_turn" if stopped is None else "stop_sequence"


def stop_sequence(lm: LanguageModel, answer: Message, stops: Sequence[str]) -> str | None:
    """Which of the stop sequences ended the answer, by the engine's own rule: the first to be
    complete, of those complete at one character the longest. It ends in the last token."""
    ids = answer.token_ids
    if answer.finish_reason != "stop" or not stops or not ids or ids[-1] in lm.stop_ids:
        return None
    tokenizer = lm.needed_tokenizer()
    text, before = tokenizer.decode(ids), tokenizer.decode(ids[:-1]).rstrip("\ufffd")
    ends = []
    for stop in stops:
        place = text.find(stop, max(0, len(before) - len(stop) + 1))
        if place >= 0:
            ends.append((place + len(stop), -len(stop), stop))
    return min(ends)[2] if ends else None
