"""No message can forge a marker: telling the template's special tokens from the user's text.

Once a template has been rendered, `<｜User｜>` written by the template and `<｜User｜>` typed by a
user look alike, and a prompt could be made to hold a turn that never took place. So the text of
the messages goes through the template in disguise: each character that begins or ends the spelling
of a special token (`<`, `>`, `|`, ...) is replaced, one for one, by a symbol that occurs nowhere
else. Trimming, splitting, joining and `tojson` work as before, positions stay the
same, and any marker in the rendered text that has neither end disguised is the template's own.

What is guaranteed: a special token comes out only where the template spells both its first and its
last character. What is allowed on purpose: `<think>` and `</think>` in an assistant's `content`,
which is how earlier thoughts come back and are stripped. What the guard cannot see: a template
that puts brackets of its own around a message's words (`<{{ name }}>`); roles, the one case met
in practice, are therefore taken from a fixed list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from qiusuo.data.chat_template import Message
from qiusuo.data.vocabularies import THINK_BEGIN, THINK_END

# Symbols of a notation for sign languages: nobody's text, and printable, because a template that
# writes a dict as Python does would spell a private-use character out as `\U0010fffd`.
STAND_INS = range(0x1D800, 0x1DA00)
Span = tuple[int, int]


def spelling_pattern(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the spellings, the longest where several begin."""
    longest_first = sorted(set(spellings), key=lambda s: (-len(s), s))
    # An empty alternation would match everywhere; this one matches nowhere.
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class TemplateGuard:
    """Disguises the messages of one conversation, and tells markers apart after rendering."""

    def __init__(self, spellings: Sequence[str], *haystacks: object) -> None:
        """`haystacks` are all the texts of the conversation, whose characters are avoided."""
        self._pattern = spelling_pattern(spellings)
        # A spelling that begins or ends like a word is only broken where it stands whole: its
        # letters are everywhere.
        wordlike = [s for s in spellings if s[0].isalnum() or s[-1].isalnum()]
        self._wordlike = spelling_pattern(wordlike)
        ends = {c for s in spellings for c in (s[0], s[-1]) if not c.isalnum() and not c.isspace()}
        ends |= {s[0] for s in wordlike}
        used = set().union(*map(_characters, haystacks))
        symbols = map(chr, chain(STAND_INS, range(0x10FFFD, 0, -1)))
        unused = (symbol for symbol in symbols if symbol not in used)
        self._stand_ins = dict(zip(sorted(ends), unused, strict=False))
        self._hide_table = str.maketrans(
            {c: s for c, s in self._stand_ins.items() if not c.isalnum()}
        )
        self._reveal_table = str.maketrans({s: c for c, s in self._stand_ins.items()})
        self._thinking = re.compile(f"({re.escape(THINK_BEGIN)}|{re.escape(THINK_END)})")

    def hide_message(self, message: Message) -> dict[str, Any]:
        """The message with its texts disguised, but for its role and an assistant's marks."""
        keep = message["role"] == "assistant"
        return {
            key: value
            if key == "role"
            else self.hide(value, keep_thinking=keep and key == "content")
            for key, value in message.items()
        }

    def hide(self, value: Any, *, keep_thinking: bool = False) -> Any:
        """Disguise every string inside `value`, keys included."""
        if isinstance(value, str):
            if keep_thinking:
                parts = self._thinking.split(value)
                parts[::2] = map(self._hide_text, parts[::2])
                return "".join(parts)
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {
                self.hide(key): self.hide(item, keep_thinking=keep_thinking)
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self.hide(item, keep_thinking=keep_thinking) for item in value]
        return value

    def reveal(self, rendered: str) -> tuple[str, list[Span]]:
        """The rendered text undisguised, and where in it the template's own markers stand."""
        spans = [match.span() for match in self._pattern.finditer(rendered)]
        return rendered.translate(self._reveal_table), spans

    def _hide_text(self, text: str) -> str:
        broken = self._wordlike.sub(lambda match: self._stand_ins[match[0][0]] + match[0][1:], text)
        return broken.translate(self._hide_table)


def _characters(value: object) -> set[str]:
    """Every character in the strings inside `value`."""
    if isinstance(value, str):
        return set(value)
    if isinstance(value, Mapping):
        return set().union(*(_characters(k) | _characters(v) for k, v in value.items()))
    if isinstance(value, Sequence):
        return set().union(*map(_characters, value))
    return set()
