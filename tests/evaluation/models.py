"""A tiny random model of characters, and an answerer that answers as it is told."""

from collections.abc import Callable, Sequence

from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.evaluation.answers import Reply
from qiusuo.tasks.chains import Chains
from qiusuo.tasks.task import Problem
from tests.model.shapes import tiny_model


def tiny_lm(alphabet: str = Chains.alphabet, **changes: object) -> LanguageModel:
    tokenizer = Tokenizer.train_characters([alphabet])
    model = tiny_model(vocab_size=tokenizer.vocab_size, **changes)
    return LanguageModel(model, tokenizer, Limits(cache_bytes=1 << 20))


class Scripted:
    """``answer(problem, sample)`` gives the response; sample -1 is the greedy one."""

    def __init__(self, answer: Callable[[Problem, int], str | Reply]) -> None:
        self.answer = answer
        self.calls: list[dict] = []

    def answers(
        self, problems: Sequence[Problem], *, samples: int, temperature: float, **more: object
    ) -> list[list[Reply]]:
        self.calls.append({"samples": samples, "temperature": temperature} | more)
        numbers = [-1] if temperature == 0 else list(range(samples))
        return [[self._reply(problem, number) for number in numbers] for problem in problems]

    def _reply(self, problem: Problem, number: int) -> Reply:
        told = self.answer(problem, number)
        return told if isinstance(told, Reply) else Reply(told, len(told), "stop")

    def describe(self) -> dict:
        return {}
