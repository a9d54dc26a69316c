"""How a line of verse is read today: tones and rhymes of its characters, by Mandarin.

Tang verse was written to sounds that are gone; what can be checked by rule is modern: first and
second tone are level (平), third and fourth oblique (仄), and the rhymes are the fourteen classes
of 中华新韵 (2005), which go by the final alone.

Many characters have several readings. pypinyin's table has every reading of two thousand years
(明 mèng, 月 rù), and with it 28% of a Tang poem's characters could stand for either tone: a
policy would live in that hole. So a character has its first reading, and those that at least two
words of pypinyin's phrase table give it, and a fiftieth of its words; that leaves 7%, and but for
one character in a thousand it allows what the 现代汉语词典 (1983) does, or less. Where a word
decides, it does: 长江 is cháng, whatever 长 may be. Words are looked for within the feet of a line
(2+3, 2+2+3, a first four of seven too); where two words overlap, neither decides. A neutral tone is
no reading, and 一 and 不 keep the tones of the dictionary, whatever follows them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import NamedTuple

from qiusuo.tasks.task import TaskError

RHYMES: Mapping[str, tuple[str, ...]] = {
    "麻": ("a", "ia", "ua"),
    "波": ("o", "e", "uo"),
    "皆": ("ie", "ve", "ê"),
    "开": ("ai", "uai"),
    "微": ("ei", "uei"),
    "豪": ("ao", "iao"),
    "尤": ("ou", "iou"),
    "寒": ("an", "ian", "uan", "van"),
    "文": ("en", "in", "uen", "vn"),
    "唐": ("ang", "iang", "uang"),
    "庚": ("eng", "ing", "ueng", "ong", "iong"),
    "齐": ("i", "er", "v"),
    "支": ("-i",),  # zhi chi shi ri zi ci si
    "姑": ("u",),
}
ORDINALS = "一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四".split()
CLASSES = tuple(RHYMES)
CLASS_OF = {final: name for name, finals in RHYMES.items() for final in finals}

LEVEL, OBLIQUE = "平", "仄"
BUZZING = ("zh", "ch", "sh", "r", "z", "c", "s")  # their i is no [i]
UNCHANGED = {"一": "yī", "不": "bù"}  # words give them sandhi's tones
FEET = {5: ((0, 2), (2, 5)), 7: ((0, 2), (2, 4), (4, 7))}
LEAST_WORDS, LEAST_SHARE = 2, 0.02


class Reading(NamedTuple):
    """One way to read a character: LEVEL or OBLIQUE, and its class of 中华新韵."""

    tone: str
    rhyme: str


Readings = tuple[Reading, ...]  # the first is the usual one; empty: unknown, or toneless


def rhyme_name(rhyme: str) -> str:
    """The class as books print it: 庚 is 十一庚."""
    return ORDINALS[CLASSES.index(rhyme)] + rhyme


@lru_cache(maxsize=20_000)
def readings(line: str) -> tuple[Readings, ...]:
    """The readings of each character of a line, words taken into account.

    `TaskError` if pypinyin is not installed.
    """
    own = [_own(char) for char in line]
    decided = _by_words(line)
    return tuple(decided.get(place, alone) for place, alone in enumerate(own))


def _by_words(line: str) -> dict[int, Readings]:
    """Places that the one word over them decides."""
    words = _tables().words
    if len(line) == 7 and line[:4] in words:
        found = [(0, 4), *_words_of(line, 4, 7)]
    else:
        found = [span for foot in FEET.get(len(line), ()) for span in _words_of(line, *foot)]
    covered = Counter(place for start, end in found for place in range(start, end))
    decided: dict[int, Readings] = {}
    for start, end in found:
        if any(covered[place] > 1 for place in range(start, end)):
            continue
        for place, said in zip(range(start, end), words[line[start:end]], strict=True):
            if line[place] not in UNCHANGED and (read := _parsed(said)):
                decided[place] = read
    return decided


def _words_of(line: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    words = _tables().words
    if line[start:end] in words:
        yield start, end
        return
    for first in range(start, end - 2):
        for span in ((first, first + 2), (first + 1, first + 3)):
            if line[span[0] : span[1]] in words:
                yield span


@cache
def _own(char: str) -> Readings:
    """What a character may be by itself."""
    if char in UNCHANGED:
        return _parsed((UNCHANGED[char],))
    tables = _tables()
    said = tables.characters.get(ord(char), "").split(",")
    attested = tables.attested.get(char, Counter())
    least = max(LEAST_WORDS, LEAST_SHARE * attested.total())
    return _parsed((*said[:1], *(syllable for syllable, n in attested.items() if n >= least)))


def _parsed(syllables: tuple[str, ...]) -> Readings:
    return tuple(dict.fromkeys(read for said in syllables if (read := _reading(said))))


@cache
def _reading(syllable: str) -> Reading | None:
    """`zhī` is level and 支. None for a neutral tone and for what is no syllable (hm)."""
    from pypinyin.contrib.tone_convert import to_finals_tone3, to_initials

    final, tone = to_finals_tone3(syllable)[:-1], to_finals_tone3(syllable)[-1:]
    if final == "i" and to_initials(syllable) in BUZZING:
        final = "-i"
    if tone not in tuple("1234") or final not in CLASS_OF:
        return None
    return Reading(LEVEL if tone in "12" else OBLIQUE, CLASS_OF[final])


class _Tables(NamedTuple):
    characters: Mapping[int, str]  # code point -> "zhǎng,cháng"
    words: Mapping[str, tuple[tuple[str, ...], ...]]  # 长江 -> (("cháng",), ("jiāng",))
    attested: Mapping[str, Counter[str]]  # 长 -> in how many words it has which (toned) reading


@cache
def _tables() -> _Tables:
    try:
        from pypinyin.constants import PHRASES_DICT, PINYIN_DICT
    except ImportError as error:
        raise TaskError("verse needs pypinyin: pip install 'qiusuo[tasks]'") from error
    attested: dict[str, Counter[str]] = defaultdict(Counter)
    words = {}
    for word, said in PHRASES_DICT.items():
        for char, syllables in zip(word, said, strict=True):
            attested[char].update(s for s in syllables if _reading(s))
        if len(word) <= 4:
            words[word] = tuple(map(tuple, said))
    return _Tables(PINYIN_DICT, words, attested)
