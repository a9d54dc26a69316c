"""A user's task, by its file: parity that also likes answers it has not seen often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qiusuo.tasks.parity import Parity
from qiusuo.tasks.task import Problem, Verdict


class Often:
    """1 for an answer that was never seen, less each time."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def judge(self, problem: Problem, verdict: Verdict) -> float:
        key = f"{verdict.answer}{verdict.measures.get('thought')}"
        self.seen[key] += 1
        return 1 / self.seen[key]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = Counter(state["seen"])


class Novel(Parity):
    name = "novel"

    def guard(self) -> Often:
        return Often()
