"""A turn of the assistant's that is not done: where it stands, and the text a model goes on from.

A client may give the beginning of the answer (DeepSeek's `prefix: true`), or of the thought before
it. Templates only know how to write turns that are over. So a template is asked to write this one
with a sign at the end of what is known, and what comes behind the sign is cut off: the end mark,
above all. Most templates leave the thoughts of finished turns out; then the turn is put behind the
prompt that opens a thought, with line ends at its end if there is one at its beginning (R1 writes
both, V3.1 neither).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qiusuo.data.chat_template import Message, check_messages, render_chat
from qiusuo.data.errors import DataError
from qiusuo.data.vocabularies import THINK_BEGIN, THINK_END

SIGNS = range(0x1D9FF, 0x1D900, -1)  # printable, and nobody's text; see template_guard.py


@dataclass(frozen=True)
class Turn:
    """An assistant's turn as far as it has come. ``open``: its thought goes on."""

    thought: str = ""
    content: str = ""
    open: bool = False

    @property
    def begun(self) -> bool:
        return bool(self.thought or self.content)

    @property
    def continued(self) -> bool:
        """Whether what comes next goes on with words that stand there."""
        return bool(self.thought if self.open else self.content)


def turn_so_far(messages: Sequence[Message], thinking: bool) -> Turn:
    """What the last message says, for a model to go on from; `DataError` if that cannot be.

    The thought is its `reasoning_content`, or stands between marks in its content. As in DeepSeek's
    API it goes on where `thinking` is asked for and there is no content yet; else it is whole. A
    mark in the content that nothing closes leaves it open too."""
    check_messages(messages)
    last = messages[-1]
    if last["role"] != "assistant":
        raise DataError(
            f"the last message is to be continued and is of the role {last['role']!r}: only one of "
            "the assistant's can be"
        )
    if last.get("tool_calls"):
        raise DataError("the last message has tool calls: such a turn is over, not continued")
    content, thought = _text(last.get("content")), last.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise DataError(f"reasoning_content must be a text, not {type(thought).__name__}")
    if thought is None and THINK_END in content:
        thought, _, content = content.partition(THINK_END)
        return Turn(thought.lstrip().removeprefix(THINK_BEGIN).strip(), content.lstrip())
    if thought is None and content.lstrip().startswith(THINK_BEGIN):
        return Turn(content.lstrip().removeprefix(THINK_BEGIN).lstrip(), open=True)
    return Turn(thought or "", content, open=bool(thought) and thinking and not content)


def render_unfinished(
    template: str,
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    **options: Any,
) -> str:
    """Render a conversation up to where its last turn ends. `options` as `render_chat` has them.

    A turn of which there is nothing yet is a new one. `DataError` where the template has no place
    for it; a whole thought that it has no place for is left out, as in turns that are over."""
    turn = turn_so_far(messages, thinking)
    *before, last = messages

    def render(turns: Sequence[Message], **asked: Any) -> str:
        return render_chat(template, turns, **options, **asked)

    if not turn.begun:
        return render(before, thinking=thinking or turn.open)
    told = f"{messages} {options} {template}"
    sign = next(sign for sign in map(chr, SIGNS) if sign not in told)
    kept = {key: last[key] for key in last if key in ("role", "name")}

    def up_to_sign(thought: str, content: str) -> str | None:
        said = {"content": content} | ({"reasoning_content": thought} if thought else {})
        text = render([*before, kept | said], thinking=thinking, add_generation_prompt=False)
        text, found, _ = text.partition(sign)
        return text if found else None

    text = up_to_sign(turn.thought + sign, turn.content) if turn.thought else None
    if text is not None and not turn.open:  # it writes thoughts
        text = up_to_sign(turn.thought, turn.content + sign)
    elif text is None and turn.thought:
        text = _behind_prompt(turn, render(before, thinking=True))
    if text is None and turn.content:
        text = up_to_sign("", turn.content + sign)
    if text is None:
        what = "text" if turn.content else "thought"
        raise DataError(
            f"this model's chat template has no place for the last message's {what}: it cannot be "
            "continued"
        )
    return text


def _behind_prompt(turn: Turn, prompt: str) -> str | None:
    """None where this prompt opens no thought."""
    opening = prompt.rstrip()
    if not opening.endswith(THINK_BEGIN):
        return None
    if turn.open:
        return prompt + turn.thought
    lines = ("\n", "\n\n") if len(opening) < len(prompt) else ("", "")
    return prompt + turn.thought + lines[0] + THINK_END + lines[1] + turn.content


def _text(content: object) -> str:
    """Of a text, of parts of text, or of nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    for text in texts:
        if not isinstance(text, str):
            raise DataError("only a message of text can be continued")
    return "".join(map(str, texts))
