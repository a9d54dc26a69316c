"""POST /completions: going on, scoring, filling in."""

import asyncio
import json

import pytest
import tokenizers

import qiusuo
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.server.api.chat_chunks import Chunk
from qiusuo.server.house import House
from tests.model.shapes import tiny_model
from tests.server.api.conftest import Place, streamed, told
from tests.server.api.talkers import MIDDLE, TEXT, talker, tokenizer

START, LATER = "Once upon a time", "Once upon a time there was"  # no word is cut
REST = TEXT.removeprefix(START)


def texts(body: dict) -> list[str]:
    return [choice["text"] for choice in body["choices"]]


def test_a_text_goes_on(place: Place) -> None:
    body = told(place.complete(START, max_tokens=200))
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"text": REST, "index": 0, "logprobs": None, "finish_reason": "stop"}
    ]
    usage = body["usage"]
    assert usage["prompt_tokens"] == 1 + len(tokenizer().encode(START))  # and its beginning
    assert (
        usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
        == (usage["prompt_tokens"])
    )


def test_without_a_limit_it_is_sixteen_tokens(place: Place) -> None:
    body = told(place.complete(START))
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


def test_token_ids_and_lists_of_prompts(place: Place) -> None:
    ids = [*tokenizer().text_start, *tokenizer().encode(START)]
    assert texts(told(place.complete(ids, max_tokens=200))) == [REST]
    assert texts(told(place.complete([ids, ids[:-1]], max_tokens=200)))[0] == REST
    body = told(place.complete([START, LATER], max_tokens=200))
    assert texts(body) == [REST, TEXT.removeprefix(LATER)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    expected = 2 + sum(len(tokenizer().encode(one)) for one in (START, LATER))
    assert body["usage"]["prompt_tokens"] == expected


def test_streams_of_several_prompts(place: Place) -> None:
    options = dict(max_tokens=200, stream=True, echo=True, n=2)
    chunks = streamed(place.complete([START, LATER], **options))
    whole = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole[choice["index"]] += choice["text"]
    assert whole == [TEXT] * 4
    assert [chunk for chunk in chunks if "usage" in chunk] == [chunks[-1]]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_the_best_of_several(place: Place) -> None:
    options = dict(max_tokens=12, temperature=1.5, seed=5, logprobs=0)
    every = told(place.complete(START, n=6, **options))["choices"]
    best = told(place.complete(START, n=2, best_of=6, **options))["choices"]

    def mean(choice: Chunk) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best] == [choice["text"] for choice in expected]
    assert place.complete(START, n=2, best_of=1).status_code == 400
    assert place.complete(START, best_of=2, stream=True).status_code == 400


# -- log-probabilities ----------------------------------------------------------------------


def test_logprobs_stand_at_their_place_in_the_text(place: Place) -> None:
    body = told(place.complete(START, max_tokens=200, logprobs=2))
    [choice] = body["choices"]
    told_of = choice["logprobs"]
    assert len({len(one) for one in told_of.values()}) == 1
    assert told_of["text_offset"][-1] == len(REST)  # the end token's
    whole = [token for token in told_of["tokens"][:-1] if "\\x" not in token]  # characters
    assert len(whole) > 5
    for token, offset in zip(told_of["tokens"][:-1], told_of["text_offset"], strict=False):
        assert token not in whole or REST[offset:].startswith(token)
    for logprob, top in zip(told_of["token_logprobs"], told_of["top_logprobs"], strict=True):
        assert logprob == max(top.values())
        assert len(top) == 2
    chunks = streamed(place.complete(START, max_tokens=200, logprobs=2, stream=True))
    parts = [one["choices"][0]["logprobs"] for one in chunks if one["choices"][0]["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == told_of["tokens"]
    assert [at for part in parts for at in part["text_offset"]] == told_of["text_offset"]


def score(body: dict, contexts: list[int]) -> list[tuple[float, bool]]:
    """As lm-eval's `local-completions` reads an answer (parse_logprobs of its API model)."""
    results = []
    choices = sorted(body["choices"], key=lambda choice: choice["index"])
    for choice, context in zip(choices, contexts, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][context:-1]
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        greedy = all(one == max(top.values()) for one, top in zip(logprobs, tops, strict=True))
        results.append((sum(logprobs), greedy))
    return results


@pytest.mark.parametrize("as_ids", [True, False])
def test_texts_are_scored_as_lm_eval_does(place: Place, as_ids: bool) -> None:
    """Against the model's own logits."""
    start, tokens = tokenizer().text_start, tokenizer()
    cases = [(START, REST), (START, " was long.")]
    prompts, contexts = [], []
    for context, rest in cases:
        before, after = tokens.encode(context), tokens.encode(rest)
        prompts.append([*start, *before, *after] if as_ids else context + rest)
        contexts.append(len(before) + (len(start) if as_ids else 0))
        if not as_ids:
            assert tokens.encode(context + rest) == before + after
    body = told(place.complete(prompts, max_tokens=1, logprobs=1, echo=True, seed=1234))
    for (context, rest), (total, greedy) in zip(cases, score(body, contexts), strict=True):
        before, after = tokens.encode(context), tokens.encode(rest)
        ids = [*start, *before, *after]
        logits = talker().logits(ids).log_softmax(-1)[len(start) + len(before) - 1 : -1]
        expected = logits.gather(1, logits.new_tensor(after).long()[:, None]).sum()
        assert total == pytest.approx(float(expected), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == after)
    assert score(body, contexts)[0][1]


def test_an_echo_alone(place: Place) -> None:
    ids = tokenizer().encode(START)
    body = told(place.complete(ids, max_tokens=0, echo=True, logprobs=1))
    [choice] = body["choices"]
    assert choice["text"] == START
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert told(place.complete(START, echo=True, max_tokens=200))["choices"][0]["text"] == TEXT
    assert place.complete(START, max_tokens=0).status_code == 400
    both = dict(stream=True, echo=True, logprobs=1)
    assert place.complete(START, **both).status_code == 400


# -- the middle -----------------------------------------------------------------------------


def test_the_middle_is_filled_in(place: Place) -> None:
    before, after, middle = MIDDLE
    assert texts(told(place.complete(before, suffix=after))) == [middle]
    assert texts(told(place.complete(before, suffix=after, echo=True))) == [before + middle]
    forged = place.complete("<｜fim▁hole｜>", suffix=after, max_tokens=4)
    assert told(forged)["usage"]["prompt_tokens"] > 4 + len(tokenizer().encode(after))


def test_a_vocabulary_without_markers_says_so(settings) -> None:
    description = json.loads(tokenizer().backend.to_str())
    description["added_tokens"] = [
        one for one in description["added_tokens"] if "fim" not in one["content"]
    ]
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    plain = Tokenizer(backend, bos_token=None, eos_token=None)
    house = House.open(settings)
    model = tiny_model(vocab_size=plain.vocab_size, eos_token_id=None)
    house.registry.adopt("talker", qiusuo.LanguageModel(model, plain))
    place = Place(house)
    response = place.complete("a", suffix="b")
    assert response.status_code == 400
    assert "no tokens for filling in the middle" in response.json()["error"]["message"]
    asyncio.run(house.close())


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        dict(prompt=[]),
        dict(prompt=[[]]),
        dict(prompt=[99999]),
        dict(prompt=[-1]),
        dict(logprobs=21),
        dict(max_tokens=65_537),
        dict(prompt=["a"] * 200),
        dict(prompt=[1, 2], suffix="x"),
        dict(model="nobody"),
        dict(n=17),
        dict(suffix="x", echo=True, logprobs=1),
    ],
    ids=str,
)
def test_bad_requests(place: Place, more: dict) -> None:
    response = place.complete(**({"prompt": "a"} | more))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_request_error"


def test_a_wrong_type_is_422(place: Place) -> None:
    for prompt in (3, None, {"a": 1}, [1, "a"], [1.5]):
        response = place.complete(prompt)
        assert response.status_code == 422, response.text
        assert response.json()["error"]["message"].startswith("Failed to deserialize the JSON")


def test_one_refused_prompt_ends_the_others(place: Place) -> None:
    response = place.complete(["a", "b" * 5000])
    assert response.status_code == 400
    assert place.house.desk.jobs == {}
