"""The rules of regulated verse (近体诗), one function each, on modern tones and 中华新韵.

* Form: four or eight lines of five or seven characters, each with its stop.
* Rhyme: the even lines end on level tones of one class, no character twice. The first line may
  rhyme too, and must if its end is level.
* Tones: in every line the second, fourth (and sixth) character alternate; the lines of a couplet
  oppose each other (对), and a couplet begins as the last one ended (粘). Odd lines after the first
  end oblique. The first, third and fifth character are free. So the second character of the poem
  decides all. The licence 平平仄平仄 is not granted.

Two faults that a poem may have and still keep the rules are counted: three level tones at a line's
end (三平尾), and a rhyming line with a lone level tone before its end (孤平).

A character with two readings satisfies a rule if one of them does, the same one for tone and rhyme.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qiusuo.tasks.verse_readings import CLASSES, LEVEL, OBLIQUE, Readings, readings


@dataclass(frozen=True)
class Form:
    """`lines` lines of `width` characters."""

    name: str
    full_name: str
    lines: int
    width: int


FORMS = {
    form.name: form
    for form in (
        Form("五绝", "五言绝句", 4, 5),
        Form("七绝", "七言绝句", 4, 7),
        Form("五律", "五言律诗", 8, 5),
        Form("七律", "七言律诗", 8, 7),
    )
}
INNER_STOPS, COUPLET_STOPS, LAST_STOPS = "，、；：？！", "。；？！", "。？！"
LINE = re.compile(r"([\u4e00-\u9fff]+)([，、；：。？！])\s*")
LONGEST = 400  # characters; 七律 with every stop and break has 80
OPPOSITE = {LEVEL: OBLIQUE, OBLIQUE: LEVEL}


def without_head(answer: str, title: str) -> str | None:
    """The verse, whether or not the asked title stands above it; None if it has another."""
    if not answer.startswith("《"):
        return answer
    head = f"《{title}》"
    return answer[len(head) :] if answer.startswith(head) else None


def verse_lines(text: str, form: Form) -> tuple[str, ...] | None:
    """The lines without stops, or None if the text is anything but verse of this form."""
    text = text.strip()
    if len(text) > LONGEST:
        return None
    lines: list[str] = []
    place = 0
    while found := LINE.match(text, place):
        last, inner = len(lines) == form.lines - 1, len(lines) % 2 == 0
        stops = LAST_STOPS if last else INNER_STOPS if inner else COUPLET_STOPS
        if len(found[1]) != form.width or found[2] not in stops:
            return None
        lines.append(found[1])
        place = found.end()
    whole = place == len(text) and len(lines) == form.lines
    return tuple(lines) if whole else None


def rhyme_classes(lines: Sequence[str]) -> tuple[str, ...]:
    """The classes in which the poem rhymes: none, one, or two where readings leave it open."""
    characters = [line[-1] for line in lines[1::2]]
    if len(set(characters)) < len(characters) or lines[0][-1] in characters:
        return ()
    first, *even = (readings(line)[-1] for line in (lines[0], *lines[1::2]))

    def rhymes(end: Readings, name: str) -> bool:
        return (LEVEL, name) in end

    return tuple(
        name
        for name in CLASSES
        if all(rhymes(end, name) for end in even)
        and (_may_be(first, OBLIQUE) or rhymes(first, name))
    )


@dataclass(frozen=True)
class Tones:
    """How the poem fits the better of the two patterns. `kept` is the share of the places that
    the rules bind; `open_share` that of those where either tone could have been read."""

    pattern: tuple[str, ...]  # a line of 平 and 仄 for each line, as read to fit
    kept: float
    open_share: float
    three_level_ends: int
    lone_levels: int


def tones(lines: Sequence[str]) -> Tones:
    """Tones of lines of one length, five or seven."""
    sounds = [readings(line) for line in lines]
    possible = [[frozenset(reading.tone for reading in char) for char in line] for line in sounds]
    patterns = (_bound(len(lines), len(lines[0]), second) for second in (LEVEL, OBLIQUE))
    bound = max(patterns, key=lambda pattern: _kept(possible, pattern))
    read = tuple(
        "".join(
            wanted
            if (wanted := bound.get((row, place))) in tone_set
            else _usual(sounds[row][place])
            for place, tone_set in enumerate(line)
        )
        for row, line in enumerate(possible)
    )
    return Tones(
        pattern=read,
        kept=_kept(possible, bound) / len(bound),
        open_share=sum(len(possible[row][place]) > 1 for row, place in bound) / len(bound),
        three_level_ends=sum(line.endswith(LEVEL * 3) for line in read),
        lone_levels=sum(_lone_level(line) for line in read),
    )


def _bound(lines: int, width: int, start: str) -> dict[tuple[int, int], str]:
    """(line, place) -> tone, for a poem whose second character is `start`."""
    bound = {}
    second = start
    for line in range(lines):
        for place in range(1, width - 1, 2):
            bound[line, place] = second if place % 4 == 1 else OPPOSITE[second]
        if line:  # the first line's end is the rhyme's affair
            bound[line, width - 1] = LEVEL if line % 2 else OBLIQUE
        if line % 2 == 0:
            second = OPPOSITE[second]
    return bound


def _kept(possible: Sequence[Sequence[frozenset[str]]], bound: dict[tuple[int, int], str]) -> int:
    return sum(want in possible[line][place] for (line, place), want in bound.items())


def _lone_level(line: str) -> bool:
    """仄平仄仄平 at the end of a rhyming line: 平 stands alone between 仄 (its rhyme apart)."""
    return line[-5:] == OBLIQUE + LEVEL + OBLIQUE + OBLIQUE + LEVEL


def _usual(read: Readings) -> str:
    return read[0].tone if read else "？"


def _may_be(read: Readings, tone: str) -> bool:
    return any(reading.tone == tone for reading in read)
