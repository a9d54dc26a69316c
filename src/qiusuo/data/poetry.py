"""Classical Chinese verse out of the chinese-poetry collection, as clean documents.

    《静夜思》李白
    床前明月光，
    疑是地上霜。
    举头望明月，
    低头思故乡。

Editors' notes in brackets go, and so do the marks for lost or composed characters; where such a
mark stood inside a line the line comes out short, which is how `regular_verse` finds the poems
that are whole and in one of the four regular forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOTES = re.compile(r"（[^（）]*）|\([^()]*\)|【[^】]*】|〔[^〕]*〕|〖[^〗]*〗|\[[^\]]*\]|\{[^}]*\}")
STOPS = "，。？！；：、"
NOT_VERSE = re.compile(rf"[^\u4e00-\u9fff{STOPS}]")
NOT_TITLE = re.compile(r"[^\u4e00-\u9fff，。、：· ]")
LINE = re.compile(rf"([^{STOPS}]+)([{STOPS}]?)[{STOPS}]*")
HAN = re.compile(r"[\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Poem:
    """`lines` pairs each line of verse with the one stop after it (perhaps empty)."""

    title: str
    author: str
    lines: tuple[tuple[str, str], ...]

    def text(self) -> str:
        """The poem as a document: 《title》author, then a line of verse a line."""
        verse = "".join(f"\n{line}{stop}" for line, stop in self.lines)
        return f"《{self.title}》{self.author}{verse}"

    def regular_verse(self) -> bool:
        """Whether it has 4 or 8 lines of 5 or of 7 characters: 五绝, 七绝, 五律 or 七律."""
        lengths = {len(line) for line, _ in self.lines}
        return len(self.lines) in (4, 8) and lengths in ({5}, {7})


def clean_poem(record: Mapping[str, Any]) -> Poem | None:
    """A poem from one record of the collection; None if no verse or no author is left.

    Song ci have the tune (`rhythmic`) for a title.
    """
    title = _clean_title(record.get("title") or record.get("rhythmic") or "")
    author = _clean_title(record.get("author") or "")
    lines = _clean_verse(record.get("paragraphs") or ())
    return Poem(title or "无题", author, lines) if author and lines else None


def _clean_title(title: str) -> str:
    return " ".join(NOT_TITLE.sub("", NOTES.sub("", title).replace("\u3000", " ")).split())


def _clean_verse(paragraphs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    verse = NOT_VERSE.sub("", NOTES.sub("", "".join(paragraphs)))
    return tuple((match[1], match[2]) for match in LINE.finditer(verse))
