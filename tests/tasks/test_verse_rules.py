"""The rules of regulated verse, on poems judged by hand and against the patterns as books print
them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.tasks.verse_rules import FORMS, rhyme_classes, tones, verse_lines

# What each poem is, by hand, in modern Mandarin: the class it rhymes in, whether its tones keep the
# pattern, and why not. Many a classic fails for an entering tone that is level now; that is the
# price of modern rules and no fault of the poem.
JUDGED = [
    ("登鹳雀楼", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", "尤", True),
    ("早发白帝城", "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。", "寒", True),
    ("枫桥夜泊", "月落乌啼霜满天，江枫渔火对愁眠。姑苏城外寒山寺，夜半钟声到客船。", "寒", True),
    ("出塞", "秦时明月汉时关，万里长征人未还。但使龙城飞将在，不教胡马度阴山。", "寒", True),
    ("芙蓉楼", "寒雨连江夜入吴，平明送客楚山孤。洛阳亲友如相问，一片冰心在玉壶。", "姑", True),
    # No regulated verse at any time: 疑是地上 has two obliques, 举头望明 two levels, no 粘.
    ("静夜思", "床前明月光，疑是地上霜。举头望明月，低头思故乡。", "唐", False),
    # 国 ends the first line, level now, and does not rhyme; 撷 (xié) ends the third, level too.
    ("相思", "红豆生南国，春来发几枝。愿君多采撷，此物最相思。", None, False),
    # 泊 (bó) was oblique.
    ("绝句", "两个黄鹂鸣翠柳，一行白鹭上青天。窗含西岭千秋雪，门泊东吴万里船。", "寒", False),
    # 斜 (xié; once xiá) no longer rhymes with 花 and 家.
    ("乌衣巷", "朱雀桥边野草花，乌衣巷口夕阳斜。旧时王谢堂前燕，飞入寻常百姓家。", None, True),
    # 得 (dé) was oblique.
    ("听筝", "鸣筝金粟柱，素手玉房前。欲得周郎顾，时时误拂弦。", "寒", False),
    # 泊烟渚: the licence 平平仄平仄, which is not granted here.
    ("宿建德江", "移舟泊烟渚，日暮客愁新。野旷天低树，江清月近人。", "文", False),
    # Rhymes in an oblique tone (晓 鸟 少), and no pattern.
    ("春晓", "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", None, False),
    # 歇 (xiē) was oblique.
    (
        "山居秋暝",
        "空山新雨后，天气晚来秋。明月松间照，清泉石上流。"
        "竹喧归浣女，莲动下渔舟。随意春芳歇，王孙自可留。",
        "尤",
        False,
    ),
    # 回 and 杯 (微) no longer rhyme with 哀 来 台 (开); 白 (bái) was oblique.
    (
        "登高",
        "风急天高猿啸哀，渚清沙白鸟飞回。无边落木萧萧下，不尽长江滚滚来。"
        "万里悲秋常作客，百年多病独登台。艰难苦恨繁霜鬓，潦倒新停浊酒杯。",
        None,
        False,
    ),
]  # fmt: skip

# The quatrains' patterns as books print them, the free places as ·.
FIVE = [
    "·仄·平仄 ·平·仄平 ·平·仄仄 ·仄·平平",
    "·仄·平平 ·平·仄平 ·平·仄仄 ·仄·平平",
    "·平·仄仄 ·仄·平平 ·仄·平仄 ·平·仄平",
    "·平·仄平 ·仄·平平 ·仄·平仄 ·平·仄平",
]
SEVEN = [
    "·平·仄·平仄 ·仄·平·仄平 ·仄·平·仄仄 ·平·仄·平平",
    "·平·仄·平平 ·仄·平·仄平 ·仄·平·仄仄 ·平·仄·平平",
    "·仄·平·仄仄 ·平·仄·平平 ·平·仄·平仄 ·仄·平·仄平",
    "·仄·平·仄平 ·平·仄·平平 ·平·仄·平仄 ·仄·平·仄平",
]
SOUNDS = {"平": "天", "仄": "地"}


def lines_of(verse: str) -> tuple[str, ...]:
    return next(lines for form in FORMS.values() if (lines := verse_lines(verse, form)))


@pytest.mark.parametrize(("title", "verse", "rhyme", "in_order"), JUDGED)
def test_poems_judged_by_hand(title: str, verse: str, rhyme: str | None, in_order: bool) -> None:
    lines = lines_of(verse)
    assert rhyme_classes(lines) == ((rhyme,) if rhyme else ())
    assert (tones(lines).kept == 1) == in_order


def fits(pattern: str, wanted: str) -> bool:
    return all(w in ("·", p) for p, w in zip(pattern, wanted, strict=True))


def printed(lines: int, width: int) -> list[str]:
    """Patterns of an eight-line poem: the quatrain's, then that of one whose first line does not
    rhyme and that begins as a quatrain would after this."""
    quatrains = [x.replace(" ", "") for x in (FIVE if width == 5 else SEVEN)]
    if lines == 4:
        return quatrains
    return [first + quatrains[place - place % 2] for place, first in enumerate(quatrains)]


@given(st.data())
def test_tones_are_in_order_where_a_printed_pattern_fits(data: st.DataObject) -> None:
    lines, width = data.draw(st.sampled_from([(4, 5), (4, 7), (8, 5), (8, 7)]))
    wanted = data.draw(st.sampled_from(printed(lines, width)))
    free = data.draw(st.text("平仄", min_size=lines * width, max_size=lines * width))
    pattern = [f if w == "·" else w for f, w in zip(free, wanted, strict=True)]
    for place in data.draw(st.sets(st.integers(0, lines * width - 1), max_size=3)):
        pattern[place] = "仄" if pattern[place] == "平" else "平"
    text = "".join(SOUNDS[tone] for tone in pattern)
    found = tones([text[at : at + width] for at in range(0, len(text), width)])
    expected = any(fits("".join(pattern), one) for one in printed(lines, width))
    assert (found.kept == 1) == expected
    assert "".join(found.pattern) == "".join(pattern)
    assert found.open_share == 0


def test_faults_that_keep_the_rules_are_counted() -> None:
    lines = lines_of("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。")
    assert (tones(lines).three_level_ends, tones(lines).lone_levels) == (1, 0)  # 一层楼
    lines = ("地地天天地", "地天地地天", "地天天地地", "地地地天天")
    assert (tones(lines).three_level_ends, tones(lines).lone_levels) == (0, 1)


def test_open_tones_are_counted() -> None:
    lines = ("雨中山看尽", "黄河入海流", "欲穷千里目", "更上一层楼")
    assert tones(lines).open_share == pytest.approx(2 / 11)  # 中 and 看
    assert tones(lines).kept == 1


class TestRhyme:
    def test_a_level_first_line_must_rhyme(self) -> None:
        rest = ("黄河入海流", "欲穷千里目", "更上一层楼")
        assert rhyme_classes(("白日依山尽", *rest)) == ("尤",)  # oblique
        assert rhyme_classes(("白日依山秋", *rest)) == ("尤",)  # rhymes
        assert rhyme_classes(("白日依山东", *rest)) == ()

    def test_no_rhyme_character_comes_twice(self) -> None:
        assert rhyme_classes(("白日依山尽", "黄河入海流", "欲穷千里目", "更上一层流")) == ()
        assert rhyme_classes(("白日依山流", "黄河入海流", "欲穷千里目", "更上一层楼")) == ()

    def test_oblique_ends_do_not_rhyme(self) -> None:
        assert rhyme_classes(("白日依山尽", "黄河入海口", "欲穷千里目", "更上一层斗")) == ()

    def test_a_character_of_two_classes_rhymes_in_either(self) -> None:
        assert rhyme_classes(("白日依山尽", "黄河入海还", "欲穷千里目", "更上一层山")) == ("寒",)
        assert rhyme_classes(("白日依山尽", "黄河入海还", "欲穷千里目", "更上一层来")) == ("开",)


class TestForm:
    VERSE = "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。"

    def test_white_space_between_lines_is_free(self) -> None:
        form = FORMS["五绝"]
        expected = ("白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼")
        assert verse_lines(self.VERSE, form) == expected
        assert verse_lines(self.VERSE.replace("\n", ""), form) == expected
        assert verse_lines(f"\n {self.VERSE}\n\n", form) == expected

    @pytest.mark.parametrize(
        "text",
        [
            "",
            VERSE[:-1],  # no last stop
            VERSE[:-1] + "，",
            VERSE.replace("，", "", 1),
            VERSE.replace("，", "。", 1),
            VERSE.replace("，", ",", 1),
            VERSE.replace("日", "", 1),
            VERSE.replace("日", "日日", 1),
            VERSE.replace("日", "a", 1),
            VERSE.replace("日", "日 ", 1),
            VERSE.replace("流。", "流，"),
            VERSE + "白日依山尽，",
            VERSE + "好诗",
            "登鹳雀楼\n" + VERSE,
            VERSE + VERSE,  # that is 五律
            VERSE * 10_000,
        ],
    )
    def test_anything_else_is_not_the_form(self, text: str) -> None:
        assert verse_lines(text, FORMS["五绝"]) is None

    def test_eight_lines_are_another_form(self) -> None:
        assert verse_lines(self.VERSE + self.VERSE, FORMS["五律"]) is not None
