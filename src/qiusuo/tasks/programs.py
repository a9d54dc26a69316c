"""Programs to write: a function in words and examples, judged by what it does on hidden inputs.

    Write a Python function f(x) of a list of whole numbers x. Step by step:
    1. keep the even numbers
    2. give the sum
    f([3, 4, 8]) == 12
    …                      ->  <think>[3, 4, 8] [4, 8] 12</think>def f(x):
                                   x = [n for n in x if n % 2 == 0]
                                   return sum(x)

The answer is the program, plain or as one ```python block, and nothing beside it. It runs in the
sandbox, once, on all hidden inputs; what it gives must be the same to the letter (`repr`), and it
may print nothing. The right results are never in the sandbox: they are compared out here. So there
is no test to read in there and no mark of success to print, and the examples do not help, since no
hidden input is among them. Two programs that do the same have the same key, however the steps are
told: it is a digest of what they do to fixed inputs. A thought is what becomes of an example.

What this cannot do. A program is judged on a dozen inputs, so one that is wrong on rare ones
passes. All inputs come in one process, in which a program may see them together, but not what is
right. The sandbox keeps programs from the network and from files, but for an empty folder of their
own; it does not guard against faults of the kernel, nor against programs that are right by chance
or by the clock. Where there is no sandbox, `verify` raises `SandboxError` for what would have run.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from qiusuo.tasks.program_steps import STEPS, Kind, Step
from qiusuo.tasks.sandbox import Limits, run_program
from qiusuo.tasks.task import Problem, Task, Verdict, response_of, take_apart, verdict_on

EXAMPLES, HIDDEN = 3, 12
LONGEST_ANSWER = 4000  # characters
LARGEST = 10**6  # no number in a problem is larger,
LONGEST = 60  # and no list or text longer
LIMITS = Limits(
    seconds=5.0, cpu_seconds=2, memory_bytes=128 << 20, processes=4, output_bytes=16 << 10
)
BLOCK = re.compile(r"```(?:python)?[ \t]*\n(.*?)\n?```", re.DOTALL)
TAIL = """

import json, sys
print(repr([f(x) for x in json.loads(sys.stdin.readline())]))
"""
OF = {"numbers": "a list of whole numbers x", "text": "a text x", "number": "a whole number x"}
REASONS = {
    "timeout": "the program takes too long",
    "output": "the program writes too much",
    "error": "the program fails",
}
Chosen = Sequence[tuple[Step, int]]  # a step and its k


class Programs(Task):
    """Difficulty is the number of steps. Each of them matters: without it the function would be
    another one. A verdict takes a process, some 50 ms."""

    name: ClassVar[str] = "programs"
    description: ClassVar[str] = "Python functions of a few steps, run on hidden inputs."
    difficulties: ClassVar[range] = range(1, 7)

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        while True:
            steps = _draw(difficulty, chance)
            kind = steps[0][0].takes
            inputs = _inputs(kind, EXAMPLES + HIDDEN, chance)
            probed = _behaviour(steps, PROBES[kind])
            if probed and _is_telling(steps, inputs) and _each_matters(steps, probed):
                break
        examples = [[one, _apply(steps, one)] for one in inputs[:EXAMPLES]]
        told = "\n".join(
            f"{place}. {step.words.format(k=k)}" for place, (step, k) in enumerate(steps, 1)
        )
        shown = "\n".join(f"f({given!r}) == {result!r}" for given, result in examples)
        task = f"Write a Python function f(x) of {OF[kind]}. Step by step:\n{told}\n{shown}"
        question = (
            f"{task}\nAnswer with the program alone, as one ```python block. It may define and "
            "import what it likes, but print nothing."
        )
        data = {
            "steps": [[STEPS.index(step), k] for step, k in steps],
            "examples": examples,
            "hidden": inputs[EXAMPLES:],
        }
        digest = hashlib.blake2b(probed.encode(), digest_size=16).hexdigest()
        return Problem(
            self.name, f"{task}\n", question, difficulty, f"programs:{kind}:{digest}", data
        )

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        steps = _chosen(problem)
        *first, last = (step.code.format(k=k) for step, k in steps)
        lines = [*(f"x = {code}" for code in first), f"return {last}"]
        program = "def f(x):\n" + "\n".join(f"    {line}" for line in lines)
        given, _ = chance.choice(problem.data["examples"])
        return response_of(_trace(steps, given) if thought else "", program)

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts = take_apart(response)
        program = _program(parts.answer or "")
        steps = _chosen(problem)
        traces = {_trace(steps, given) for given, _ in problem.data["examples"]}
        valid = parts.thought.strip() in traces
        reason = _fault(program, steps, problem.data["hidden"]) if parts.answer else ""
        right = parts.answer if parts.answer is not None and not reason else ""
        verdict = verdict_on(parts, right, trace_valid=valid)
        if reason and parts.answer is not None:
            return Verdict(0.0, verdict.answer, reason, verdict.measures)
        return verdict


def _program(answer: str) -> str | None:
    """The program that the answer is; None if there is other text beside its block."""
    block = BLOCK.fullmatch(answer)
    program = block[1] if block else answer
    return None if "```" in program or len(answer) > LONGEST_ANSWER else program


def _fault(program: str | None, steps: Chosen, hidden: Sequence[Any]) -> str:
    """Why the program gets nothing, or nothing."""
    if program is None:
        return "no program alone"
    if "def f" not in program and "f =" not in program:
        return "no function f"  # and no process for it
    ran = run_program(program + TAIL, json.dumps(hidden) + "\n", LIMITS)
    if ran.status != "ok":
        return REASONS[ran.status]
    right = repr([_apply(steps, given) for given in hidden]) + "\n"
    return "" if ran.stdout == right and not ran.stderr else "wrong answer"


def _draw(count: int, chance: random.Random) -> Chosen:
    """Steps each of which takes what the one before it gives."""
    kind: Kind = chance.choice(("numbers", "numbers", "text", "text", "number"))
    steps: list[tuple[Step, int]] = []
    for _ in range(count):
        step = chance.choice(BY_KIND[kind])
        steps.append((step, chance.randint(step.least, step.most)))
        kind = step.gives
    return steps


def _inputs(kind: Kind, count: int, chance: random.Random) -> list[Any]:
    """Different inputs; the first ones are shown, and not empty."""
    found: dict[str, Any] = {}
    while len(found) < count:
        size = chance.randint(3 if len(found) < EXAMPLES else 0, 8)
        one: Any
        if kind == "numbers":
            one = [chance.randint(0, 20) for _ in range(size)]
        elif kind == "text":
            words = ("".join(chance.choices("aaeeioubcdlmnrst", k=chance.randint(1, 6)))
                     for _ in range(1 + size // 3))  # fmt: skip
            one = " ".join(words)
        else:
            one = chance.randint(1, 10 ** chance.randint(1, 3))
        found[repr(one)] = one
    return list(found.values())


def _apply(steps: Chosen, given: Any) -> Any:
    for step, k in steps:
        given = step.apply(given, k)
    return given


def _chosen(problem: Problem) -> Chosen:
    return [(STEPS[place], k) for place, k in problem.data["steps"]]


def _trace(steps: Chosen, given: Any) -> str:
    """What becomes of an input, step by step."""
    values = [given]
    for step, k in steps:
        values.append(step.apply(values[-1], k))
    return " ".join(map(repr, values))


def _behaviour(steps: Chosen, probes: Sequence[Any]) -> str:
    """What the function gives for the probes; nothing if a value on the way is too large."""
    results = []
    for given in probes:
        value = given
        for step, k in steps:
            value = step.apply(value, k)
            if not _is_small(value):
                return ""
        results.append(value)
    return repr(results)


def _is_small(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) <= LARGEST
    if isinstance(value, str):
        return len(value) <= LONGEST
    return len(value) <= LONGEST and all(abs(one) <= LARGEST for one in value)


def _is_telling(steps: Chosen, inputs: Sequence[Any]) -> bool:
    """Whether values stay small, and no constant or echo is right on most hidden inputs."""
    if not _behaviour(steps, inputs):
        return False
    pairs = [(repr(given), repr(_apply(steps, given))) for given in inputs[EXAMPLES:]]
    most = Counter(result for _, result in pairs).most_common(1)[0][1]
    echoes = sum(given == result for given, result in pairs)
    return max(most, echoes) <= HIDDEN // 2


def _each_matters(steps: Chosen, behaviour: str) -> bool:
    """Whether the function is another one without any step that could be left out."""
    for place, (step, _) in enumerate(steps):
        rest = [*steps[:place], *steps[place + 1 :]]
        if rest and step.takes == step.gives:
            kind = rest[0][0].takes
            if _behaviour(rest, PROBES[kind]) == behaviour:
                return False
    return True


BY_KIND: dict[Kind, list[Step]] = {
    kind: [step for step in STEPS if step.takes == kind] for kind in ("numbers", "text", "number")
}
# Fixed for ever: the keys of problems, and so the split, are what functions do to them.
PROBES: dict[Kind, list[Any]] = {
    kind: _inputs(kind, 24, random.Random(f"probes of {kind}")) for kind in BY_KIND
}
