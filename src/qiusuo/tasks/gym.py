"""Games of reasoning-gym as tasks: `gym/chain_sum`, `gym/sudoku`, `gym/zebra_puzzles`, …

reasoning-gym 0.1.25 (Apache-2.0) is an extra, `pip install 'qiusuo[gym]'`, and runs apart from us,
in the sandbox (`gym_client.py`). Four things about it need care, found in its source or by trying:

* Scorers give part of the pay for an answer within a sentence. Here the score is 1.0 or it is 0.
* A few games can be had by a constant answer, or pay for text that has the answer somewhere, or run
  the answer as code: `gym_games.py` refuses these, or lets only plain answers reach them.
* Items of seed 42 and 43 are the same but for one, since item i is made of seed + i. Here every
  item has a seed of its own, and the split goes by the question's text.
* Scorers crash on what they do not expect, or never end. That pays 0.

Two wordings of one problem, or the same numbers in another order, count as two problems: what is
the same in 86 games only their authors know. And yes-or-no games pay half to who guesses.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import sys
from typing import Any, ClassVar

from qiusuo.tasks.gym_client import gym_server
from qiusuo.tasks.gym_games import GAMES, PLAIN, REFUSED
from qiusuo.tasks.task import Problem, Task, TaskError, Verdict, response_of, take_apart

PREFIX = "gym/"
ITEM_SECONDS, SCORE_SECONDS = 30.0, 5.0
MAX_ANSWER = 100_000  # characters
REASONS = {
    "right": "right",
    "wrong": "wrong answer",
    "crash": "the scorer failed",
    "timeout": "the scorer took too long",
}


class Gym(Task):
    """Difficulty 0 is the game as the package sets it; 1 to 4 are the levels of its curriculum,
    where it has one (later levels may be as the one before).

    There are no worked thoughts: solutions with a thought have an empty one, too. `python` is one
    that has reasoning-gym.
    """

    game: ClassVar[str]
    difficulties: ClassVar[range] = range(5)

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python

    def problem(self, difficulty: int, chance: random.Random) -> Problem:
        self.check_difficulty(difficulty)
        data: dict[str, Any] = {"seed": chance.randrange(2**31), "level": difficulty}
        reply = gym_server(self.python).ask({"game": self.game, **data}, ITEM_SECONDS)
        if reply is None or "fault" in reply:
            why = reply["fault"] if reply else f"nothing came in {ITEM_SECONDS:.0f} s"
            raise TaskError(
                f"task {self.name!r} gives no problem of difficulty {difficulty} (seed "
                f"{data['seed']}): {why}; difficulty 0 always works"
            )
        question = reply["question"].strip()
        data["answer"] = reply["answer"]
        digest = hashlib.blake2b(" ".join(question.split()).encode(), digest_size=16).hexdigest()
        key = f"{self.name}:{digest}"
        return Problem(self.name, f"{question}\n", question, difficulty, key, data)

    def solution(self, problem: Problem, chance: random.Random, *, thought: bool) -> str:
        return response_of("", problem.data["answer"])

    def verify(self, problem: Problem, response: str) -> Verdict:
        parts = take_apart(response)
        if parts.answer is None:
            return Verdict(0.0, None, parts.fault)
        measures = {"thought": float(bool(parts.thought.strip()))}
        plain = PLAIN.get(self.game)
        if len(parts.answer) > MAX_ANSWER or (plain and not plain.fullmatch(parts.answer)):
            return Verdict(0.0, parts.answer, "not an answer of this game", measures)
        question = {
            "game": self.game,
            "seed": problem.data["seed"],
            "level": problem.data["level"],
            "answer": parts.answer,
            "seconds": SCORE_SECONDS,
        }
        reply = gym_server(self.python).ask(question, ITEM_SECONDS + SCORE_SECONDS)
        reason = REASONS.get((reply or {}).get("said", "crash"), "the scorer failed")
        return Verdict(float(reason == "right"), parts.answer, reason, measures)


def gym_task(name: str) -> type[Gym]:
    """The task of a game, by its name with or without `gym/`. `TaskError` for a game that there
    is not, or that is no fit reward."""
    game = name.removeprefix(PREFIX)
    if game in REFUSED:
        raise TaskError(f"{PREFIX}{game} is no fit reward: {REFUSED[game]}")
    if game not in GAMES:
        near = [PREFIX + one for one in difflib.get_close_matches(game, GAMES, 3)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see gym_games.py"
        raise TaskError(f"unknown game {PREFIX + game!r} of reasoning-gym: {hint}")
    described = f"The game {game} of reasoning-gym."
    own = {"name": PREFIX + game, "game": game, "description": described, "__module__": __name__}
    return type(f"Gym_{game}", (Gym,), own)
