"""Many clients at one engine: real threads, real event loops, and an order that is forced by gates
where it matters, never by time."""

import asyncio
import subprocess
import sys
import threading
import time
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import torch

import qiusuo
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine import core
from qiusuo.engine.answer_events import Kind
from qiusuo.engine.answer_stream import AnswerStream
from qiusuo.engine.constraint import Constraint
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import EngineError, RequestError
from qiusuo.engine.running import RunningEngine
from tests.model.shapes import tiny_model

TEXT = "路漫漫其修远兮，吾将上下而求索。"
PATIENCE = 30.0  # seconds until a test that hangs fails; nothing waits for it otherwise
LONG = dict(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_characters([TEXT])


def model_of(tokenizer: Tokenizer, seed: int = 0) -> torch.nn.Module:
    return tiny_model(
        seed, eos_token_id=None, vocab_size=tokenizer.vocab_size, max_position_embeddings=512
    )


@pytest.fixture
def lm(tokenizer) -> qiusuo.LanguageModel:
    return language_model(tokenizer)


def language_model(tokenizer: Tokenizer, seed: int = 0, **limits) -> qiusuo.LanguageModel:
    settings = dict(cache_bytes=1 << 20, page_tokens=4, batch_invariant=True) | limits
    return qiusuo.LanguageModel(model_of(tokenizer, seed), tokenizer, Limits(**settings))


def turn(index: int) -> list[dict[str, str]]:
    words = TEXT[index % 7 :][: 1 + index % 9]
    return [{"role": "user", "content": words * (1 + index % 3)}]


def run(main) -> None:
    asyncio.run(asyncio.wait_for(main, PATIENCE))


def content(events) -> str:
    return "".join(event.text for event in events if event.kind is Kind.CONTENT)


async def heard(handle) -> list:
    return [event async for event in handle]


def assert_same(message, expected) -> None:
    assert message.token_ids == expected.token_ids
    assert message.finish_reason == expected.finish_reason
    assert message.content == expected.content
    assert message.reasoning_content == expected.reasoning_content


def assert_all_free(lm) -> None:
    assert lm.engine.idle
    lm.engine.pool.check()
    assert lm.engine.pool.available == lm.engine.pool.count


async def settled(engine) -> None:
    """Until all that was asked of the engine's thread so far has been done."""
    await asyncio.wrap_future(engine._thread.call(lambda: None))


class Gate:
    """Lets an engine make as many steps as it is told."""

    def __init__(self, engine) -> None:
        self.engine, self.real_step = engine, engine.step
        self.condition = threading.Condition()
        self.made = self.allowed = 0
        self.touched: list[list] = []
        engine.step = self.step

    def step(self):
        with self.condition:
            assert self.condition.wait_for(lambda: self.made < self.allowed, PATIENCE)
        touched = self.real_step()
        with self.condition:
            self.touched.append(touched)
            self.made += 1
            self.condition.notify_all()
        return touched

    async def steps(self, count: int) -> None:
        with self.condition:
            self.allowed = wanted = self.allowed + count
            self.condition.notify_all()
        await asyncio.to_thread(self._wait, lambda: self.made >= wanted)

    def _wait(self, what) -> None:
        with self.condition:
            assert self.condition.wait_for(what, PATIENCE)

    def open(self) -> None:
        with self.condition:
            self.allowed = 1 << 60
            self.condition.notify_all()


class Held:
    """Holds an engine's thread between two steps, and counts what is asked of it meanwhile."""

    def __init__(self, engine) -> None:
        self.condition, self.release = threading.Condition(), threading.Event()
        self.arrived = 0
        self.real_call = engine._thread.call
        self.real_call(lambda: self.release.wait(PATIENCE))
        engine._thread.call = self.call

    def call(self, act):
        result = self.real_call(act)
        with self.condition:
            self.arrived += 1
            self.condition.notify_all()
        return result

    async def until(self, count: int) -> None:
        await asyncio.to_thread(self._wait, count)

    def _wait(self, count: int) -> None:
        with self.condition:
            assert self.condition.wait_for(lambda: self.arrived >= count, PATIENCE)


# The same answers


def test_fifty_clients_get_what_each_would_get_alone(tokenizer, lm):
    options = [
        dict(max_tokens=4 + i % 7, temperature=float(i % 2), seed=i, thinking=i % 5 == 0)
        for i in range(50)
    ]
    alone = language_model(tokenizer)
    expected = [alone.chat(turn(i), **options[i]) for i in range(50)]

    async def client(engine, i):
        [answer] = await engine.chat(turn(i), **options[i])
        events = await heard(answer)
        message = await answer.message()
        assert_same(message, expected[i])
        assert content(events) == message.content
        assert message.usage.prompt_tokens == expected[i].usage.prompt_tokens
        assert answer.ended

    async def main():
        async with RunningEngine(lm) as engine:
            await asyncio.gather(*(client(engine, i) for i in range(50)))
            assert engine.statistics.drawn == sum(len(one.token_ids) for one in expected)

    run(main())
    assert lm.engine.statistics.passes < alone.engine.statistics.passes / 2
    assert_all_free(lm)


def test_plain_texts_and_several_answers(tokenizer, lm):
    options = dict(n=3, max_tokens=12, temperature=1.0, seed=5, logprobs=2)
    expected = language_model(tokenizer).generate([TEXT], **options)

    async def main():
        async with RunningEngine(lm) as engine:
            answers = await engine.complete(TEXT, **options)
            assert len(answers) == 3
            completions = [await answer.message() for answer in answers]
            assert completions == expected
            assert len({tuple(one.token_ids) for one in completions}) == 3
            for answer, one in zip(answers, completions, strict=True):
                assert content(await heard(answer)) == one.text
                assert one.usage.completion_tokens == len(one.token_ids)
            by_ids = await engine.complete(tokenizer.encode(TEXT)[:1], keep_experts=True)
            assert (await by_ids[0].message()).experts is not None
            first, *others = await engine.complete(TEXT, **options)
            first.cancel()
            rest = [await answer.message() for answer in others]
            assert [one.token_ids for one in rest] == [one.token_ids for one in expected[1:]]

    run(main())
    assert_all_free(lm)


def test_without_a_tokenizer_ids_only(tokenizer):
    bare = qiusuo.LanguageModel(model_of(tokenizer), None)
    (expected,) = bare.generate([[1, 2, 3]], max_tokens=5)

    async def main():
        async with RunningEngine(bare) as engine:
            [answer] = await engine.complete([1, 2, 3], max_tokens=5)
            assert await heard(answer) == []
            assert (await answer.message()) == expected
            with pytest.raises(ValueError, match="without a tokenizer"):
                await engine.complete(TEXT)

    run(main())


def test_constraint_is_compiled_for_each_and_held(lm):
    pytest.importorskip("llguidance")
    choices = ["漫其", "其修", "兮，吾", "，吾将", "吾将上"]

    async def client(engine, choice):
        [answer] = await engine.chat(turn(1), constraint=Constraint("choice", [choice, "路"]))
        message = await answer.message()
        assert message.content in (choice, "路")
        assert message.finish_reason == "stop"

    async def main():
        async with RunningEngine(lm) as engine:
            await asyncio.gather(*(client(engine, choice) for choice in choices * 2))
            with pytest.raises(DataError, match="cannot be used"):
                await engine.chat(turn(1), constraint=Constraint("regex", "("))

    run(main())
    assert_all_free(lm)


# The client goes away


@pytest.mark.parametrize("events", range(7))
def test_cancelled_at_any_token(lm, events):
    async def main():
        async with RunningEngine(lm) as engine:
            [answer] = await engine.chat(turn(3), **LONG)
            got = [await anext(answer) for _ in range(events)]
            answer.cancel()
            message = await answer.message()
            assert message.finish_reason == "cancelled"
            assert len(message.token_ids) < 200
            assert content([*got, *await heard(answer)]) == message.content
            answer.cancel()  # once more is nothing
            await settled(engine)
            assert_all_free(lm)

    run(main())


def test_cancelled_within_a_step(lm):
    gate = Gate(lm.engine)

    async def main():
        async with RunningEngine(lm) as engine:
            [answer] = await engine.chat(turn(3), **LONG)
            await gate.steps(5)
            answer.cancel()
            await gate.steps(1)
            message = await answer.message()
            assert 5 <= len(message.token_ids) <= 6
            await settled(engine)
            assert gate.made == 6
            assert_all_free(lm)

    run(main())


async def leave_iteration(answer):
    async for _ in answer:
        pass


async def leave_message(answer):
    await answer.message()


@pytest.mark.parametrize("client", [leave_iteration, leave_message])
def test_a_client_whose_task_is_cancelled(tokenizer, lm, client):
    """And its neighbour, who hears nothing of it."""
    expected = language_model(tokenizer).chat(turn(1), max_tokens=40, ignore_eos=True)
    gate = Gate(lm.engine)

    async def main():
        async with RunningEngine(lm) as engine:
            # Asked for at once: behind the gate no second request would be heard.
            asked = engine.chat(turn(1), n=2, max_tokens=40, ignore_eos=True)
            [neighbour, answer] = await asyncio.wait_for(asked, PATIENCE)
            await gate.steps(3)
            task = asyncio.create_task(client(answer))
            await gate.steps(3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            assert (await answer.message()).finish_reason == "cancelled"
            assert_same(await neighbour.message(), expected)

    run(main())
    assert_all_free(lm)


def test_iterators_that_are_closed_or_dropped(lm):
    async def main():
        async with RunningEngine(lm) as engine:
            [first], [second], [third] = [await engine.chat(turn(i), **LONG) for i in range(3)]
            async with aclosing(first):
                await anext(first)
            assert (await first.message()).finish_reason == "cancelled"
            async with second:
                await anext(second)
            assert (await second.message()).finish_reason == "cancelled"
            await anext(third)
            assert not lm.engine.idle
            del third
            await settled(engine)
            assert_all_free(lm)

    run(main())


@pytest.mark.parametrize("submitted", [False, True])
def test_a_client_who_leaves_while_asking(lm, submitted):
    async def main():
        async with RunningEngine(lm) as engine:
            if submitted:  # held in the midst of the submission
                entered, release = threading.Event(), threading.Event()
                real_submit = lm.engine.submit

                def submit(request):
                    sequences = real_submit(request)
                    entered.set()
                    assert release.wait(PATIENCE)
                    return sequences

                lm.engine.submit = submit
                task = asyncio.create_task(engine.chat(turn(1), **LONG))
                assert await asyncio.to_thread(entered.wait, PATIENCE)
            else:
                held = Held(engine)
                release = held.release
                task = asyncio.create_task(engine.chat(turn(1), **LONG))
                await held.until(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            release.set()
            await settled(engine)
            assert_all_free(lm)
            assert (lm.engine.statistics.prompt_tokens > 0) == submitted

    run(main())


def test_a_slow_client_stalls_nobody(tokenizer, lm):
    expected = language_model(tokenizer).chat(turn(4), max_tokens=30, ignore_eos=True)

    async def main():
        async with RunningEngine(lm) as engine:
            [slow] = await engine.chat(turn(4), max_tokens=30, ignore_eos=True)
            for i in range(3):
                [quick] = await engine.chat(turn(i), max_tokens=30, ignore_eos=True)
                await heard(quick)
            message = await slow.message()  # all of it is there, though none was taken
            assert_same(message, expected)
            events = await heard(slow)
            assert content(events) == expected.content
            assert len(events) > 4
            assert await heard(slow) == []

    run(main())


# What a request asks for


def test_a_thought_is_closed_on_request(lm, tokenizer):
    gate, end = Gate(lm.engine), tokenizer.token_id("</think>")
    options = dict(thinking=True, max_tokens=20, ignore_eos=True, logit_bias={end: -100.0})

    async def main():
        async with RunningEngine(lm) as engine:
            [answer] = await engine.chat(turn(5), **options)
            await gate.steps(6)
            answer.close_thought()
            gate.open()
            message = await answer.message()
            place = message.token_ids.index(end)
            assert place in (6, 7)  # one was being drawn, at most
            assert message.usage.reasoning_tokens == place + 1
            assert message.reasoning_content
            assert message.content
            answer.close_thought()  # too late, and no matter
            [budget] = await engine.chat(turn(5), thinking_budget=3, **options)
            assert (await budget.message()).token_ids.index(end) == 3

    run(main())
    assert_all_free(lm)


def test_deadlines(lm, monkeypatch):
    clock = [100.0]
    stub = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(core, "time", stub)
    gate = Gate(lm.engine)

    async def main():
        async with RunningEngine(lm) as engine:
            [answer] = await engine.chat(turn(1), deadline=105.0, **LONG)
            await gate.steps(4)
            clock[0] = 106.0
            gate.open()
            message = await answer.message()
            assert message.finish_reason == "deadline"
            assert 4 <= len(message.token_ids) <= 5
            [late] = await engine.chat(turn(1), deadline=105.0, **LONG)
            message = await late.message()
            assert (message.finish_reason, message.token_ids) == ("deadline", [])

    run(main())
    assert_all_free(lm)


def test_priorities(tokenizer):
    lm = language_model(tokenizer, max_running=1)
    ended = []

    async def client(engine, priority):
        [answer] = await engine.chat(turn(priority), priority=priority, max_tokens=5)
        await answer.message()
        ended.append(priority)

    async def main():
        async with RunningEngine(lm) as engine:
            held = Held(engine)
            clients = [asyncio.create_task(client(engine, p)) for p in (1, 0, 3, 2)]
            await held.until(4)
            held.release.set()
            await asyncio.gather(*clients)

    run(main())
    assert ended == [3, 2, 1, 0]


def test_a_long_prompt_beside_short_chats(tokenizer):
    """While it is read, a chunk at a time, every chat gets a token in every step."""
    lm = language_model(tokenizer, step_tokens=12)
    gate = Gate(lm.engine)

    async def main():
        async with RunningEngine(lm) as engine:
            asking = [asyncio.create_task(engine.chat(turn(i), **LONG)) for i in range(3)]
            gate.allowed = 1 << 60
            chats = [handle for [handle] in await asyncio.gather(*asking)]
            for chat in chats:
                await anext(chat)
            [long] = await engine.complete([1] * 300, max_tokens=2, ignore_eos=True)
            await long.message()
            sequence = long._stream.sequence
            streams = [chat._stream.sequence for chat in chats]
            last = next(i for i, touched in enumerate(gate.touched) if sequence in touched)
            reading = gate.touched[last - 25 : last]
            assert all(set(streams) <= set(touched) for touched in reading)
            for chat in chats:
                chat.cancel()

    run(main())
    assert_all_free(lm)


def test_weights_change_under_a_stream(tokenizer, lm):
    gate, other = Gate(lm.engine), model_of(tokenizer, seed=1)
    expected = language_model(tokenizer, seed=1).chat(turn(2), max_tokens=9)
    before = language_model(tokenizer).chat(turn(2), max_tokens=9)
    assert before.token_ids != expected.token_ids

    async def main():
        async with RunningEngine(lm) as engine:
            [answer] = await engine.chat(turn(6), max_tokens=20, ignore_eos=True)
            await gate.steps(5)
            swapping = asyncio.create_task(engine.swap_weights(other.state_dict()))
            gate.open()
            assert await swapping == 1
            versions = (await answer.message()).versions
            assert len(versions) == 20
            assert versions == sorted(versions)
            assert versions[:5] == [0] * 5
            with pytest.raises(RequestError, match="the model has no nothing"):
                await engine.swap_weights({"nothing": torch.zeros(1)})
            [answer] = await engine.chat(turn(2), max_tokens=9)
            assert_same(await answer.message(), expected)

    run(main())


# Refusals, failures, ends


def test_what_cannot_be_answered_is_refused_at_once(tokenizer, lm):
    expected = language_model(tokenizer).chat(turn(1), max_tokens=50, ignore_eos=True)

    async def main():
        async with RunningEngine(lm) as engine:
            [neighbour] = await engine.chat(turn(1), max_tokens=50, ignore_eos=True)
            for kind, message, options in [
                (DataError, "at least one message", dict(messages=[])),
                (
                    DataError,
                    "leaves no room",
                    dict(messages=[dict(role="user", content="路" * 600)]),
                ),
                (RequestError, "n must be at least 1", dict(n=0)),
                (RequestError, "n must be a whole number", dict(n=1.5)),
                (RequestError, "deadline must be", dict(deadline="soon")),
                (RequestError, "deadline must be", dict(deadline=float("nan"))),
                (RequestError, "priority must be", dict(priority=None)),
                (RequestError, "namespace must be", dict(namespace="\ud800")),
                (RequestError, "thinking_budget must be", dict(thinking_budget="much")),
                (ValueError, "temperature must be", dict(temperature=-1.0)),
                (TypeError, "unexpected keyword", dict(nonsense=1)),
            ]:
                with pytest.raises(kind, match=message):
                    await engine.chat(**(dict(messages=turn(1)) | options))
            for kind, prompt in [(RequestError, []), (RequestError, [10**6]), (TypeError, [1.5])]:
                with pytest.raises(kind):
                    await engine.complete(prompt)
            assert_same(await neighbour.message(), expected)

    run(main())
    assert_all_free(lm)


def test_an_answer_that_cannot_be_read_ends_alone(tokenizer, lm, monkeypatch):
    expected = language_model(tokenizer).chat(turn(1), max_tokens=20, ignore_eos=True)
    push = AnswerStream.push

    def faulty(stream, token, drawn):
        if stream.splitter is None and stream.tokens == 3:  # a plain text's
            raise KeyError("no such token")
        return push(stream, token)

    monkeypatch.setattr(AnswerStream, "push", faulty)

    async def main():
        async with RunningEngine(lm) as engine:
            [neighbour] = await engine.chat(turn(1), max_tokens=20, ignore_eos=True)
            [answer] = await engine.complete(TEXT, max_tokens=20, ignore_eos=True)
            with pytest.raises(RequestError, match="cannot be read: KeyError: 'no such token'"):
                await answer.message()
            with pytest.raises(RequestError, match="cannot be read"):
                await heard(answer)
            assert_same(await neighbour.message(), expected)

    run(main())
    assert_all_free(lm)


def test_a_step_that_fails_ends_all_and_says_so(tokenizer, lm):
    expected = language_model(tokenizer).chat(turn(1), max_tokens=5)
    gate = Gate(lm.engine)
    engine = RunningEngine(lm)

    async def main():
        engine.start()
        handles = [(await engine.chat(turn(1), **LONG))[0]]
        task = asyncio.create_task(heard(handles[0]))
        await gate.steps(3)
        held = Held(engine)  # comes before what is asked next

        def fail():
            raise MemoryError("no room")

        gate.real_step = fail
        asking = [asyncio.create_task(engine.chat(turn(i), **LONG)) for i in range(2)]
        await held.until(2)
        held.release.set()
        gate.open()
        for one in await asyncio.gather(*asking, return_exceptions=True):
            handles += [] if isinstance(one, EngineError) else one
        for handle in handles:
            with pytest.raises(EngineError, match=r"has failed .MemoryError: no room") as caught:
                await handle.message()
            assert isinstance(caught.value.__cause__, MemoryError)
        with pytest.raises(EngineError, match="no room"):
            await task
        for use in (engine.chat(turn(1)), engine.complete("路"), engine.swap_weights({})):
            with pytest.raises(EngineError, match=r"has failed .MemoryError: no room"):
                await use
        with pytest.raises(EngineError, match="no room"):
            _ = engine.statistics

    run(main())
    assert_all_free(lm)
    with pytest.raises(EngineError, match="drives"):
        lm.chat(turn(1))
    engine.stop()
    lm.engine.step = type(lm.engine).step.__get__(lm.engine)
    assert_same(lm.chat(turn(1), max_tokens=5), expected)

    async def again():
        async with engine:
            [answer] = await engine.chat(turn(1), max_tokens=5)
            assert_same(await answer.message(), expected)

    run(again())


def test_stop_while_busy(lm):
    async def main():
        engine = RunningEngine(lm)
        async with engine:
            handles = [(await engine.chat(turn(i), **LONG))[0] for i in range(4)]
            tasks = [asyncio.create_task(heard(handle)) for handle in handles[1:]]
            await anext(handles[0])
        for handle in handles:
            message = await handle.message()
            assert message.finish_reason == "cancelled"
        for handle, task in zip(handles[1:], tasks, strict=True):
            assert content(await task) == (await handle.message()).content
        handles[0].cancel()
        handles[0].close_thought()
        with pytest.raises(EngineError, match="does not run"):
            await engine.chat(turn(1))
        engine.stop()  # once more is nothing

    run(main())
    assert_all_free(lm)
    assert lm.chat(turn(1), max_tokens=3).token_ids


def test_what_was_asked_and_not_begun_when_it_stops_is_refused(lm):
    async def main():
        engine = RunningEngine(lm)
        engine.start()
        held = Held(engine)
        asking = asyncio.create_task(engine.chat(turn(1), **LONG))
        await held.until(1)
        engine._thread._stopping = True  # as ``stop`` does first
        held.release.set()
        with pytest.raises(EngineError, match="was stopped"):
            await asking
        engine.stop()

    run(main())
    assert_all_free(lm)


def test_what_is_asked_after_the_end_is_refused(lm):
    engine = RunningEngine(lm)
    engine.start()
    thread = engine._thread
    engine.stop()
    with pytest.raises(EngineError, match="was stopped"):
        thread.call(lambda: None).result(PATIENCE)


def test_two_event_loops(tokenizer, lm):
    """Clients in loops of two threads, and a handle that is made in one and read in another."""
    expected = [language_model(tokenizer).chat(turn(i), max_tokens=15) for i in range(8)]
    engine = RunningEngine(lm)
    engine.start()
    failures = []

    async def clients(indices):
        async def client(i):
            [answer] = await engine.chat(turn(i), max_tokens=15)
            events = await heard(answer)
            assert_same(await answer.message(), expected[i])
            assert content(events) == expected[i].content

        await asyncio.gather(*map(client, indices))

    def in_a_loop(indices):
        try:
            run(clients(indices))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=in_a_loop, args=(range(k, 8, 2),)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures

    async def make():
        [answer] = await engine.chat(turn(3), max_tokens=15)
        return answer, asyncio.create_task(answer.message())  # a sleeper whose loop goes

    async def read(answer):
        assert content(await heard(answer)) == expected[3].content

    async def both():
        answer, task = await make()
        await asyncio.gather(task, asyncio.to_thread(asyncio.run, read(answer)))
        assert_same(task.result(), expected[3])

    run(both())
    engine.stop()
    assert_all_free(lm)


def test_a_loop_that_ends_takes_its_clients_along(lm):
    engine = RunningEngine(lm)
    engine.start()

    async def client():
        [answer] = await engine.chat(turn(1), **LONG)
        task = asyncio.create_task(heard(answer))
        await anext(answer)
        return task  # ``asyncio.run`` cancels it

    asyncio.run(client())

    async def look():
        await settled(engine)
        assert_all_free(lm)

    run(look())
    engine.stop()


def test_a_loop_that_is_closed_with_a_client_asleep(tokenizer, lm):
    expected = language_model(tokenizer).chat(turn(1), max_tokens=20, ignore_eos=True)
    gate, engine = Gate(lm.engine), RunningEngine(lm)
    engine.start()
    loop = asyncio.new_event_loop()
    [answer] = loop.run_until_complete(engine.chat(turn(1), max_tokens=20, ignore_eos=True))
    sleepers = [loop.create_task(answer.message()), loop.create_task(heard(answer))]
    loop.run_until_complete(gate.steps(3))
    loop.close()
    gate.open()

    async def other():
        assert_same(await answer.message(), expected)
        [another] = await engine.chat(turn(1), max_tokens=20, ignore_eos=True)
        assert_same(await another.message(), expected)

    run(other())
    engine.stop()
    for task in sleepers:  # nobody will ever wake them: not worth a warning
        task._log_destroy_pending = False


# Beside calls that wait


def test_calls_are_refused_while_it_runs(lm):
    engine = RunningEngine(lm)
    engine.start()
    stream = lm.stream(turn(1))
    for call in (lambda: lm.chat(turn(1)), lambda: lm.generate(["路"]), lambda: next(stream)):
        with pytest.raises(EngineError, match="a RunningEngine drives this model's engine"):
            call()
    with pytest.raises(EngineError, match="was started already"):
        engine.start()
    with pytest.raises(EngineError, match="a RunningEngine drives"):
        RunningEngine(lm).start()
    assert lm.logits([1, 2]).shape[0] == 2
    engine.stop()
    stream = lm.stream(turn(1), **LONG)
    next(stream)
    with pytest.raises(EngineError, match="answers of this model are under way"):
        engine.start()
    stream.close()
    engine.start()
    engine.stop()
    with pytest.raises(EngineError, match="on_event has not returned"):
        lm.chat(turn(1), on_event=lambda event: lm.generate(["路"]))
    assert_all_free(lm)


def test_stream_in_the_callers_thread(tokenizer, lm):
    options = dict(max_tokens=25, temperature=1.0, seed=3, thinking=True, thinking_budget=8)
    pieces = []
    expected = language_model(tokenizer).chat(turn(2), on_event=pieces.append, **options)
    told = []

    def whole():
        told.append((yield from lm.stream(turn(2), **options)))

    other = lm.stream(turn(1), **LONG)
    next(other)  # goes on beside the first
    assert list(whole()) == pieces
    assert_same(told[0], expected)
    assert len(list(other)) > 4
    closed = lm.stream(turn(1), **LONG)
    next(closed)
    closed.close()
    lm.stream(turn(1))  # never begun: nothing is under way
    assert_all_free(lm)
    with pytest.raises(DataError, match="at least one message"):
        lm.stream([])


def test_a_program_that_forgets_to_stop_ends_all_the_same():
    program = """
import asyncio
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.running import RunningEngine
from tests.model.shapes import tiny_model
engine = RunningEngine(LanguageModel(tiny_model(), None))
engine.start()
answer = asyncio.run(engine.complete([1], max_tokens=100, ignore_eos=True))
print("asked")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")
