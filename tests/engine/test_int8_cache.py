"""A cache in int8: answers are nearly those of the model's own type, and the same bits whether a
row was found or computed, alone or in company, guessed ahead or read from disk."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

import qiusuo
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.engine.core import Engine
from qiusuo.engine.drafting import NgramDrafter
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.model_drafting import ModelDrafter
from qiusuo.engine.mtp_drafting import MTPDrafter
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.transformer import Transformer
from tests.engine.oracle import Steady, check_pages
from tests.model.shapes import tiny_model

PUBLISHED = Path(__file__).parents[2] / "published"
SHAPES = {
    "v3": dict(kv_lora_rank=64, qk_rope_head_dim=32, num_nextn_predict_layers=1, hidden_size=96),
    "qwen2": dict(model_type="qwen2", hidden_size=96, num_key_value_heads=2),
}
# In the batch-invariant mode bits do not depend on the pass; so whatever differs is the cache.
EXACT = Limits(cache_bytes=4 << 20, page_tokens=8, batch_invariant=True)
BEGINNING = [(5 * i * i + 1) % 97 for i in range(19)]
GREEDY = Sampling(max_tokens=24)
READ = Sampling(max_tokens=1, prompt_logprobs=0)
PROMPTS = [BEGINNING + [(7 * i + 3 * j) % 97 for i in range(1 + 6 * j)] for j in range(5)]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def model(request) -> Transformer:
    model = tiny_model(initializer_range=0.1, **request.param).bfloat16()
    for router in model.routers().values():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    return model


def engine_of(model: Transformer, limits: Limits = EXACT, **options) -> Engine:
    return Engine(model, limits, cache="int8", **options)


def answered(
    engine: Engine, prompts: list[list[int]] = PROMPTS, sampling: Sampling = GREEDY
) -> list[Sequence]:
    sequences = [engine.submit(Request(tuple(p), sampling))[0] for p in prompts]
    while not engine.idle:
        engine.step()
        check_pages(engine)
    return sequences


def bits(sequences: list[Sequence]) -> list[list[tuple[int, float]]]:
    return [[(one.token, one.logprob) for one in sequence.drawn] for sequence in sequences]


@pytest.fixture(scope="module")
def alone(model) -> list[list[tuple[int, float]]]:
    """Every prompt in an engine of its own, which computes every row."""
    fresh = replace(EXACT, prefix_cache=False)
    return [bits(answered(engine_of(model, fresh), [prompt]))[0] for prompt in PROMPTS]


def test_found_or_computed_alone_or_in_company(model, alone):
    engine = engine_of(model)
    assert bits(answered(engine)) == alone
    found = engine.statistics.cached_tokens
    assert bits(answered(engine)) == alone
    assert engine.statistics.cached_tokens > found
    cut = replace(EXACT, step_tokens=9, page_tokens=4)
    assert bits(answered(engine_of(model, cut))) == alone


def test_preempted_and_evicted(model, alone):
    few = replace(EXACT, cache_bytes=14 * engine_of(model).page_bytes)
    engine = engine_of(model, few)
    assert bits(answered(engine, PROMPTS[::-1])) == alone[::-1]
    assert engine.statistics.preempted > 0
    assert bits(answered(engine)) == alone  # what was found then has been evicted since


def test_branches_of_one_prompt(model):
    """Siblings begin on a copy of their last page."""
    engine = engine_of(model)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=3)
    together = engine.submit(Request(tuple(PROMPTS[1]), sampling, n=3))
    while not engine.idle:
        engine.step()
    for choice, sequence in enumerate(together):
        other = engine_of(model, replace(EXACT, prefix_cache=False))
        [one] = other.submit(Request(tuple(PROMPTS[1]), sampling, first_choice=choice))
        while not other.idle:
            other.step()
        assert bits([one]) == bits([sequence])


def test_guessed_ahead(model, alone):
    engine = engine_of(model, draft_model=tiny_model(3, num_hidden_layers=1).bfloat16())
    drafters = [NgramDrafter(), ModelDrafter(engine.models[1], engine.cache.beside[0], 3)]
    if model.model.mtp_blocks:
        drafters.append(MTPDrafter(model, engine.cache))
    for drafter in drafters:
        drafter.pace = Steady(3)
        engine.drafter = drafter
        before = engine.statistics.drafted
        assert bits(answered(engine)) == alone
        assert engine.statistics.drafted > before


def test_read_from_disk_and_told_apart_there(model, alone, tmp_path):
    limits = replace(EXACT, prefix_folder=tmp_path)
    for cache in ("int8", None, "int8"):
        lm = LanguageModel(model, None, limits, draft="none", cache=cache)
        given = bits(answered(lm.engine))
        if cache is not None:
            assert given == alone
    assert lm.engine.statistics.disk_tokens > 0
    assert len(list(tmp_path.iterdir())) == 2  # marks: the two types found nothing of each other
    sizes = {path.stat().st_size for path in tmp_path.glob("*/*")}
    plain = PagedCache.page_bytes(model.config, torch.bfloat16, 8)
    assert sizes == {lm.engine.page_bytes + 32, plain + 32}  # with a sum


def test_more_pages_of_the_same_memory():
    v3 = DeepseekConfig(kv_lora_rank=512, qk_rope_head_dim=64, num_hidden_layers=61)
    layers = 61 + v3.num_nextn_predict_layers
    assert PagedCache.page_bytes(v3, torch.bfloat16, 32) == layers * 32 * 1152
    assert PagedCache.page_bytes(v3, torch.bfloat16, 32, "int8") == layers * 32 * 672
    model = tiny_model(kv_lora_rank=128, qk_rope_head_dim=16)
    plain, rounded = Engine(model, EXACT), engine_of(model)
    assert rounded.pool.count > 2.5 * plain.pool.count  # float32: 576 and 224 bytes
    taken = rounded.cache.entries_LpsW.nbytes
    assert taken == rounded.pool.count * rounded.page_bytes <= 4 << 20
    assert "MB of int8" in rounded.describe()
    assert "int8" not in plain.describe()


def test_other_types_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(CheckpointError, match="cache 'int4' is not int8; leave it out"):
        qiusuo.load(tmp_path / "nothing", cache="int4")
    with pytest.raises(ValueError, match="cache 'fp8' is not int8"):
        LanguageModel(tiny_model(), None, cache="fp8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loaded_with_it_in_other_types(dtype, tmp_path):
    save_huggingface(tiny_model(**SHAPES["v3"]), tmp_path / "model")
    told = []
    for cache in (None, "int8"):
        lm = qiusuo.load(tmp_path / "model", dtype=dtype, limits=EXACT, cache=cache)
        [sequence] = answered(lm.engine, [PROMPTS[2]], READ)
        told.append(torch.tensor([one.logprob for one in sequence.prompt_drawn]))
    assert 0 < (told[0] - told[1]).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["r1-zero-parity", "countdown"])
def test_a_trained_model_says_nearly_the_same(name):
    """Perplexity of its own texts, through the engine; and its greedy answers."""
    limits = Limits(cache_bytes=1 << 26)
    lms = {
        cache: qiusuo.load(PUBLISHED / name / "model", limits=limits, draft="none", cache=cache)
        for cache in (None, "int8")
    }
    first = lms[None].config.bos_token_id
    words = lms[None].config.vocab_size - 6
    prompts = [[first, *((7 * i * j + 3 * j) % words + 6 for i in range(8))] for j in range(12)]
    texts = lms[None].generate(prompts, max_tokens=60, temperature=1.0, seed=1, ignore_eos=True)
    read = [prompt + list(text.token_ids) for prompt, text in zip(prompts, texts, strict=True)]
    told, greedy = {}, {}
    for cache, lm in lms.items():
        sequences = answered(lm.engine, read, READ)
        drawn = chain.from_iterable(sequence.prompt_drawn for sequence in sequences)
        told[cache] = torch.tensor([one.logprob for one in drawn])
        greedy[cache] = [one.token_ids for one in lm.generate(prompts, max_tokens=40)]
    off = told["int8"] - told[None]
    assert len(off) > 800
    assert 0 < off.abs().mean() < 0.03
    assert abs(float(off.mean())) < 0.005  # of the logarithm of the perplexity
    same = sum(one == other for one, other in zip(greedy[None], greedy["int8"], strict=True))
    assert same >= 9  # of 12; a near-tie may fall the other way
