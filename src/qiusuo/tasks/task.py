"""What a task is: problems without end, a right response for each, and a verifier that pays 0 or 1.

A response is `<think>…</think>` and then the answer; nothing else stands after the answer's mark.
The verifier is the reward, and a policy finds every hole in a reward. So an answer counts only
if it is the whole text after its mark, in one spelling: ASCII digits, no leading zeros, no plus
sign. Full-width digits (１２), Chinese numerals and '42' within a sentence are no answers. White
space around the answer is free. No answer is ever evaluated as code.

Training and test problems are told apart by a hash of the canonical problem, not by seeds: items of
two seeds are often the same problem, and then the test has been seen in training.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

THINK, END_THINK = "<think>", "</think>"
DRAWS = 20_000  # in vain, before a split counts as exhausted

SplitName = Literal["train", "test"]


class TaskError(ValueError):
    """A task or problems that cannot be had as asked; the message says what to do."""


@dataclass(frozen=True)
class Problem:
    """One problem. `prompt` is the plain text a tiny model goes on from; `question` asks the same
    in a chat. Equal problems have equal keys, in whatever language, order or names they come.
    `data` is what the verifier needs, and goes into JSON."""

    task: str
    prompt: str
    question: str
    difficulty: int
    key: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """`reward` is 0.0 or 1.0; `answer` what was taken as the answer, None if nothing was; `reason`
    why, in a few words that are the same for the same kind of failure, so they can be counted.

    `measures` beside the reward: `thought` (1.0 if there is one) once a response has an answer's
    place, and, where the thought can be checked, `trace_valid` (1.0 if every step of it is right).
    """

    reward: float
    answer: str | None
    reason: str
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """A response taken apart: `thought` without its marks, `answer` without white space around
    it. Where the response is malformed, `answer` is None and `fault` says how."""

    thought: str
    answer: str | None
    fault: str = ""


class Guard(Protocol):
    """Watches what a policy writes over time, and tells what a verdict cannot see: that it is
    always the same. The same answers in the same order get the same figures; the state goes into
    JSON, and with it a run goes on where it stopped."""

    def judge(self, problem: Problem, verdict: Verdict) -> float:
        """A figure from 0 to 1, to be paid beside the reward; the answer is then remembered."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Task(ABC):
    """A family of problems. Subclasses are stateless: two instances give the same problems.

    `difficulties` are those that make sense; `alphabet` is every character that prompts and
    solutions use besides the marks of a thought, for a character tokenizer, or None.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    difficulties: ClassVar[range]
    alphabet: ClassVar[str | None] = None

    @abstractmethod
    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        """A problem, a function of the arguments alone. `TaskError` for a difficulty that the
        task does not have."""

    @abstractmethod
    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        """A right response: with a worked thought, or with an empty one."""

    @abstractmethod
    def verify(self, problem: Problem, response: str) -> Verdict:
        """0 or 1 for any string whatever, without an exception, in time linear in its length."""

    def together(self, answers: Sequence[tuple[Problem, Verdict]]) -> Mapping[str, float]:
        """What only many answers side by side can show, such as that they are all alike; measures
        to stand beside the reward. Nothing where verdicts say it all."""
        return {}

    def guard(self) -> Guard | None:
        """A new guard against what this task's rules let pass; None where they are enough."""
        return None

    def check_difficulty(self, difficulty: int) -> None:
        """`TaskError` for a difficulty that the task does not have."""
        if difficulty not in self.difficulties:
            low, high = self.difficulties[0], self.difficulties[-1]
            raise TaskError(
                f"task {self.name!r} has difficulties {low} to {high}, not {difficulty}"
            )


def response_of(thought: str, answer: str) -> str:
    """A response from its parts, as verifiers read it. What a chat gives apart as reasoning and
    content goes through here; without reasoning the thought is empty."""
    return f"{THINK}{thought}{END_THINK}{answer}"


def take_apart(response: str) -> Parts:
    """The thought and the answer, which is all that stands behind the one `</think>`.

    A `<think>` may open the response and stand nowhere else: templates that write it themselves
    leave it out of the response.
    """
    ends = response.count(END_THINK)
    if ends != 1:
        return Parts("", None, "the thought is not closed" if ends == 0 else "a second </think>")
    thought, answer = response.split(END_THINK)
    thought = thought.lstrip().removeprefix(THINK)
    if THINK in thought or THINK in answer:
        return Parts(thought, None, "a second <think>")
    answer = answer.strip()
    return Parts(thought, answer or None, "" if answer else "no answer")


def verdict_on(
    parts: Parts, right: str, *, trace_valid: bool | None = None, more: Mapping[str, float] = {}
) -> Verdict:
    """The verdict where one spelling is right. `trace_valid` is told if there is a thought to
    judge; `more` are further measures."""
    if parts.answer is None:
        return Verdict(0.0, None, parts.fault)
    measures = {"thought": float(bool(parts.thought.strip())), **more}
    if trace_valid is not None and measures["thought"]:
        measures["trace_valid"] = float(trace_valid)
    if parts.answer == right:
        return Verdict(1.0, parts.answer, "right", measures)
    return Verdict(0.0, parts.answer, "wrong answer", measures)


def split_of(key: str, test_share: float = 0.1, salt: str = "qiusuo") -> SplitName:
    """Where a canonical problem belongs, whatever seed it came from."""
    digest = hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < test_share * 2**64 else "train"


def problems(
    task: Task,
    split: SplitName,
    seed: int,
    difficulties: Sequence[int],
    count: int | None = None,
    unique: bool = False,
    *,
    start: int = 0,
) -> Iterator[Problem]:
    """Problems `start` to `start + count` of the stream that (task, split, seed, difficulties)
    name; without `count` it has no end. A difficulty listed twice comes twice as often.

    Every problem is a function of its index, so a run that stopped goes on at its `start` and
    gets what it would have got. With `unique` no key comes twice in the stream; its problems also
    depend on those before, which are then made again. `TaskError` at once for arguments that
    make no sense, and later where a split has no (further) problem to give.
    """
    if split not in get_args(SplitName):
        raise TaskError(f"split is 'train' or 'test', not {split!r}")
    if not difficulties:
        raise TaskError("no difficulties: give at least one")
    for difficulty in difficulties:
        task.check_difficulty(difficulty)
    stop = None if count is None else start + count
    return _stream(task, split, seed, tuple(difficulties), start, stop, unique)


def _stream(
    task: Task,
    split: SplitName,
    seed: int,
    difficulties: tuple[int, ...],
    start: int,
    stop: int | None,
    unique: bool,
) -> Iterator[Problem]:
    seen: set[str] = set()
    index = 0 if unique else start
    while stop is None or index < stop:
        # Seeded by text, so that neighbouring seeds and indices share nothing.
        chance = random.Random(f"{task.name}/{split}/{seed}/{index}")
        problem = _draw(task, split, difficulties, chance, seen)
        if unique:
            seen.add(problem.key)
        if index >= start:
            yield problem
        index += 1


def _draw(
    task: Task,
    split: SplitName,
    difficulties: tuple[int, ...],
    chance: random.Random,
    seen: set[str],
) -> Problem:
    # The difficulty is drawn once: to draw it again with every attempt would favour those
    # with more problems in this split.
    difficulty = chance.choice(difficulties)
    for _ in range(DRAWS):
        problem = task.problem(difficulty, chance)
        if split_of(problem.key) == split and problem.key not in seen:
            return problem
    raise TaskError(
        f"task {task.name!r} has no further {split} problem of difficulty {difficulty} after "
        f"{len(seen)}: ask for fewer, for a higher difficulty, or without `unique`"
    )
