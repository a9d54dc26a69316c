"""The public face: load, read, write, talk, save."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import qiusuo
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.asking import Message
from qiusuo.engine.constraint import Constraint
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import RequestError
from tests.model.shapes import tiny_model

TEXT = "路漫漫其修远兮，吾将上下而求索。"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_characters([TEXT])


@pytest.fixture
def folder(tmp_path, tokenizer):
    eos = tokenizer.eos_id
    model = tiny_model(eos_token_id=eos, vocab_size=tokenizer.vocab_size)
    return save_huggingface(model, tmp_path / "m", tokenizer=tokenizer)


def test_load_and_read(folder, tokenizer):
    lm = qiusuo.load(folder)
    assert isinstance(lm, qiusuo.LanguageModel)
    assert not lm.model.training
    ids = tokenizer.encode(TEXT)
    logits = lm.logits(ids)
    assert logits.shape == (len(ids), tokenizer.vocab_size)
    assert logits.dtype == torch.float32
    model = tiny_model(eos_token_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids])).x_BTD)[0]
    assert torch.equal(logits, expected)


def test_texts_begin_with_the_beginning_and_come_back_as_text(folder, tokenizer):
    lm = qiusuo.load(str(folder))
    ids = [tokenizer.bos_id, *tokenizer.encode("求索")]
    by_text, by_ids = lm.generate(["求索"], max_tokens=9), lm.generate([ids], max_tokens=9)
    assert by_text == by_ids
    assert isinstance(by_text[0], qiusuo.Completion)
    assert len(by_text[0].token_ids) == 9
    assert by_text[0].text == tokenizer.decode(by_text[0].token_ids)
    assert by_text[0].text


def test_end_token_is_in_the_ids_and_not_in_the_text(folder, tokenizer, tmp_path):
    free = qiusuo.load(folder).generate(["路"], max_tokens=6)[0].token_ids
    end = free[4]
    model = tiny_model(eos_token_id=(end,), vocab_size=tokenizer.vocab_size)
    save_huggingface(model, tmp_path / "stops", tokenizer=tokenizer)
    (answer,) = qiusuo.load(tmp_path / "stops").generate(["路"], max_tokens=6)
    assert answer.token_ids == free[: free.index(end) + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == tokenizer.decode(answer.token_ids[:-1])


@pytest.mark.parametrize(
    ("eos", "stops"), [(None, set()), (5, {5}), ((5, 7), {5, 7}), (0, {0})], ids=str
)
def test_stop_ids(eos, stops):
    assert qiusuo.LanguageModel(tiny_model(eos_token_id=eos), None).stop_ids == stops


def test_settings_reach_the_sampler(folder):
    lm = qiusuo.load(folder)

    def ids(**settings: object) -> list[int]:
        return lm.generate(["漫"], max_tokens=8, **settings)[0].token_ids

    greedy = ids()
    assert ids(temperature=50.0, top_k=1) == greedy
    assert ids(temperature=50.0, top_p=1e-9) == greedy
    assert ids(temperature=50.0, seed=0) != greedy
    assert ids(temperature=50.0, seed=1) != ids(temperature=50.0, seed=2)


def test_ids_that_the_tokenizer_does_not_know_have_no_text(tokenizer, tmp_path):
    """A padded vocabulary: what was generated is kept."""
    padded = tokenizer.vocab_size + 60
    model = tiny_model(vocab_size=padded, eos_token_id=None)
    lm = qiusuo.LanguageModel(model, tokenizer)
    (answer,) = lm.generate(["求"], max_tokens=40, temperature=5.0, seed=0, ignore_eos=True)
    eos, size = tokenizer.eos_id, tokenizer.vocab_size
    known = [token for token in answer.token_ids if token < size and token != eos]
    assert 0 < len(known) < 40
    assert answer.text == tokenizer.decode(known)


def test_run_folder_gives_its_model(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    (folder).rename(tmp_path / "run" / "model")
    lm = qiusuo.load(tmp_path / "run")
    assert lm.tokenizer is not None
    assert len(lm.generate(["求"], max_tokens=2)[0].token_ids) == 2


def test_save_and_load_again(folder, tmp_path):
    lm = qiusuo.load(folder)
    assert lm.save(tmp_path / "copy") == tmp_path / "copy"
    again = qiusuo.load(tmp_path / "copy")
    assert again.generate([TEXT], max_tokens=5) == lm.generate([TEXT], max_tokens=5)
    lm.save(tmp_path / "half", dtype="bfloat16")
    half = qiusuo.load(tmp_path / "half")
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert half.logits([1, 2]).dtype == torch.float32
    with pytest.raises(CheckpointError, match="format 'onnx' is not written; expected hf or gguf"):
        lm.save(tmp_path / "other", format="onnx")
    with pytest.raises(CheckpointError, match="dtype 'float64' is not written as hf"):
        lm.save(tmp_path / "other", dtype=torch.float64)
    assert not (tmp_path / "other").exists()


def test_types_on_loading(folder):
    for dtype in ("bfloat16", torch.bfloat16):
        lm = qiusuo.load(folder, dtype=dtype)
        assert lm.model.lm_head.weight.dtype == torch.bfloat16
        assert len(lm.generate(["求索", "路"], max_tokens=4)[1].token_ids) == 4
    assert qiusuo.load(folder).model.lm_head.weight.dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"dtype 'int3' is not one of float32"):
        qiusuo.load(folder, dtype="int3")
    with pytest.raises(CheckpointError, match="device 'warp' cannot be used"):
        qiusuo.load(folder, device="warp")


def test_without_a_tokenizer_ids_only(tmp_path):
    save_huggingface(tiny_model(), tmp_path / "m")
    lm = qiusuo.load(tmp_path / "m")
    assert lm.tokenizer is None
    (answer,) = lm.generate([[1, 2]], max_tokens=3)
    assert (len(answer.token_ids), answer.text) == (3, "")
    with pytest.raises(ValueError, match="without a tokenizer"):
        lm.generate(["求索"])


def test_model_whose_replacement_was_interrupted_is_found(folder, tmp_path):
    folder.rename(tmp_path / ".m.aside")
    assert qiusuo.load(tmp_path / "m").tokenizer is not None
    (tmp_path / "run").mkdir()
    (tmp_path / "m").rename(tmp_path / "run" / ".model.aside")
    assert qiusuo.load(tmp_path / "run").tokenizer is not None


def test_wrong_tokens_are_named():
    lm = qiusuo.LanguageModel(tiny_model(max_position_embeddings=4), None)
    assert lm.logits([1, 2, 3, 4]).shape == (4, 97)
    with pytest.raises(ValueError, match="token_ids is empty"):
        lm.logits([])
    with pytest.raises(ValueError, match="token_ids has 5 tokens; the context holds 4"):
        lm.logits([1] * 5)
    with pytest.raises(ValueError, match=r"token id 97 is outside 0\.\.96"):
        lm.logits([97])


def test_one_text_is_not_a_list_of_texts(folder):
    with pytest.raises(TypeError, match=r"write generate\(\[text\]\)"):
        qiusuo.load(folder).generate("求索")


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = qiusuo.nothing


def test_import_is_light():
    program = "import qiusuo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# Talking

TURNS = [{"role": "system", "content": "路"}, {"role": "user", "content": "求索？"}]


def pick(lm, wanted, **settings):
    """The first seed whose answer is as wanted: (message, pieces, seed)."""
    for seed in range(200):
        pieces: list[Event] = []
        message = lm.chat(
            TURNS,
            temperature=1.0,
            max_tokens=24,
            seed=seed,
            on_event=pieces.append,
            **settings,
        )
        if wanted(message):
            return message, pieces, seed
    raise AssertionError("no seed gives such an answer")


@pytest.fixture(scope="module")
def chatty(tokenizer):
    """A random model of a small vocabulary, so that it soon draws any token."""
    model = tiny_model(
        eos_token_id=None, vocab_size=tokenizer.vocab_size + 3, max_position_embeddings=64
    )
    return qiusuo.LanguageModel(model, tokenizer)


def joined(pieces, kind):
    return "".join(event.text for event in pieces if event.kind is kind)


def text_of(lm, ids):
    return lm.tokenizer.decode([token for token in ids if token < lm.tokenizer.vocab_size])


def test_chat_answers_through_the_template(chatty, tokenizer):
    message = chatty.chat(TURNS, max_tokens=9)
    assert isinstance(message, Message)
    prompt = tokenizer.apply_chat_template(TURNS)
    (expected,) = chatty.generate([prompt], max_tokens=9)
    assert message.role == "assistant"
    assert message.token_ids == expected.token_ids
    assert message.finish_reason == expected.finish_reason
    assert message.content == expected.text.lstrip()


def test_chat_is_heard_as_it_comes(chatty, tokenizer):
    message, pieces, _ = pick(chatty, lambda message: len(message.content) > 12)
    assert joined(pieces, Kind.CONTENT) == message.content
    assert len(pieces) > 4
    known = [token for token in message.token_ids if token < tokenizer.vocab_size]
    assert tokenizer.decode(known).lstrip() == message.content


def test_chat_stops_at_the_end_of_any_kind(tokenizer, chatty):
    """The tokenizer's own end, and all of the config's."""
    message, _, seed = pick(
        chatty, lambda message: message.finish_reason == "stop" and message.content
    )
    assert message.token_ids[-1] == tokenizer.eos_id
    assert tokenizer.eos_token not in message.content
    for end in message.token_ids[:2]:
        ends = (end, message.token_ids[-2])
        model = tiny_model(
            eos_token_id=ends, vocab_size=chatty.config.vocab_size, max_position_embeddings=64
        )
        lm = qiusuo.LanguageModel(model, tokenizer)
        assert lm.stop_ids == {*ends, tokenizer.eos_id}
        found = lm.chat(TURNS, temperature=1.0, max_tokens=24, seed=seed)
        assert found.token_ids == message.token_ids[: message.token_ids.index(end) + 1]
        assert found.finish_reason == "stop"


def test_thinking_opens_a_thought(chatty, tokenizer):
    asked = tokenizer.apply_chat_template(TURNS, thinking=True)
    assert tokenizer.opens_thought(asked)
    end = tokenizer.token_id("</think>")

    def closes_inside(message):
        ids = message.token_ids
        return end in ids and message.reasoning_content and message.content

    message, pieces, _ = pick(chatty, closes_inside, thinking=True)
    place = message.token_ids.index(end)
    assert message.reasoning_content == text_of(chatty, message.token_ids[:place]).strip()
    assert message.content == text_of(chatty, message.token_ids[place + 1 :]).lstrip()
    assert joined(pieces, Kind.THOUGHT) == message.reasoning_content
    assert joined(pieces, Kind.CONTENT) == message.content
    unclosed, _, _ = pick(
        chatty,
        lambda message: end not in message.token_ids and len(message.token_ids) > 5,
        thinking=True,
    )
    assert unclosed.reasoning_content
    assert unclosed.content == ""
    plain, _, _ = pick(chatty, lambda message: bool(message.content))
    assert plain.reasoning_content is None


def test_a_conversation_that_is_too_long_is_refused(chatty):
    """Before any of it is computed, and in words that are no index into a batch."""
    with pytest.raises(DataError, match=r"the conversation has \d+ tokens .* context holds 64"):
        chatty.chat([{"role": "user", "content": "路" * 64}])
    room = 64 - len(chatty.tokenizer.apply_chat_template([{"role": "user", "content": ""}]))
    with pytest.raises(DataError, match="the conversation has 64 tokens"):
        chatty.chat([{"role": "user", "content": "路" * room}])
    last = chatty.chat([{"role": "user", "content": "路" * (room - 1)}])
    assert (len(last.token_ids), last.finish_reason) == (1, "length")


def test_chat_needs_a_tokenizer_a_template_and_messages(chatty, tokenizer):
    with pytest.raises(ValueError, match="without a tokenizer"):
        qiusuo.LanguageModel(tiny_model(), None).chat(TURNS)
    base = Tokenizer(tokenizer.backend, bos_token=tokenizer.bos_token)
    with pytest.raises(DataError, match="no chat template"):
        qiusuo.LanguageModel(chatty.model, base).chat(TURNS)
    with pytest.raises(DataError, match="at least one message"):
        chatty.chat([])
    with pytest.raises(DataError, match="unknown role 'usr': did you mean 'user'"):
        chatty.chat([{"role": "usr", "content": "路"}])


@pytest.mark.parametrize("begins", [True, False])
def test_texts_begin_as_the_tokenizer_says(chatty, tokenizer, begins):
    own = Tokenizer(tokenizer.backend, bos_token=tokenizer.bos_token, add_bos_token=begins)
    lm = qiusuo.LanguageModel(chatty.model, own)
    ids = [*([tokenizer.bos_id] if begins else []), *tokenizer.encode("求")]
    assert lm.generate(["求"], max_tokens=5) == lm.generate([ids], max_tokens=5)


# What may be asked for


def test_many_answers_side_by_side(chatty):
    settings = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    alone = chatty.generate(["求"], n=3, **settings)
    both = chatty.generate(["求", "索"], n=3, **settings)
    assert [one.token_ids for one in both[:3]] == [one.token_ids for one in alone]
    assert len(both) == 6
    assert len({tuple(one.token_ids) for one in both}) == 6


def test_the_best_of_some(chatty):
    settings = {"max_tokens": 6, "temperature": 1.5, "seed": 3, "ignore_eos": True}
    every = chatty.generate(["求", "索"], n=5, **settings)
    best = chatty.generate(["求", "索"], n=2, best_of=5, **settings)

    def mean(one) -> float:
        return sum(one.logprobs) / len(one.logprobs)

    for row in range(2):
        ranked = sorted(every[5 * row : 5 * row + 5], key=mean, reverse=True)
        assert best[2 * row : 2 * row + 2] == ranked[:2]
    with pytest.raises(RequestError, match="best_of 2 is less than n 3"):
        chatty.generate(["求"], n=3, best_of=2)


def test_the_best_of_some_is_never_one_that_failed():
    model = tiny_model()
    lm = qiusuo.LanguageModel(model, None)
    settings = {"max_tokens": 5, "temperature": 2.0, "seed": 1, "ignore_eos": True}
    every = lm.generate([[1, 2, 3]], n=4, **settings)
    likeliest = max(every, key=lambda one: one.logprobs[0]).token_ids[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[likeliest] = float("nan")
    told = lm.generate([[1, 2, 3]], n=4, best_of=4, **settings)
    reasons = [one.finish_reason for one in told]
    assert reasons == sorted(reasons, reverse=True)  # "length" before "error"
    assert set(reasons) == {"length", "error"}
    failed, whole = told[-1], told[0]
    assert failed.logprobs[0] > sum(whole.logprobs) / len(whole.logprobs)


def test_alternatives_are_told(chatty):
    prompt = [1, 5, 9, 3]
    (answer,) = chatty.generate(
        [prompt], max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    logprobs = chatty.logits([*prompt, *answer.token_ids]).log_softmax(-1)
    told = [*answer.prompt_drawn, *answer.drawn]
    assert [one.token for one in told] == [*prompt, *answer.token_ids][1:]
    for row, one in enumerate(told):
        values, ids = logprobs[row].topk(len(one.top))
        assert len(one.top) == (2 if row < 3 else 3)
        assert [token for token, _ in one.top] == ids.tolist()
        assert [p for _, p in one.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert one.logprob == pytest.approx(float(logprobs[row, one.token]), abs=1e-4)
    assert answer.logprobs == [one.logprob for one in answer.drawn]
    assert answer.versions == [0] * 4


def test_experts_are_told_for_all_but_the_last_token(chatty):
    first, second = chatty.generate(
        ["求", "索求"], max_tokens=4, keep_experts=True, ignore_eos=True
    )
    for one, prompt in ((first, 2), (second, 3)):
        assert one.experts.shape == (prompt + 3, 2, 3)
    assert chatty.generate(["求"], max_tokens=4)[0].experts is None


def test_stop_strings_end_a_text_between_tokens(chatty, tokenizer):
    (free,) = chatty.generate(["求"], max_tokens=12, ignore_eos=True)
    stop = free.text[3:5]
    (answer,) = chatty.generate(["求"], max_tokens=12, ignore_eos=True, stop=[stop])
    assert answer.text == free.text[: free.text.index(stop)]
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) < 12
    message = chatty.chat(TURNS, max_tokens=12, ignore_eos=True)
    stop = message.content[2:4]
    shorter = chatty.chat(TURNS, max_tokens=12, ignore_eos=True, stop=[stop])
    assert shorter.content == message.content[: message.content.index(stop)]


def test_stop_strings_wait_for_the_least_number_of_tokens(chatty):
    (free,) = chatty.generate(["求"], max_tokens=12, ignore_eos=True)
    stops = [free.text[0], "<"]  # its first token, and what many of the later ones begin with
    ask = {"max_tokens": 12, "ignore_eos": True, "stop": stops}
    assert len(chatty.generate(["求"], **ask)[0].token_ids) == 1
    (answer,) = chatty.generate(["求"], min_tokens=6, **ask)
    assert 6 <= len(answer.token_ids) < 12
    assert answer.finish_reason == "stop"
    assert free.text.startswith(answer.text)
    assert answer.text


def test_answers_that_must_fit(chatty):
    pytest.importorskip("llguidance")
    choice = Constraint("choice", ["求索", "路漫漫"])
    for one in chatty.generate(["求", "修"], n=3, temperature=2.0, seed=0, constraint=choice):
        assert one.text in choice.value
        assert one.finish_reason == "stop"
    message = chatty.chat(TURNS, constraint=Constraint("regex", "[求索]{3}"))
    assert len(message.content) == 3
    assert set(message.content) <= set("求索")


def test_a_constraint_waits_for_the_end_of_the_thought(chatty):
    pytest.importorskip("llguidance")
    choice = Constraint("choice", ["求索"])
    message = chatty.chat(
        TURNS, thinking=True, thinking_budget=6, constraint=choice, temperature=1.0, seed=1,
        max_tokens=40, ignore_eos=True,
    )  # fmt: skip
    assert message.content == "求索"
    assert message.reasoning_content


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_ends_with_its_budget(chatty, tokenizer, budget):
    end = tokenizer.token_id("</think>")
    message = chatty.chat(
        TURNS, thinking=True, thinking_budget=budget, max_tokens=20, ignore_eos=True,
        logit_bias={end: -100},
    )  # fmt: skip
    assert message.token_ids.index(end) == budget
    assert message.usage.reasoning_tokens == budget + 1
    assert (
        message.content
        == text_of(
            chatty,
            [token for token in message.token_ids[budget + 1 :] if token != tokenizer.eos_id],
        ).lstrip()
    )


def test_usage_is_told_and_turns_are_found_again(tokenizer):
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=None)
    lm = qiusuo.LanguageModel(model, tokenizer, Limits(page_tokens=2))
    first = lm.chat(TURNS, max_tokens=5, ignore_eos=True)
    prompt = len(tokenizer.apply_chat_template(TURNS))
    usage = first.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 5)
    assert (usage.reasoning_tokens, usage.cached_tokens) == (0, 0)
    again = lm.chat(TURNS, max_tokens=5, ignore_eos=True)
    assert again.usage.cached_tokens == (prompt - 1) // 2 * 2
    assert again.token_ids == first.token_ids


CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n"
    '```json\n{"of": "road"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def test_tool_calls_are_told_as_the_api_writes_them():
    """The model is made to say a call, token by token."""
    tokenizer = Tokenizer.train_bpe([CALL * 3 + TEXT], 400)
    size = tokenizer.vocab_size
    model = tiny_model(vocab_size=size, eos_token_id=None, max_position_embeddings=512)
    lm = qiusuo.LanguageModel(model, tokenizer)
    said = [*tokenizer.encode("now " + CALL, allow_special=True), tokenizer.eos_id]
    submit = lm.engine.submit

    def scripted(request):
        sequences = submit(request)
        sequences[0].forced = list(said)
        return sequences

    lm.engine.submit = scripted
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    events: list[Event] = []
    message = lm.chat(TURNS, tools=tools, max_tokens=len(said), on_event=events.append)
    assert message.content.strip() == "now"
    [call] = message.tool_calls
    assert call["type"] == "function"
    assert call["function"]["name"] == "find"
    assert json.loads(call["function"]["arguments"]) == {"of": "road"}
    assert call["id"].startswith("call_")
    assert message.finish_reason == "tool_calls"
    kinds = [Kind.CONTENT, Kind.CALL_BEGIN, Kind.ARGUMENTS, Kind.CALL_END]
    assert list(dict.fromkeys(event.kind for event in events)) == kinds
    without = lm.chat(TURNS, max_tokens=len(said))
    assert without.tool_calls == []
    assert "find" in without.content


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"n": 0}, "n must be at least 1"),
        ({"constraint": Constraint("regex", "[")}, "regex"),
        ({"constraint": Constraint("choice", ["漢字"])}, "no answer in this vocabulary fits"),
    ],
    ids=str,
)
def test_what_cannot_be_leaves_nothing_behind(chatty, settings, words):
    if "constraint" in settings:
        pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=words):
        chatty.generate(["求", "索"], **settings)
    assert chatty.engine.idle
    if "n" not in settings:
        with pytest.raises(ValueError, match=words):
            chatty.chat(TURNS, **settings)
    assert chatty.engine.idle


@pytest.mark.parametrize("settings", [{"stop": ["x"]}, {"constraint": Constraint("regex", "a")}])
def test_what_is_about_text_needs_a_tokenizer(settings):
    with pytest.raises(ValueError, match="without a tokenizer"):
        qiusuo.LanguageModel(tiny_model(), None).generate([[1, 2]], **settings)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_listener_that_raises_ends_the_answer_and_the_next_goes_on(chatty, error):
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        if len(heard) == 3:
            raise error

    expected = chatty.chat(TURNS, max_tokens=9, ignore_eos=True)
    with pytest.raises(error):
        chatty.chat(TURNS, max_tokens=9, ignore_eos=True, on_event=hear)
    assert len(heard) == 3
    assert chatty.engine.idle
    again = chatty.chat(TURNS, max_tokens=9, ignore_eos=True)
    assert again.token_ids == expected.token_ids


# Where a model may be


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own, and a current folder where nothing lies about."""
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """What llama.cpp has a form for: a byte-level vocabulary and a dense model."""
    tokenizer = Tokenizer.train_bpe([TEXT], 300)
    eos, size = tokenizer.eos_id, tokenizer.vocab_size
    model = tiny_model(
        model_type="qwen2", hidden_size=96, intermediate_size=64, num_attention_heads=3,
        num_key_value_heads=1, eos_token_id=eos, vocab_size=size,
    )  # fmt: skip
    return save_huggingface(model, tmp_path_factory.mktemp("dense") / "m", tokenizer=tokenizer)


def test_load_a_gguf_file(dense_folder, tmp_path):
    lm = qiusuo.load(dense_folder)
    file = lm.save(tmp_path / "model.gguf", format="gguf", dtype="float32")
    for place in (file, str(file), tmp_path):  # a folder with one such file is that file
        again = qiusuo.load(place)
        assert again.logits([1, 2, 3]).sub(lm.logits([1, 2, 3])).abs().max() < 1e-4
        assert again.stop_ids == lm.stop_ids
        assert again.chat(TURNS, max_tokens=4).token_ids == lm.chat(TURNS, max_tokens=4).token_ids
    with pytest.raises(CheckpointError, match=r"gguf is written to a file NAME\.gguf"):
        lm.save(tmp_path / "model", format="gguf")
    with pytest.raises(CheckpointError, match="the format hf is written to a folder"):
        lm.save(tmp_path / "folder.gguf", format="hf")


@pytest.mark.parametrize(
    ("name", "folder_name"),
    [("smollm2", "smollm2"), ("owner/name", "owner--name"), ("owner/name@v1", "owner--name@v1")],
)
def test_load_a_pulled_name(folder, home, name, folder_name):
    shutil.copytree(folder, home / "models" / folder_name)
    assert qiusuo.load(name).logits([1, 2]).equal(qiusuo.load(folder).logits([1, 2]))


def test_a_folder_goes_before_a_pulled_name(folder, home):
    (home / "models" / "smollm2").mkdir(parents=True)
    shutil.copytree(folder, "smollm2")
    assert qiusuo.load("smollm2").tokenizer is not None


def test_files_of_a_model_name_it(folder):
    for name in ("config.json", "model.safetensors"):
        assert qiusuo.load(folder / name).logits([1]).equal(qiusuo.load(folder).logits([1]))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("none", "none is not there: expected a model folder, a run, a .gguf file or one of"),
        ("smolm2", "did you mean 'smollm2'?"),
        ("smollm2", "smollm2 is not here yet: run `qiusuo pull smollm2`"),
        ("tinyshakespeare", "tinyshakespeare is a corpus, no model: models by name are smollm2"),
        ("quickstart", "quickstart is not there"),  # a recipe: no model yet
        ("owner/name", "`qiusuo pull owner/name` fetches it from Hugging Face"),
        ("some/deeper/path", "some/deeper/path is not there"),
        ("file.txt", "file.txt is no model: give its folder, or a .gguf file"),
        ("empty", "empty holds no config.json, so it is not a model folder"),
        ("two", "two holds 2 .gguf files (a.gguf, b.gguf); name one of them"),
        ("run", "run is a run without a finished model: `qiusuo train --resume --run run`"),
        ("garbage.gguf", "garbage.gguf is not a GGUF file: it does not begin with 'GGUF'"),
        ("pickle", "which can run any code when it is read and is refused"),
    ],
)
def test_wrong_names_are_told_what_they_are(home, tmp_path, reference, message):
    here = tmp_path / "here"
    for name in ("empty", "two", "run", "pickle"):
        (here / name).mkdir()
    for name in ("file.txt", "two/b.gguf", "two/a.gguf", "garbage.gguf", "run/recipe.toml"):
        (here / name).write_text("x")
    config = tiny_model().config.to_hf()
    (here / "pickle" / "config.json").write_text(json.dumps(config))
    (here / "pickle" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError) as caught:
        qiusuo.load(reference)
    assert message in str(caught.value)


def test_a_failed_answer_leaves_its_neighbours_whole():
    model = tiny_model()
    lm = qiusuo.LanguageModel(model, None)
    good = lm.generate([[1, 2, 3]], max_tokens=5)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    bad, whole = lm.generate([[7, 50], [1, 2, 3]], max_tokens=5)
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert "NaN" in bad.error or "finite" in bad.error
    assert (whole.token_ids, whole.finish_reason, whole.error) == (good.token_ids, "length", None)
    with pytest.raises(RequestError):
        lm.generate([[7, 50]], max_tokens=5)
