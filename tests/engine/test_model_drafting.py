"""Drafts of another model: whatever it guesses, the answers are those without it."""

import pytest
import torch

import qiusuo
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.core import Engine
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.model_drafting import ModelDrafter
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from tests.engine.oracle import Steady, alone, assert_as_expected, run
from tests.model.shapes import tiny_model

GREEDY = Sampling(max_tokens=24)
WARM = Sampling(max_tokens=24, temperature=1.0, seed=5)
PROMPTS = [tuple((11 * i + j * j) % 97 for j in range(5 + 4 * i)) for i in range(4)]


def engine_of(
    model: torch.nn.Module, draft: torch.nn.Module, pages: int = 60, most: int = 4, **limits: int
) -> Engine:
    options = Limits(page_tokens=4, **limits)
    one = Engine(model, Limits(cache_bytes=1 << 20, page_tokens=4), draft_model=draft).page_bytes
    options.cache_bytes = pages * one
    engine = Engine(model, options, draft_model=draft)
    engine.drafter = ModelDrafter(draft, engine.cache.beside[0], most)
    engine.drafter.pace = Steady(most)
    return engine


def submit(engine: Engine, sampling: Sampling = GREEDY, n: int = 1) -> list[Sequence]:
    return [one for prompt in PROMPTS for one in engine.submit(Request(prompt, sampling, n=n))]


def check(model: torch.nn.Module, answers: list[Sequence]) -> None:
    for one in answers:
        assert_as_expected(one, alone(model, one.request, one.choice), exact=False)


DRAFTS = {
    "itself": tiny_model,
    "another": lambda: tiny_model(3, num_hidden_layers=1, hidden_size=24),
    "a dense one": lambda: tiny_model(4, model_type="llama", num_hidden_layers=2),
}


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTS)
def test_answers_are_those_without_drafts(name, sampling):
    model = tiny_model()
    engine = engine_of(model, DRAFTS[name]())
    answers = submit(engine, sampling)
    run(engine)
    check(model, answers)
    statistics = engine.statistics
    assert statistics.drafted > 20
    if name != "itself":
        assert statistics.acceptance < 0.5
    elif sampling is GREEDY:
        assert statistics.acceptance == 1.0


def test_the_model_itself_is_always_right_and_saves_passes():
    """It has read every token, in its place: else it would guess otherwise somewhere."""
    engine = engine_of(tiny_model(), tiny_model(), most=3)
    [answer] = engine.submit(Request(PROMPTS[0], Sampling(max_tokens=80)))
    run(engine)
    assert engine.statistics.acceptance == 1.0
    assert engine.statistics.passes < 40
    assert answer.answered == 80


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", DRAFTS)
def test_preemption_forks_and_shared_beginnings(name, sampling):
    model = tiny_model()
    engine = engine_of(model, DRAFTS[name](), pages=13, step_tokens=6)
    answers = [*submit(engine, sampling, n=2), *submit(engine, sampling)]
    run(engine)
    check(model, answers)
    assert engine.statistics.preempted > 0
    assert engine.statistics.cached_tokens > 0
    if name == "itself" and sampling is GREEDY:
        assert engine.statistics.acceptance == 1.0  # forks took its entries along


def test_a_shared_beginning_need_not_be_read_again():
    engine = engine_of(tiny_model(), tiny_model())
    prompt = tuple(range(40))
    for _ in range(2):
        [answer] = engine.submit(Request(prompt, GREEDY))
        run(engine)
    assert answer.cached_tokens == 36
    assert engine.statistics.acceptance == 1.0


def test_a_short_context_ends_the_drafts_and_not_the_answer():
    model = tiny_model()
    engine = engine_of(model, tiny_model(max_position_embeddings=16))
    [answer] = engine.submit(Request(PROMPTS[0], Sampling(max_tokens=60)))
    run(engine)
    check(model, [answer])
    assert 0 < engine.statistics.drafted < 16
    assert engine.statistics.acceptance == 1.0


def test_both_caches_come_out_of_one_memory():
    model, draft = tiny_model(), DRAFTS["a dense one"]()
    engine = Engine(model, Limits(cache_bytes=200_000), draft_model=draft)
    caches = (engine.cache, *engine.cache.beside)
    taken = sum(cache.entries_LpsW.nbytes for cache in caches)
    assert 200_000 - engine.page_bytes < taken <= 200_000
    assert {cache.entries_LpsW.shape[1] for cache in caches} == {engine.pool.count}


# -- named by people ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train_characters(["路漫漫其修远兮，吾将上下而求索。"])
    other = Tokenizer.train_characters(["苟利国家生死以，岂因祸福避趋之！"])
    words = {"vocab_size": 40, "eos_token_id": tokenizer.eos_id}
    save_huggingface(tiny_model(**words), folder / "large", tokenizer=tokenizer)
    small = tiny_model(2, num_hidden_layers=1, **words)
    save_huggingface(small, folder / "small", tokenizer=tokenizer)
    save_huggingface(small, folder / "other", tokenizer=other)
    return folder


def test_by_path_and_by_hand(folders):
    def ids(lm: LanguageModel) -> list[int]:
        return lm.generate(["路漫漫"], max_tokens=30)[0].token_ids

    plain = ids(qiusuo.load(folders / "large", draft="none"))
    large = qiusuo.load(folders / "large", draft=str(folders / "small"))
    assert large.drafting == "model"
    assert ids(large) == plain
    assert large.report()["drafted"] > 0
    itself = LanguageModel(large.model, large.tokenizer, draft=qiusuo.load(folders / "large"))
    assert ids(itself) == plain
    assert itself.report()["acceptance"] == 1.0


def test_another_vocabulary_is_refused(folders):
    with pytest.raises(ValueError, match="the draft model's tokenizer is not the model's"):
        qiusuo.load(folders / "large", draft=folders / "other")
    with pytest.raises(ValueError, match="has a vocabulary of 97 and the model one of 96"):
        LanguageModel(tiny_model(vocab_size=96), None, draft=LanguageModel(tiny_model(), None))
    with pytest.raises(ValueError, match="draft 'fast' is not one of auto, mtp, ngram, none"):
        LanguageModel(tiny_model(), None, draft="fast")


# -- what is told of it ---------------------------------------------------------------------------


def test_the_report_tells_what_drafts_bring_and_cost():
    model = tiny_model()
    engine = engine_of(model, tiny_model(), most=1)
    [answer] = engine.submit(Request(PROMPTS[0], Sampling(max_tokens=21), keep_experts=True))
    experts: dict[bool, list[int]] = {True: [], False: []}
    seen = len(PROMPTS[0])
    while not engine.idle:
        drafted = bool(answer.drafts)
        before = sum(map(len, answer.experts))
        engine.step()
        rows = torch.cat(answer.experts)[before:]
        if before >= seen:
            experts[drafted] += [len(layer.unique()) for layer in rows.unbind(1)]
    told = engine.statistics.told()
    # Every draft was right, so the experts kept for the answer are all that were touched.
    for name, drafted in (("with_drafts", True), ("without_drafts", False)):
        if experts[drafted]:
            mean = sum(experts[drafted]) / len(experts[drafted])
            assert told[name]["experts_touched_per_layer"] == pytest.approx(mean)
    assert told["acceptance"] == 1.0
    assert told["with_drafts"]["tokens_per_pass_of_an_answer"] == 2.0
    assert told["with_drafts"]["rows_per_pass"] == 2.0
    passes = told["with_drafts"]["passes"] + told["without_drafts"]["passes"]
    assert passes == told["passes"] - 1


def test_one_line_for_people():
    lm = LanguageModel(tiny_model(), None, Limits(cache_bytes=100_000))
    count = lm.engine.pool.count
    assert lm.describe() == (
        f"cache: 0.1 MB (as told), {count} pages of 32: {32 * count:,} tokens; "
        "longest context 128; drafts: none"
    )
