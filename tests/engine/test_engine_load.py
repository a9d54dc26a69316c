"""How busy an engine is, as a server asks it between two steps."""

import pytest

from qiusuo.engine.request import EngineError
from qiusuo.engine.running import EngineLoad, RunningEngine
from tests.engine.test_running import LONG, Gate, language_model, run, settled, tokenizer, turn

__all__ = ["tokenizer"]  # a fixture


def test_it_counts_answers_and_pages(tokenizer):
    lm = language_model(tokenizer, max_running=2, prefix_cache=False)
    gate = Gate(lm.engine)
    size = lm.engine.cache.page_tokens
    idle = EngineLoad(0, 0, 0, lm.engine.pool.count * size, lm.engine.capacity)

    async def main():
        async with RunningEngine(lm) as engine:
            assert engine.load() == idle
            first = await engine.chat(turn(3), **LONG)
            await gate.steps(1)
            busy = engine.load()
            prompt = len(tokenizer.apply_chat_template(turn(3)))
            assert (busy.running, busy.waiting) == (1, 0)
            assert prompt <= busy.cache_tokens_used < prompt + 1 + size
            assert busy.cache_tokens_used % size == 0
            gate.open()
            three = await engine.chat(turn(1), n=3, **LONG)
            four = await engine.chat(turn(2), n=4, **LONG)
            load = engine.load()
            assert load.waiting + load.running <= 8
            for handle in (*first, *three, *four):
                handle.cancel()
            await settled(engine)
            assert engine.load() == idle
        with pytest.raises(EngineError, match="does not run"):
            engine.load()

    run(main())


def test_answers_behind_a_prompt_wait(tokenizer):
    lm = language_model(tokenizer, max_running=1)
    gate = Gate(lm.engine)

    async def main():
        async with RunningEngine(lm) as engine:
            await engine.chat(turn(1), n=3, priority=1, **LONG)
            one = engine.load()
            assert (one.running, one.waiting) == (0, 3)
            gate.open()

    run(main())
