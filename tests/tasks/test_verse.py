"""The task of regulated verse: requests, verdicts, solutions out of real poems."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.data.corpora import open_corpus
from qiusuo.tasks.task import TaskError, problems, split_of
from qiusuo.tasks.verse import (
    TITLES,
    Verse,
    base_rates,
    make_problem,
    poem_titles,
    read_poem,
)
from qiusuo.tasks.verse_readings import CLASSES
from qiusuo.tasks.verse_rules import FORMS, verse_lines

TOWER = "白日依山尽，\n黄河入海流。\n欲穷千里目，\n更上一层楼。"
POEM = f"《登鹳雀楼》王之涣\n{TOWER}\n"
ASKED = make_problem(FORMS["五绝"], "尤", "登鹳雀楼")


@cache
def some_poems() -> tuple[str, ...]:
    return tuple(islice(open_corpus("tang-poems").read(), 1500))


class TestProblems:
    def test_the_prompt_is_a_poem_s_head_with_the_request(self) -> None:
        assert ASKED.prompt == "《登鹳雀楼》五绝·尤韵\n"
        assert "五言绝句" in ASKED.question
        assert "七尤韵" in ASKED.question
        assert dict(ASKED.data) == {"form": "五绝", "rhyme": "尤", "title": "登鹳雀楼"}

    def test_every_form_and_class_is_asked_for(self) -> None:
        stream = list(problems(Verse(), "train", 0, range(1, 5), 600))
        assert {problem.data["form"] for problem in stream} == set(FORMS)
        assert {problem.data["rhyme"] for problem in stream} == set(CLASSES)
        assert len({problem.data["title"] for problem in stream}) > len(TITLES) // 2
        for problem in stream:
            assert list(FORMS)[problem.difficulty - 1] == problem.data["form"]

    def test_the_same_seed_gives_the_same_problems(self) -> None:
        first, again = (list(problems(Verse(), "test", 3, [1, 2], 20)) for _ in range(2))
        assert first == again

    def test_the_test_split_is_enough_for_an_evaluation(self) -> None:
        keys = {p.key for p in problems(Verse(), "test", 0, [1], 150, unique=True)}
        assert len(keys) == 150
        assert {split_of(key) for key in keys} == {"test"}

    def test_titles_and_classes_can_be_given(self) -> None:
        task = Verse(titles=["江雪"], rhymes=["庚", "寒"])
        asked = {task.problem(1, random.Random(seed)).key for seed in range(20)}
        assert asked == {"verse:五绝 庚 江雪", "verse:五绝 寒 江雪"}

    def test_without_classes_any_rhyme_will_do(self) -> None:
        problem = Verse(titles=["江雪"], rhymes=[]).problem(2, random.Random(0))
        assert problem.prompt == "《江雪》七绝\n"
        assert "押" not in problem.question
        free = make_problem(FORMS["五绝"], None, "登鹳雀楼")
        assert Verse().verify(free, TOWER).reward == 1
        assert "asked_rhyme" not in Verse().verify(free, TOWER).measures

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rhymes": ["东"]}, "no rhyme class '东'"),
            ({"titles": []}, "give at least one"),
            ({"titles": ["《春》"]}, "a title is one line"),
            ({"titles": ["春\n夜"]}, "a title is one line"),
            ({"poems": [TOWER]}, "a poem is 《title》author"),
            ({"poems": ["《登鹳雀楼》王之涣"]}, "a poem is 《title》author"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, arguments: dict, message: str) -> None:
        with pytest.raises(TaskError, match=message):
            Verse(**arguments)

    def test_an_unknown_difficulty_is_refused(self) -> None:
        with pytest.raises(TaskError, match="difficulties 1 to 4"):
            Verse().problem(5, random.Random(0))


class TestVerdicts:
    def test_a_poem_that_keeps_every_rule_is_paid(self) -> None:
        verdict = Verse().verify(ASKED, TOWER)
        assert (verdict.reward, verdict.reason, verdict.answer) == (1.0, "right", TOWER)
        rules = ("form", "rhyme", "tones", "asked_rhyme", "tones_kept")
        assert [verdict.measures[rule] for rule in rules] == [1.0] * 5
        assert verdict.measures["thought"] == 0
        assert "trace_valid" not in verdict.measures

    @pytest.mark.parametrize(
        ("response", "reason", "rules"),
        [
            ("", "no answer", None),
            ("<think></think>", "no answer", None),
            ("<think>" + TOWER, "the thought is not closed", None),
            (TOWER + "\n好诗", "not the asked form", "form 0"),
            (TOWER + TOWER, "not the asked form", "form 0"),
            ("《春夜》\n" + TOWER, "another title", "form 0"),
            (TOWER.replace("楼", "船"), "no rhyme", "form 1 rhyme 0 tones 1 asked_rhyme 0"),
            (TOWER.replace("楼", "流"), "no rhyme", "form 1 rhyme 0 tones 1 asked_rhyme 0"),
            (
                TOWER.replace("流", "天").replace("楼", "船"),
                "not in the asked rhyme",
                "form 1 rhyme 1 tones 1 asked_rhyme 0",
            ),
            (
                TOWER.replace("河", "水"),
                "tones out of order",
                "form 1 rhyme 1 tones 0 asked_rhyme 1",
            ),
        ],
    )
    def test_the_rules_are_measured_apart(
        self, response: str, reason: str, rules: str | None
    ) -> None:
        verdict = Verse().verify(ASKED, response)
        assert (verdict.reward, verdict.reason) == (0.0, reason)
        told = (rules or "").split()
        for rule, value in zip(told[::2], told[1::2], strict=True):
            assert verdict.measures[rule] == float(value)

    def test_the_form_must_be_the_asked_one(self) -> None:
        asked = make_problem(FORMS["七绝"], "尤", "登鹳雀楼")
        assert Verse().verify(asked, TOWER).reason == "not the asked form"

    def test_the_asked_title_may_stand_above(self) -> None:
        assert Verse().verify(ASKED, f"《登鹳雀楼》\n{TOWER}").reward == 1

    def test_no_line_may_come_twice(self) -> None:
        # In eight lines the fifth has the first's pattern, so the rules alone would let it pass.
        verse = f"{TOWER}\n白日依山尽，\n平沙望远愁。\n欲穷千里目，\n山月照孤舟。"
        verdict = Verse().verify(make_problem(FORMS["五律"], "尤", "望"), verse)
        assert verdict.reason == "a line stands twice"
        assert verdict.measures["rhyme"] == verdict.measures["tones"] == 1

    def test_a_plan_is_held_against_the_poem(self) -> None:
        plan = "平仄平平仄\n平平仄仄平\n仄平平仄仄\n仄仄平平平"
        good = Verse().verify(ASKED, f"<think>{plan}</think>{TOWER}")
        assert (good.reward, good.measures["trace_valid"]) == (1.0, 1.0)
        bad = Verse().verify(ASKED, f"<think>{plan[:-1]}仄</think>{TOWER}")
        assert (bad.reward, bad.measures["trace_valid"]) == (1.0, 0.0)
        other = Verse().verify(ASKED, f"<think>登高而望</think>{TOWER}")
        assert (other.measures["thought"], "trace_valid" in other.measures) == (1.0, False)

    @given(
        st.one_of(
            st.text(),
            st.text("平仄白日依山尽黄河入海流，。？！《》<think>/ \n", max_size=100),
            st.lists(
                st.sampled_from([*TOWER, TOWER, "<think>", "</think>", "《登鹳雀楼》", "\ud800"]),
                max_size=40,
            ).map("".join),
        ),
        st.sampled_from(list(FORMS)),
        st.sampled_from([*CLASSES, None]),
    )
    def test_any_text_has_a_verdict(self, text: str, form: str, rhyme: str | None) -> None:
        verdict = Verse().verify(make_problem(FORMS[form], rhyme, "登鹳雀楼"), text)
        rules = [verdict.measures.get(rule, 1.0) for rule in ("rhyme", "tones", "asked_rhyme")]
        assert verdict.reward in (0.0, 1.0)
        assert (verdict.reward == 1) == (verdict.reason == "right")
        assert all(0 <= value < 10 for value in verdict.measures.values())
        if verdict.reward:
            assert rules == [1.0, 1.0, 1.0]

    def test_a_long_answer_is_refused_quickly(self) -> None:
        for text in (TOWER * 100_000, "白" * 3_000_000, "\n" * 3_000_000 + "白"):
            assert Verse().verify(ASKED, text).reward == 0


class TestSolutions:
    def test_a_real_poem_answers_its_own_request(self) -> None:
        task = Verse(
            poems=[POEM, "《静夜思》李白\n床前明月光，\n疑是地上霜。\n举头望明月，\n低头思故乡。\n"]
        )
        problem = task.problem(1, random.Random(0))
        assert problem == ASKED == task.problem_of(POEM)
        chance = random.Random(0)
        assert task.solution(problem, chance, thought=False) == f"<think></think>{TOWER}"
        thought = "平仄平平仄\n平平仄仄平\n仄平平仄仄\n仄仄平平平"
        assert task.solution(problem, chance, thought=True) == f"<think>{thought}</think>{TOWER}"

    def test_prompt_and_verse_make_a_document(self) -> None:
        problem = Verse().problem_of(POEM)
        assert problem is not None
        assert Verse().verify(problem, POEM.partition("\n")[2]).reward == 1

    def test_without_a_poem_there_is_no_solution(self) -> None:
        with pytest.raises(TaskError, match="give Verse a list of `poems`"):
            Verse().solution(ASKED, random.Random(0), thought=False)
        with pytest.raises(TaskError, match="no poem of the list is a 七律"):
            Verse(poems=[POEM]).problem(4, random.Random(0))

    def test_every_solution_is_right(self) -> None:
        task = Verse(poems=some_poems())
        forms = Counter()
        for problem in problems(task, "train", 0, range(1, 5), 200):
            for thought in (False, True):
                response = task.solution(problem, random.Random(0), thought=thought)
                verdict = task.verify(problem, response)
                assert verdict.reward == 1, (problem, response, verdict)
                if thought:
                    assert verdict.measures["trace_valid"] == 1
            forms[problem.data["form"]] += 1
        assert set(forms) == set(FORMS)

    def test_only_poems_in_the_wanted_classes_are_taken(self) -> None:
        task = Verse(poems=some_poems(), rhymes=["庚"])
        stream = problems(task, "train", 0, range(1, 5), 50)
        assert {problem.data["rhyme"] for problem in stream} == {"庚"}

    def test_a_corpus_can_be_learned_whole(self) -> None:
        """Every poem of a known form, each with a request that tells the truth about it."""
        strict, whole = (Verse(poems=some_poems(), strict=strict) for strict in (True, False))
        rhyming = Counter()
        for poem in some_poems():
            problem = whole.problem_of(poem)
            forms = [form for form in FORMS.values() if verse_lines(read_poem(poem)[1], form)]
            assert (problem is None) == (not forms)
            if problem is None:
                continue
            verdict = whole.verify(problem, read_poem(poem)[1])
            assert verdict.measures["form"] == 1
            rhymes = verdict.measures["rhyme"] == 1
            assert (problem.data["rhyme"] is not None) == rhymes
            assert verdict.measures.get("asked_rhyme", 1) == 1
            # What keeps every rule is asked for as before.
            assert (strict.problem_of(poem) is not None) == (verdict.reward == 1)
            rhyming[rhymes] += 1
        assert min(rhyming.values()) > 100
        for problem in problems(whole, "train", 0, range(1, 5), 100):
            for thought in (False, True):
                response = whole.solution(problem, random.Random(0), thought=thought)
                assert whole.verify(problem, response).measures["form"] == 1

    def test_a_class_that_is_not_asked_for_is_not_named(self) -> None:
        assert Verse(rhymes=["庚"], strict=False).problem_of(POEM) == make_problem(
            FORMS["五绝"], None, "登鹳雀楼"
        )
        assert Verse(rhymes=["庚"]).problem_of(POEM) is None

    def test_titles_of_a_corpus_are_asked_for(self) -> None:
        titles = poem_titles(some_poems(), longest=6)
        assert len(set(titles)) == len(titles) > 200
        assert all(len(title) <= 6 for title in titles)
        asked = {p.data["title"] for p in problems(Verse(titles=titles), "train", 0, [1], 200)}
        assert asked <= set(titles)
        assert len(asked) > 100


@pytest.mark.long
def test_a_quarter_of_the_tang_quatrains_keeps_the_modern_rules() -> None:
    """What the documentation says of the built-in corpus, by the code that is the reward."""
    rates = base_rates(open_corpus("tang-poems").read())
    both = {form: round(100 * rates[form]["both"], 1) for form in rates}
    assert both == {"五绝": 18.7, "七绝": 26.5, "五律": 8.5, "七律": 8.1}
