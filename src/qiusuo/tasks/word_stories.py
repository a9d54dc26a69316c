"""The stories of the word problems, each told in English and in Chinese.

A story has numbers, the sums that solve it and its texts. Numbers are `a`, `b`, `c`; sums are
written as `(left, operation, right)` of these letters and of `x`, the first sum's result. `{n}` and
`{m}` are people, `{t}` things, `{u}` their measure word: they change nothing about the problem.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Numbers = dict[str, int]
Sum = tuple[str, str, str]

NAMES = (
    ("Tom", "小明"),
    ("Anna", "小红"),
    ("Ben", "小刚"),
    ("Lucy", "小丽"),
    ("Jack", "小军"),
    ("Mia", "小芳"),
    ("Leo", "小强"),
    ("Emma", "小梅"),
)
THINGS = (  # plural; measure word and noun
    ("apples", "个苹果"),
    ("books", "本书"),
    ("pencils", "支铅笔"),
    ("stamps", "枚邮票"),
    ("marbles", "颗弹珠"),
    ("cookies", "块饼干"),
    ("cards", "张卡片"),
    ("balls", "个球"),
)


@dataclass(frozen=True)
class Story:
    """One story type: how its numbers are drawn, the sums that solve it, its text by language."""

    name: str
    draw: Callable[[random.Random], Numbers]
    sums: tuple[Sum, ...]
    texts: Mapping[str, str]


def _numbers(**ranges: tuple[int, int]) -> Callable[[random.Random], Numbers]:
    return lambda chance: {letter: chance.randint(*ends) for letter, ends in ranges.items()}


def _part(low: int, high: int) -> Callable[[random.Random], Numbers]:
    """`b` is less than `a`."""

    def draw(chance: random.Random) -> Numbers:
        a = chance.randint(low, high)
        return {"a": a, "b": chance.randint(2, a - 1)}

    return draw


def _gone_and_come(chance: random.Random) -> Numbers:
    return {**_part(10, 99)(chance), "c": chance.randint(2, 60)}


def _shared(chance: random.Random) -> Numbers:
    """`a` divides evenly by `b`, and more than `c` is each one's share."""
    b, share = chance.randint(2, 12), chance.randint(3, 30)
    return {"a": b * share, "b": b, "c": chance.randint(2, share - 1)}


def _evenly(chance: random.Random) -> Numbers:
    shared = _shared(chance)
    return {"a": shared["a"], "b": shared["b"]}


def _change(chance: random.Random) -> Numbers:
    """`c` pays for `a` pieces at `b` and leaves something."""
    a, b = chance.randint(2, 12), chance.randint(2, 15)
    return {"a": a, "b": b, "c": a * b + chance.randint(1, 60)}


STORIES = (
    Story(
        "gain",
        _numbers(a=(2, 99), b=(2, 99)),
        (("a", "+", "b"),),
        {
            "en": "{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?",
            "zh": "{n}有{a}{t}，又得到{b}{t}。{n}现在有多少{t}？",
        },
    ),
    Story(
        "loss",
        _part(3, 120),
        (("a", "-", "b"),),
        {
            "en": "{n} had {a} {t} and gave {b} of them to {m}. How many {t} does {n} have left?",
            "zh": "{n}原来有{a}{t}，送给{m}{b}{t}。{n}还剩多少{t}？",
        },
    ),
    Story(
        "groups",
        _numbers(a=(2, 30), b=(2, 30)),
        (("a", "*", "b"),),
        {
            "en": "There are {a} boxes with {b} {t} in each. How many {t} are there in all?",
            "zh": "有{a}个盒子，每个盒子里有{b}{t}。一共有多少{t}？",
        },
    ),
    Story(
        "share",
        _evenly,
        (("a", "/", "b"),),
        {
            "en": "{n} shares {a} {t} equally among {b} children. "
            "How many {t} does each child get?",
            "zh": "{n}把{a}{t}平均分给{b}个小朋友。每个小朋友分到多少{t}？",
        },
    ),
    Story(
        "gone and come",
        _gone_and_come,
        (("a", "-", "b"), ("x", "+", "c")),
        {
            "en": "{n} had {a} {t}, gave {b} of them to {m} and then bought {c} more. "
            "How many {t} does {n} have now?",
            "zh": "{n}原来有{a}{t}，送给{m}{b}{t}，后来又买了{c}{t}。{n}现在有多少{t}？",
        },
    ),
    Story(
        "boxes and loose ones",
        _numbers(a=(2, 20), b=(2, 20), c=(2, 60)),
        (("a", "*", "b"), ("x", "+", "c")),
        {
            "en": "{n} has {a} boxes with {b} {t} in each, and {c} {t} on the table. "
            "How many {t} does {n} have in all?",
            "zh": "{n}有{a}个盒子，每个盒子里有{b}{t}，桌上还有{c}{t}。{n}一共有多少{t}？",
        },
    ),
    Story(
        "change",
        _change,
        (("a", "*", "b"), ("c", "-", "x")),
        {
            "en": "{n} buys {a} {t} at {b} yuan each and pays with {c} yuan. "
            "How many yuan does {n} get back?",
            "zh": "{n}买了{a}{t}，每{u}{b}元，付了{c}元。应该找回多少元？",
        },
    ),
    Story(
        "more than the other",
        _numbers(a=(2, 80), b=(2, 60)),
        (("a", "+", "b"), ("a", "+", "x")),
        {
            "en": "{n} has {a} {t}. {m} has {b} {t} more than {n}. "
            "How many {t} do they have together?",
            "zh": "{n}有{a}{t}，{m}比{n}多{b}{t}。两人一共有多少{t}？",
        },
    ),
    Story(
        "share and give",
        _shared,
        (("a", "/", "b"), ("x", "-", "c")),
        {
            "en": "{a} {t} are shared equally among {b} children. {n} is one of them and gives "
            "{c} {t} to {m}. How many {t} does {n} have left?",
            "zh": "{a}{t}平均分给{b}个小朋友，{n}是其中一个，又把自己的{c}{t}给了{m}。"
            "{n}还剩多少{t}？",
        },
    ),
    Story(
        "walk",
        _numbers(a=(2, 15), b=(2, 12), c=(2, 60)),
        (("a", "*", "b"), ("x", "+", "c")),
        {
            "en": "{n} rides {a} km every day for {b} days, and then {c} km by train. "
            "How many km does {n} travel in all?",
            "zh": "{n}每天骑车{a}千米，骑了{b}天，然后坐火车走了{c}千米。{n}一共走了多少千米？",
        },
    ),
)
