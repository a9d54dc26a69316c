"""Readings of characters, held against what the rhyme book prints and dictionaries say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.tasks.verse_readings import CLASSES, LEVEL, OBLIQUE, Reading, readings, rhyme_name

# Level characters as 中华新韵 (十四韵) lists them under its classes, one for each final at least.
PRINTED = {
    "麻": "巴家花",
    "波": "波歌多",
    "皆": "街斜靴",
    "开": "开怀",
    "微": "飞归",
    "豪": "高桥",
    "尤": "楼秋",
    "寒": "山天船泉",
    "文": "门心春云",
    "唐": "房江窗",
    "庚": "灯声翁钟兄",
    "齐": "西儿鱼衣",
    "支": "知池时日丝词",  # 日 is oblique
    "姑": "书湖",
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_classes_are_the_printed_ones(name: str) -> None:
    for char in PRINTED[name]:
        assert {reading.rhyme for reading in readings(char)[0]} == {name}, char


def test_the_classes_are_numbered_as_printed() -> None:
    assert [rhyme_name(name) for name in CLASSES] == (
        "一麻 二波 三皆 四开 五微 六豪 七尤 八寒 九文 十唐 十一庚 十二齐 十三支 十四姑".split()
    )


def possible_tones(line: str) -> str:
    """平, 仄, 两 for either, 无 for neither."""
    either = {frozenset("平仄"): "两", frozenset(): "无"}
    tones = [frozenset(reading.tone for reading in char) for char in readings(line)]
    return "".join(either.get(found, "".join(found)) for found in tones)


@pytest.mark.parametrize(
    ("line", "tones"),
    [
        ("天明马路", "平平仄仄"),  # the four tones in turn
        ("白十一国", "平平平平"),  # entering tones of old that are level now
        ("不一", "仄平"),  # the dictionary's tones, not sandhi's
        ("月明听叹", "仄平平仄"),  # no rù, mèng, yǐn, yǐ
        ("看长中重", "两两两两"),  # kān, zhǎng, zhòng, chóng
        ("a?", "无无"),
    ],
)
def test_tones_of_single_characters(line: str, tones: str) -> None:
    assert "".join(possible_tones(char) for char in line) == tones


def test_a_word_decides_within_a_foot() -> None:
    assert possible_tones("长") == "两"
    assert possible_tones("长江空渺渺")[0] == LEVEL  # 长江 cháng
    assert possible_tones("江上长江水")[2] == LEVEL
    assert possible_tones("江水长江水")[2:4] == "平平"
    assert possible_tones("相思") == "两平"  # no line of verse: no feet, so no words
    assert possible_tones("相思一夜中")[:2] == "平平"


def test_a_word_across_feet_decides_nothing() -> None:
    # 重要 (zhòng) would stand over places 2 and 3, on both sides of the pause.
    assert possible_tones("山重要路长")[1] == "两"
    assert possible_tones("重要山路长")[0] == OBLIQUE


def test_where_two_words_overlap_neither_decides() -> None:
    assert possible_tones("山水世间花")[3] == LEVEL  # 世间 jiān
    assert possible_tones("山水间断日")[2] == OBLIQUE  # 间断 jiàn
    assert possible_tones("山水世间断")[3] == "两"


def test_a_neutral_tone_in_a_word_leaves_the_character_as_it_is() -> None:
    # 意思's 思 is neutral today; it stays the level character that it is.
    assert possible_tones("意思山水间")[:2] == "仄平"


def test_one_reading_holds_tone_and_rhyme_together() -> None:
    assert set(readings("还")[0]) == {Reading(LEVEL, "开"), Reading(LEVEL, "寒")}
    assert Reading(LEVEL, "庚") in readings("行")[0]
    assert Reading(OBLIQUE, "庚") not in readings("行")[0]


@given(st.text(max_size=12))
def test_any_text_has_readings_of_its_length(text: str) -> None:
    found = readings(text)
    assert len(found) == len(text)
    assert all(r.tone in (LEVEL, OBLIQUE) and r.rhyme in CLASSES for char in found for r in char)
