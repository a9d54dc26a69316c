"""Regulated verse on request (form, rhyme class of 中华新韵, title); the rules are the reward.

    《春夜》五绝·庚韵
    …

The prompt is the head of a poem as the built-in corpus writes it, 《title》 and author, with the
request where the author's name stands; then follow the lines, one a line, each with its stop.

What is checked is form, rhyme, the asked class, and tones, by modern Mandarin: sound has changed,
and of the Tang poets' own quatrains a quarter passes (`base_rates`). So a policy that passes always
does not write better than they did; it obeys a rule that they did not know. Whether verse is about
its title no rule can tell: another title than the asked one is refused, and that is all. And what
rules do not forbid a policy will do: watch `verse_guards` beside the reward.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import ClassVar

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
)
from qiusuo.tasks.verse_guards import Corpus, distinct_trigrams, top_rhyme_character
from qiusuo.tasks.verse_novelty import VerseNovelty
from qiusuo.tasks.verse_readings import CLASSES, LEVEL, OBLIQUE, readings, rhyme_name
from qiusuo.tasks.verse_rules import (
    FORMS,
    Form,
    rhyme_classes,
    tones,
    verse_lines,
    without_head,
)

SEASONS = "春 夏 秋 冬 早春 暮春 新秋 深秋".split()
SCENES = (
    "日 夜 思 望 山行 江行 夜坐 夜泊 望月 听雨 怀友 送别 寄友 登楼 闻笛 独酌 题壁 思归 田家 古寺 "
    "即事 有感 偶成 晚眺"
).split()
TITLES = tuple(season + scene for season in SEASONS for scene in SCENES)
HEAD = re.compile(r"《([^《》\n]+)》")
PLAN = re.compile(f"[{LEVEL}{OBLIQUE}]+")


class Verse(Task):
    """五绝, 七绝, 五律, 七律 by difficulty 1 to 4, rhyming in one of `rhymes`, in any class if none
    is given.

    Problems draw form, class and one of `titles` freely, and no poem is known that answers them.
    With `poems` (in the corpus' format) every problem is one that a poem of the list answers, and
    `solution` gives that poem; those that break the rules are passed over.

    Unless it is to be `strict`: then every poem of a known form is taken, whatever its tones, and
    its request names the class only if the poem does rhyme in one of `rhymes`. So a corpus can be
    learned whole from requests that tell the truth, and the rules be left to reinforcement; most
    of its solutions then get no reward. The first use of 35,000 poems takes seconds.

    With `free` only the titles of the poems are taken, and form and class are drawn freely, as
    reinforcement asks. The poems are still what copies are told from.

    `TaskError` for titles, classes or poems that cannot be read.
    """

    name: ClassVar[str] = "verse"
    description: ClassVar[str] = "Regulated Chinese verse on request: form, rhyme class and title."
    difficulties: ClassVar[range] = range(1, len(FORMS) + 1)

    def __init__(
        self,
        titles: Sequence[str] = TITLES,
        poems: Sequence[str] = (),
        rhymes: Sequence[str] = CLASSES,
        *,
        strict: bool = True,
        free: bool = False,
    ) -> None:
        for rhyme in rhymes:
            if rhyme not in CLASSES:
                raise TaskError(f"no rhyme class {rhyme!r}: there are {' '.join(CLASSES)}")
        for title in titles:
            if not HEAD.fullmatch(f"《{title}》"):
                raise TaskError(f"a title is one line without 《 and 》, not {title!r}")
        if not titles:
            raise TaskError("no titles: give at least one")
        self.titles, self.rhymes = tuple(titles), tuple(rhymes)
        self.poems = tuple(read_poem(poem) for poem in poems)
        self.strict, self.free = strict, free
        if free and poems:
            self.titles = poem_titles(poems)

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        form = tuple(FORMS.values())[difficulty - 1]
        if self.poems and not self.free:
            known = self._keys_by_form.get(form.name)
            if not known:
                keeps = " that keeps the rules" if self.strict else ""
                raise TaskError(f"no poem of the list is a {form.name}{keeps}")
            return self._answered[chance.choice(known)][0]
        rhyme = chance.choice(self.rhymes) if self.rhymes else None
        return make_problem(form, rhyme, chance.choice(self.titles))

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        if problem.key not in self._answered:
            raise TaskError(
                f"no poem is known for {problem.key!r}: give Verse a list of `poems`, and take the "
                "problems from it"
            )
        verse = chance.choice(self._answered[problem.key][1])
        plan = ""
        if thought:
            lines = verse_lines(verse, FORMS[problem.data["form"]])
            assert lines is not None
            plan = "\n".join(tones(lines).pattern)
        return response_of(plan, verse)

    def verify(self, problem: Problem, response: str) -> Verdict:
        """A response without any mark of a thought is the answer itself: poets trained on verse
        alone write that."""
        bare = THINK not in response and END_THINK not in response
        parts = Parts("", response.strip()) if bare else take_apart(response)
        if not parts.answer:
            return Verdict(0.0, None, parts.fault or "no answer")
        measures = {"thought": float(bool(parts.thought.strip())), "form": 0.0}
        verse = without_head(parts.answer, problem.data["title"])
        if verse is None:
            return Verdict(0.0, parts.answer, "another title", measures)
        lines = verse_lines(verse, FORMS[problem.data["form"]])
        if lines is None:
            return Verdict(0.0, parts.answer, "not the asked form", measures)
        return _verdict(parts, lines, problem.data["rhyme"], measures)

    def problem_of(self, poem: str) -> Problem | None:
        """The request that a poem (in the corpus' format) answers; None if it has no known form,
        or, where this is strict, breaks a rule. Its prompt and verse together are a document to
        train on."""
        return self._problem_of(*read_poem(poem))

    def _problem_of(self, title: str, verse: str) -> Problem | None:
        for form in FORMS.values():
            lines = verse_lines(verse, form)
            if lines is None:
                continue
            rhymes = rhyme_classes(lines)
            asked = next((rhyme for rhyme in rhymes if rhyme in self.rhymes), None)
            if self.strict and not (rhymes and (asked or not self.rhymes) and _is_kept(lines)):
                return None
            return make_problem(form, asked, title)
        return None

    def together(self, answers: Sequence[tuple[Problem, Verdict]]) -> Mapping[str, float]:
        """How alike the poems are, and how like the corpus (verse_guards.py): of those that have
        the asked form."""
        poems = []
        for problem, verdict in answers:
            verse = without_head(verdict.answer or "", problem.data["title"])
            lines = verse and verse_lines(verse, FORMS[problem.data["form"]])
            if lines:
                poems.append(lines)
        if not poems:
            return {}
        told = {
            "top_rhyme_share": top_rhyme_character(poems)[1],
            "distinct_trigrams": distinct_trigrams(poems),
        }
        if self.poems:
            told |= {
                "copied_lines": fmean(map(self._corpus.copied_lines, poems)),
                "novel_trigrams": fmean(map(self._corpus.novelty, poems)),
                "longest_overlap": float(max(map(self._overlap, poems))),
            }
        return told

    def _overlap(self, lines: Sequence[str]) -> int:
        return len(self._corpus.longest_overlap(lines))

    @cached_property
    def _corpus(self) -> Corpus:
        return Corpus(verse for _, verse in self.poems)

    def guard(self, poems: Iterable[str] | None = None) -> VerseNovelty:
        """A guard for novelty. The lines of `poems` (in the corpus' format) are not to be copied;
        without them, those of this task's."""
        read = self.poems if poems is None else map(read_poem, poems)
        return VerseNovelty(verse for _, verse in read)

    @cached_property
    def _answered(self) -> dict[str, tuple[Problem, list[str]]]:
        """Key -> the problem and the poems that answer it."""
        answered: dict[str, tuple[Problem, list[str]]] = {}
        for title, verse in self.poems:
            if problem := self._problem_of(title, verse):
                answered.setdefault(problem.key, (problem, []))[1].append(verse)
        return answered

    @cached_property
    def _keys_by_form(self) -> dict[str, list[str]]:
        keys = defaultdict(list)
        for key, (problem, _) in self._answered.items():
            keys[problem.data["form"]].append(key)
        return keys


def make_problem(form: Form, rhyme: str | None, title: str) -> Problem:
    """The problem that asks for this form, class (any if None) and title."""
    asked = f"，押中华新韵{rhyme_name(rhyme)}韵" if rhyme else ""
    return Problem(
        task=Verse.name,
        prompt=f"《{title}》{form.name}" + (f"·{rhyme}韵\n" if rhyme else "\n"),
        question=(
            f"请以《{title}》为题写一首{form.full_name}{asked}。平仄依今音，用平声韵，不分入声。"
            "每句一行，句末加标点；只写诗句。"
        ),
        difficulty=1 + list(FORMS).index(form.name),
        key=f"verse:{form.name} {rhyme or '不限'} {title}",
        data={"form": form.name, "rhyme": rhyme, "title": title},
    )


def read_poem(text: str) -> tuple[str, str]:
    """Title and verse of a document `《title》author`, newline, lines of verse."""
    head, _, verse = text.strip().partition("\n")
    found = HEAD.match(head)
    if not found or not verse:
        raise TaskError(
            f"a poem is 《title》author, then its lines; this is not one: {text[:40]!r}"
        )
    return found[1], verse


def poem_titles(poems: Iterable[str], longest: int = 12) -> tuple[str, ...]:
    """The titles of poems (in the corpus' format) of at most so many characters, each once: what
    `Verse(titles=…)` asks for poems on."""
    titles = (read_poem(poem)[0] for poem in poems)
    return tuple(dict.fromkeys(title for title in titles if len(title) <= longest))


def _verdict(
    parts: Parts, lines: Sequence[str], asked: str | None, measures: dict[str, float]
) -> Verdict:
    """Every rule is measured, whichever fails first."""
    rhymes, pattern = rhyme_classes(lines), tones(lines)
    kept = {
        "form": True,
        "rhyme": bool(rhymes),
        "tones": pattern.kept == 1,
    } | ({"asked_rhyme": asked in rhymes} if asked else {})
    measures |= {name: float(value) for name, value in kept.items()} | {
        "tones_kept": pattern.kept,
        "open_tones": pattern.open_share,
        "three_level_ends": float(pattern.three_level_ends),
        "lone_levels": float(pattern.lone_levels),
    }
    if (valid := _plan_valid(parts.thought, lines)) is not None:
        measures["trace_valid"] = float(valid)
    faults = {
        "a line stands twice": len(set(lines)) == len(lines),
        "no rhyme": kept["rhyme"],
        "not in the asked rhyme": kept.get("asked_rhyme", True),
        "tones out of order": kept["tones"],
    }
    fault = next((reason for reason, holds in faults.items() if not holds), None)
    return Verdict(float(fault is None), parts.answer, fault or "right", measures)


def _is_kept(lines: Sequence[str]) -> bool:
    """Whether the poem keeps the rules beside that of rhyme."""
    return len(set(lines)) == len(lines) and tones(lines).kept == 1


def _plan_valid(thought: str, lines: Sequence[str]) -> bool | None:
    """Whether the poem follows its thought, if that is a line of 平 and 仄 for each line of verse;
    None if it is anything else."""
    plan = thought.split()
    if len(plan) != len(lines) or not all(map(PLAN.fullmatch, plan)):
        return None
    return all(
        len(wanted) == len(line)
        and all(
            tone in {r.tone for r in char}
            for tone, char in zip(wanted, readings(line), strict=True)
        )
        for wanted, line in zip(plan, lines, strict=True)
    )


def base_rates(texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """For each form: how many of these poems it has, and the share that keeps each rule."""
    counted: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for text in texts:
        _, verse = read_poem(text)
        for form in FORMS.values():
            if lines := verse_lines(verse, form):
                counted[form.name].append((bool(rhyme_classes(lines)), tones(lines).kept == 1))
    return {
        name: {
            "poems": float(len(found)),
            "rhyme": sum(rhyme for rhyme, _ in found) / len(found),
            "tones": sum(tone for _, tone in found) / len(found),
            "both": sum(rhyme and tone for rhyme, tone in found) / len(found),
        }
        for name, found in counted.items()
    }
