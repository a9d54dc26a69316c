"""Replies of a server: asked over a real socket, put together again, tried again, refused."""

import socket
import threading
from pathlib import Path

import pytest

from qiusuo.evaluation.answers import EvaluationError, ModelAnswerer
from qiusuo.evaluation.asking import Asker
from qiusuo.evaluation.server_answers import ServerAnswerer
from qiusuo.tasks.chains import Chains
from qiusuo.tasks.task import problems
from tests.evaluation.models import tiny_lm
from tests.evaluation.stand_in_server import StandIn, completion, failure
from tests.server.api.processes import ServerProcess

PROBLEMS = list(problems(Chains(), "test", 0, [2, 3], 4))
SAMPLING = dict(samples=3, temperature=0.7, max_tokens=40, seed=1)


def answerer(server: StandIn, **how: object) -> ServerAnswerer:
    return ServerAnswerer(server.url, first_pause=0.0, **how)


def test_every_sample_is_a_request_with_a_seed_of_its_own():
    heard: list[int] = []
    with StandIn(lambda body, _: completion(f"seed {body['seed']}")) as server:
        asked = answerer(server, key="sk-1", system="Be brief.")
        replies = asked.answers(PROBLEMS, progress=heard.append, **SAMPLING)
        again = asked.answers(PROBLEMS, **SAMPLING)
    assert [len(row) for row in replies] == [3, 3, 3, 3]
    assert len({one.response for row in replies for one in row}) == 12
    assert again == replies
    assert sum(heard) == 12
    body = next(one for one in server.asked if PROBLEMS[0].question in str(one["messages"]))
    assert body.pop("seed") >= 0
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": PROBLEMS[0].question},
        ],
        "temperature": 0.7,
        "max_tokens": 40,
    }
    assert set(server.keys) == {"Bearer sk-1"}
    assert server.most_at_once <= 8


def test_several_are_asked_at_once():
    together = threading.Barrier(3, timeout=30)

    def answer(body: dict, number: int):
        together.wait()
        return completion("1")

    with StandIn(answer) as server:
        answerer(server, at_once=3).answers(PROBLEMS[:1], **SAMPLING)
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("told", "response"),
    [
        (completion("321"), "<think></think>321"),
        (completion("321", reasoning_content="07+35"), "<think>07+35</think>321"),
        (completion("321", reasoning="07+35"), "<think>07+35</think>321"),
        (completion("07+35</think>321"), "07+35</think>321"),
        (completion(None, reasoning_content="07", finish="length"), "<think>07</think>"),
    ],
)
def test_thought_and_answer_are_put_together(told, response):
    with StandIn(lambda *_: told) as server:
        [[reply], *_] = answerer(server).answers(
            PROBLEMS[:1], samples=1, temperature=0.0, max_tokens=9, seed=0
        )
    assert reply.response == response
    assert (reply.tokens, reply.finish) == (7, told[2]["choices"][0]["finish_reason"])


def test_thinking_and_the_bare_prompt_are_asked_for_on_request_only():
    with StandIn(lambda *_: completion("1")) as server:
        for thinking in (True, False, None):
            asked = answerer(server, thinking=thinking, ask="prompt")
            asked.answers(PROBLEMS[:1], samples=1, temperature=0.0, max_tokens=9, seed=0)
    kinds = [body.get("thinking", {}).get("type") for body in server.asked]
    assert kinds == ["enabled", "disabled", None]
    assert server.asked[0]["messages"] == [{"role": "user", "content": PROBLEMS[0].prompt}]


def test_what_may_pass_is_tried_again():
    def answer(body: dict, number: int):
        troubles = [failure(429, "later", retry_after="0"), failure(503, "busy")]
        return troubles[number] if number < 2 else completion("1")

    with StandIn(answer) as server:
        [[reply]] = answerer(server).answers(
            PROBLEMS[:1], samples=1, temperature=0.0, max_tokens=9, seed=0
        )
    assert reply.response == "<think></think>1"
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("told", "times", "said"),
    [
        (failure(401, "who are you"), 1, "401: who are you; give its key with --key"),
        (failure(400, "no temperature 0.7"), 1, "400: no temperature 0.7"),
        (failure(500, "broken"), 2, "500: broken"),
        ((200, {}, b"<html>"), 1, "gave no JSON but '<html>': is it the API's address"),
        ((200, {}, {"choices": []}), 1, "gave no chat completion"),
        ((200, {}, ["odd"]), 1, "gave no chat completion"),
    ],
)
def test_what_will_not_pass_is_told(told, times, said):
    with StandIn(lambda *_: told) as server:
        asked = answerer(server, tries=2, at_once=1)
        with pytest.raises(EvaluationError, match=said):
            asked.answers(PROBLEMS[:1], samples=1, temperature=0.0, max_tokens=9, seed=0)
    assert len(server.asked) == times


def test_after_a_refusal_nobody_waits_for_the_others():
    """One request is refused while another is in the middle of a long pause."""
    pausing = threading.Event()

    def answer(body: dict, number: int):
        if number == 0:
            pausing.set()
            return failure(503, "busy", retry_after="50")
        assert pausing.wait(30)
        return failure(400, "never")

    with StandIn(answer) as server:
        asked = answerer(server, at_once=2)
        with pytest.raises(EvaluationError, match="never"):
            asked.answers(PROBLEMS, **SAMPLING)
        for thread in threading.enumerate():
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join(30)
                assert not thread.is_alive()
    assert len(server.asked) < 12


def test_which_model_is_asked():
    with StandIn(lambda *_: completion("1"), models=("a", "b")) as server:
        assert answerer(server, model="b").model == "b"
        with pytest.raises(EvaluationError, match="has the models a, b: say which"):
            answerer(server)
    with StandIn(lambda *_: completion("1")) as server:
        assert answerer(server).model == "m"
        assert answerer(server).describe()["model"] == "m"
        with pytest.raises(EvaluationError, match="404: no /other/models"):
            ServerAnswerer(server.url + "/other", tries=1)


def test_no_server_and_no_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EvaluationError, match=r"failed: ConnectError.*is it running there\?"):
            ServerAnswerer(url, tries=2, first_pause=0.0)
    with pytest.raises(EvaluationError, match="is no address such as"):
        ServerAnswerer("localhost:8000")


@pytest.mark.long
def test_our_own_server_answers_as_the_model_here(tmp_path: Path):
    lm = tiny_lm()
    lm.save(tmp_path / "model")
    greedy = dict(samples=1, temperature=0.0, max_tokens=24, seed=0)
    asker = Asker(lm.tokenizer, thinking=False)
    with ServerProcess(tmp_path / "model", tmp_path / "db") as server:
        there = ServerAnswerer(server.address, ask="prompt", thinking=False)
        assert there.model == "talker"
        told = there.answers(PROBLEMS, **greedy)
    for [one], [here] in zip(
        told, ModelAnswerer(lm, asker).answers(PROBLEMS, **greedy), strict=True
    ):
        assert (one.tokens, one.finish) == (here.tokens, here.finish)
        text = here.response.removeprefix("</think>").strip()
        assert one.response.removeprefix("<think></think>").strip() == text
