"""A conversation as a file that one can keep, read and print."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

NAMES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


def as_markdown(conversation: Mapping[str, Any]) -> str:
    """The branch that is shown, each thought folded away."""
    lines = [f"# {_one_line(conversation['title']) or 'Conversation'}", ""]
    made = datetime.fromtimestamp(conversation["created"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines += [f"{made}{', ' + conversation['model'] if conversation['model'] else ''}", ""]
    if conversation["system"]:
        lines += ["## System", "", conversation["system"], ""]
    for message in branch(conversation):
        model = message.get("model") if message["role"] == "assistant" else None
        name = NAMES.get(message["role"], message["role"])
        lines += [f"## {name}{f' ({_one_line(model)})' if model else ''}", ""]
        for attachment in message.get("attachments") or ():
            lines += _fenced(attachment["text"], f"Attached: {_one_line(attachment['name'])}")
        if message.get("reasoning_content"):
            lines += ["<details><summary>Thought</summary>", "", message["reasoning_content"], ""]
            lines += ["</details>", ""]
        lines += [message["content"], ""]
        for call in message.get("tool_calls") or ():
            lines += _fenced(call["arguments"], f"Call of {_one_line(call['name'])}")
    return "\n".join(lines)


def branch(conversation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages from the first one to the leaf."""
    messages = {message["id"]: message for message in conversation["messages"]}
    place = conversation["leaf"] or next(reversed(messages), None)
    found: list[dict[str, Any]] = []
    while place in messages:
        message = messages.pop(place)
        found.append(message)
        place = message["parent"]
    return found[::-1]


def attachment_header(title: str, ending: str) -> str:
    """Content-Disposition with a name that any client can save (RFC 6266)."""
    name = "".join(char if char.isalnum() or char in " -_." else "-" for char in title).strip(" .")
    name = f"{name[:60] or 'conversation'}.{ending}"
    return f"attachment; filename=\"conversation.{ending}\"; filename*=UTF-8''{quote(name)}"


def _fenced(text: str, heading: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [heading, "", fence, text, fence, ""]


def _one_line(text: str) -> str:
    return " ".join(text.split())
