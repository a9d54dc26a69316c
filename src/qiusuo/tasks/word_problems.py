"""Word problems in English and Chinese: one or two steps, the same problems in both languages.

    小明有3个苹果，又得到4个苹果。小明现在有多少个苹果？  ->  <think>3+4=7。</think>#### 7

Two texts are the same problem if story and numbers are the same, whatever the language, names and
things; the key says so, so a problem learnt in Chinese is not tested in English. The answer stands
behind the mark `####`, once, after the thought if there is one: this leaves pulled models, which
explain themselves, their sentences, and pays nothing for a number somewhere in them. For training a
model to think in the language it was asked in, the verdict measures `language_share`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qiusuo.tasks.task import (
    END_THINK,
    THINK,
    Parts,
    Problem,
    Task,
    TaskError,
    Verdict,
    response_of,
    take_apart,
    verdict_on,
)
from qiusuo.tasks.word_stories import NAMES, STORIES, THINGS, Story

MARK = "####"
LANGUAGES = ("en", "zh")
WORKED = {  # a thought of one step, and of two
    "en": ("{0}.", "First {0}. Then {1}."),
    "zh": ("{0}。", "先算{0}。再算{1}。"),
}
ASK = {
    "en": "Work it out, and end with a line of {mark} and the number alone, such as {mark} 12",
    "zh": "请写出计算过程，最后一行写{mark}和答案的数字，例如{mark} 12",
}
EQUATION = re.compile(  # of two numbers; longer ones are not looked at
    r"(?<![\d.+*/=-])(?<![-+*/=] )(\d{1,7}) ?([-+*/]) ?(\d{1,7}) ?= ?(\d{1,7})(?!\d|\.\d)",
    re.ASCII,
)
HAN, LATIN = re.compile("[\u4e00-\u9fff]"), re.compile("[A-Za-z]")
BY_NAME = {story.name: story for story in STORIES}
Worked = tuple[int, str, int, int]  # left, operation, right, result


class WordProblems(Task):
    """Difficulty is the number of steps, 1 or 2; chance says in which of ``languages``."""

    name: ClassVar[str] = "word-problems"
    description: ClassVar[str] = "Short stories with numbers, in English and Chinese."
    difficulties: ClassVar[range] = range(1, 3)
    alphabet: ClassVar[str | None] = "".join(
        sorted(
            {*"0123456789+-*/= \n", *MARK}
            | {char for story in STORIES for text in story.texts.values() for char in text}
            | {char for pair in (*NAMES, *THINGS, *WORKED.values()) for char in "".join(pair)}
        )
    )

    def __init__(self, languages: Sequence[str] = LANGUAGES) -> None:
        if not languages or not set(languages) <= set(LANGUAGES):
            known = " and ".join(LANGUAGES)
            raise TaskError(f"{self.name!r} is told in {known}, not {list(languages)}")
        self.languages = tuple(languages)

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        story = chance.choice([story for story in STORIES if len(story.sums) == difficulty])
        numbers = story.draw(chance)
        name, other = chance.sample(range(len(NAMES)), 2)
        data = {
            "story": story.name,
            "numbers": numbers,
            "names": [name, other],
            "thing": chance.randrange(len(THINGS)),
            "language": chance.choice(self.languages),
            "answer": _worked(story, numbers)[-1][-1],
        }
        return self._told(data)

    def in_language(self, problem: Problem, language: str) -> Problem:
        """The same problem in English (`en`) or Chinese (`zh`); its key stays the same."""
        if language not in LANGUAGES:
            raise TaskError(f"{self.name!r} is told in {' and '.join(LANGUAGES)}, not {language!r}")
        return self._told({**problem.data, "language": language})

    def _told(self, data: Mapping[str, Any]) -> Problem:
        story, language = BY_NAME[data["story"]], data["language"]
        which = LANGUAGES.index(language)
        name, other = (NAMES[place][which] for place in data["names"])
        thing = THINGS[data["thing"]][which]
        text = story.texts[language].format(n=name, m=other, t=thing, u=thing[0], **data["numbers"])
        key = f"words:{story.name}:{_canonical(story, data['numbers'])}"
        question = f"{text}\n{ASK[language].format(mark=MARK)}"
        return Problem(self.name, f"{text}\n", question, len(story.sums), key, dict(data))

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        data = problem.data
        worked = _worked(BY_NAME[data["story"]], data["numbers"])
        sums = [f"{left}{operation}{right}={result}" for left, operation, right, result in worked]
        told = WORKED[data["language"]][len(sums) - 1].format(*sums)
        return response_of(told if thought else "", f"{MARK} {data['answer']}")

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts, working = _take_apart(response)
        data = problem.data
        more = {}
        own, foreign = (HAN, LATIN) if data["language"] == "zh" else (LATIN, HAN)
        letters = len(own.findall(working)), len(foreign.findall(working))
        if any(letters):
            more["language_share"] = letters[0] / sum(letters)
        valid = _is_valid(working, list(data["numbers"].values()), data["answer"])
        if valid is not None:
            more["trace_valid"] = float(valid)
        return verdict_on(parts, str(data["answer"]), more=more)


def _canonical(story: Story, numbers: Mapping[str, int]) -> str:
    """The numbers, in order. Two that are only ever added or multiplied with one another are
    sorted: 3 and 4 gained are the same problem as 4 and 3."""
    (left, operation, right), *later = story.sums
    values = dict(numbers)
    if operation in "+*" and not any({left, right} & {one, other} for one, _, other in later):
        values[left], values[right] = sorted((values[left], values[right]))
    return ",".join(f"{letter}={values[letter]}" for letter in sorted(values))


def _take_apart(response: str) -> tuple[Parts, str]:
    """The parts by the mark, and the working: the thought or, without one, what is before the
    mark."""
    thought, rest = "", response
    if THINK in response or END_THINK in response:
        whole = take_apart(response)
        if whole.answer is None:
            return whole, whole.thought
        thought, rest = whole.thought, whole.answer
    marks = rest.count(MARK)
    before, _, answer = rest.partition(MARK)
    working = thought if thought.strip() else before
    if marks != 1:
        fault = f"no {MARK} before the answer" if marks == 0 else f"a second {MARK}"
        return Parts(thought, None, fault), working
    answer = answer.strip()
    return Parts(working, answer or None, "" if answer else "no answer"), working


def _worked(story: Story, numbers: Mapping[str, int]) -> list[Worked]:
    """The sums of a story with their results."""
    known = dict(numbers)
    worked: list[Worked] = []
    for left, operation, right in story.sums:
        result = _result(known[left], operation, known[right])
        worked.append((known[left], operation, known[right], result))
        known["x"] = result
    return worked


def _result(left: int, operation: str, right: int) -> int:
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    return left * right if operation == "*" else left // right


def _is_valid(working: str, numbers: Sequence[int], answer: int) -> bool | None:
    """Whether every equation in the working is right and takes numbers of the problem or results
    before it, the last one giving the answer. None where there is no equation to check."""
    known, result = set(numbers), None
    for match in EQUATION.finditer(working):
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        if not {left, right} <= known or (match[2] == "/" and (not right or left % right)):
            return False
        if _result(left, match[2], right) != result:
            return False
        known.add(result)
    return None if result is None else result == answer
