"""Answers and traces told by hand, where one can see why they are right or wrong."""

import random
from fractions import Fraction

import pytest

from qiusuo.tasks.arithmetic import Arithmetic
from qiusuo.tasks.chains import Chains
from qiusuo.tasks.countdown import Countdown
from qiusuo.tasks.expression import ExpressionError, read_expression
from qiusuo.tasks.sums import Sums
from qiusuo.tasks.task import Problem, TaskError, response_of
from qiusuo.tasks.word_problems import WordProblems
from tests.tasks.families import some


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1+2*3", 7, (1, 2, 3)),
        (" ( 8 - 3 ) * 2 ", 10, (8, 3, 2)),
        ("8-3-2", 3, (8, 3, 2)),
        ("8/3/2", Fraction(4, 3), (8, 3, 2)),
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),
        ("((7))", 7, (7,)),
    ],
)
def test_expressions_are_read_exactly(text, value, numbers):
    read = read_expression(text)
    assert (read.value, read.numbers) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    ["", " ", "1+", "-1", "+1", "1//2", "2**3", "(1", "1)", "()", "1 2", "01", "1_0", "1.0", "1e2",
     "１", "1/0", "1/(2-2)", "9999999", "(" * 13 + "1" + ")" * 13, "1+" * 60 + "1", "1\n+1", "1=1"],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ExpressionError):
        read_expression(text)


COUNTDOWN = Problem("countdown", "", "", 3, "", {"numbers": [4, 4, 6], "target": 20})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("4*6-4", "right"),
        ("6*4 - 4", "right"),
        ("4*(6-4/4)", "a number that is not given, or too often"),
        ("5*4", "a number that is not given, or too often"),
        ("4+4+6", "wrong answer"),
        ("20", "a number that is not given, or too often"),
        ("4*6-4=20", "not an expression"),
        ("4*6-4 or 6*4-4", "not an expression"),
    ],
)
def test_countdown_answers(answer, reason):
    verdict = Countdown().verify(COUNTDOWN, response_of("", answer))
    assert (verdict.reward, verdict.reason) == (float(reason == "right"), reason)


@pytest.mark.parametrize(
    ("thought", "valid"),
    [
        ("4*6=24,24-4=20", 1),
        ("4:20+16-24*5/80;6,4:10,2,24;4*6=24,24-4=20", 1),
        ("4:20+16-24*5/80;6,4:10,2,24;6:20+14-26/120;4,4:8,0,16;4*6=24,24-4=20", 0),  # 0: no number
        ("4:20+16-24*5/80;6,4:10,2,24;6:20+14-26/120;4,4:8,16;4*6=24,24-4=20", 1),
        ("4:20+16-24*5;6,4:10,2,24;4*6=24,24-4=20", 0),  # a goal left out
        ("4:20+16-24*5/80;6,4:10,24;4*6=24,24-4=20", 0),  # a result left out
        ("4:20+16-24*5/80;6,5:11,1,30;4*6=24,24-4=20", 0),
        ("4:20+16-24*5/80;6,6:12,36,1;4*6=24,24-4=20", 0),
        ("6,4:10,2,24;4*6=24,24-4=20", 0),  # nothing was set aside
        ("4:20+16-24*5/80;6,4:10,2,24", 0),  # it did not end where it hit
        ("4*6=24", 0),
        ("4*5=20", 0),
        ("4*6=24,24-6=18,18+2=20", 0),
        ("6*6=36,36-16=20", 0),
    ],
)
def test_countdown_traces(thought, valid):
    verdict = Countdown().verify(COUNTDOWN, response_of(thought, "4*6-4"))
    assert verdict.measures["trace_valid"] == valid


@pytest.mark.parametrize(
    ("thought", "valid"),
    [
        ("07+35=321+2=521+42=941", 1),
        ("07+35+2=521+42=941", 1),
        ("07+35+2+42=941", 1),
        ("07=07+35=321+2=521+42=941", 0),
        ("07+35=321+2=521=521+42=941", 0),
        ("35+07=321+2=521+42=941", 0),
        ("07+35=321+42=563", 0),
        ("07+35=331+2=521+42=941", 0),
        ("941", 0),
    ],
)
def test_chain_traces(thought, valid):
    problem = Problem("chains", "", "", 4, "", {"terms": [70, 53, 2, 24]})
    verdict = Chains().verify(problem, response_of(thought, "941"))
    assert (verdict.reward, verdict.measures["trace_valid"]) == (1, valid)


@pytest.mark.parametrize(
    ("thought", "valid"),
    [
        ("321+2+42=521+42=941", 1),
        ("321+2+42=521+42=941=941", 0),
        ("07+35+2+42=321+2+42=521+42=941", 0),
        ("321+2+42=941", 0),
        ("521+42=941", 0),
        ("321+42+2=563+2=941", 0),
        ("331+2+42=531+42=941", 0),
        ("941", 0),
    ],
)
def test_sums_are_rewritten_whole(thought, valid):
    problem = Problem("sums", "", "", 4, "", {"terms": [70, 53, 2, 24]})
    verdict = Sums().verify(problem, response_of(thought, "941"))
    assert (verdict.reward, verdict.measures["trace_valid"]) == (1, valid)


def test_sums_and_chains_share_their_split():
    sums, chains = (task.problem(5, random.Random(0)) for task in (Sums(), Chains()))
    assert (sums.key, sums.prompt, sums.data) == (chains.key, chains.prompt, chains.data)


def test_a_countdown_thought_for_three_numbers_is_short_and_finds():
    task = Countdown()
    for seed in range(2000):
        problem = task.problem(3, random.Random(seed))
        thoughts = {task.solution(problem, random.Random(one), thought=True) for one in (0, 1)}
        assert len(thoughts) == 1  # nothing in it is chance
        assert len(thoughts.pop()) < 160


@pytest.mark.parametrize(
    ("thought", "valid"),
    [
        ("3*4=12;5+12=17;2*6=12;17-12=5", 1),
        ("4*3=12;2*6=12;5+12=17;17-12=5", 1),
        ("5+12=17;3*4=12;2*6=12;17-12=5", 0),  # a product used before it was computed
        ("3*4=12;5+12=17;17-12=5", 0),
        ("3*4=12;5+12=17;2*6=12;17-12=5;5+0=5", 0),
        ("3*4=12;5+12=18;2*6=12;18-12=6", 0),
        ("5", 0),
    ],
)
def test_arithmetic_traces(thought, valid):
    problem = Problem("arithmetic", "", "", 5, "", {"terms": [[1, 5], [1, 3, 4], [-1, 2, 6]]})
    verdict = Arithmetic().verify(problem, response_of(thought, "5"))
    assert (verdict.reward, verdict.measures["trace_valid"]) == (1, valid)


def test_both_languages_tell_the_same_problem():
    task = WordProblems()
    problems = some(task, 200)
    assert {problem.data["language"] for problem in problems} == {"en", "zh"}
    for problem in problems:
        english, chinese = (task.in_language(problem, one) for one in ("en", "zh"))
        assert problem in (english, chinese)
        assert english.key == chinese.key == problem.key
        assert english.prompt.isascii()
        assert not any(char.isascii() and char.isalpha() for char in chinese.prompt)
        for told in (english, chinese):
            assert all(str(number) in told.prompt for number in problem.data["numbers"].values())
            assert "{" not in told.prompt
    with pytest.raises(TaskError, match="'fr'"):
        task.in_language(problems[0], "fr")


@pytest.mark.parametrize(
    ("response", "reward", "measures"),
    [
        ("Tom has 12 + 7 = 19.\n#### 19", 1, {"trace_valid": 1, "language_share": 1}),
        ("<think>12+7=19。一共</think>So it is:\n#### 19", 1, {"language_share": 0}),
        ("<think>12+7=20</think>#### 19", 1, {"trace_valid": 0}),
        ("<think>12+5=17;17+2=19</think>#### 19", 1, {"trace_valid": 0}),
        ("<think>#### 19</think>19", 0, {}),
        ("The answer is 19.", 0, {}),
        ("#### 18\n#### 19", 0, {}),
        ("#### 19 apples", 0, {}),
        ("#### １９", 0, {}),
        ("<think>12+7=19\n#### 19", 0, {}),
        ("</think></think>#### 19", 0, {}),
    ],
)
def test_word_answers_stand_behind_the_mark(response, reward, measures):
    data = {"story": "gain", "numbers": {"a": 12, "b": 7}, "language": "en", "answer": 19}
    verdict = WordProblems().verify(Problem("word-problems", "", "", 1, "", data), response)
    assert verdict.reward == reward
    assert verdict.measures | measures == verdict.measures
