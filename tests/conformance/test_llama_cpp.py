"""llama.cpp loads what we write and computes what we compute: tokens, probabilities, MTP drafts.

Random weights with a large spread: every tensor, in its place and the right way round, matters to
every number. What is refused (checkpoint/gguf/limits.py) is written all the same, to see that
llama.cpp would really not have taken it, or computed something else.
"""

import lzma
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import qiusuo.data
from qiusuo.checkpoint.gguf.file import open_gguf, write_gguf
from qiusuo.checkpoint.load import checkpoint_of, load_model
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine.language_model import LanguageModel
from qiusuo.model.transformer import Transformer
from tests.checkpoint.test_gguf import LITE, WRITABLE
from tests.conformance.llama_cpp import Agreement, LoadError, compare, serve
from tests.model.shapes import VARIANTS, YARN, tiny_model

pytest.importorskip("xllamacpp", reason="llama.cpp in a wheel: pip install xllamacpp")

VOCABULARY = 512
OTHERS = {
    "v3-all-groups": {"n_group": 4, "topk_group": 4},
    "v3-no-experts": {"n_routed_experts": 0, "n_shared_experts": 0},
    "v3-yarn-of-1": {"rope_scaling": type(YARN)(1.0, 16, mscale_all_dim=0.3)},
}


@cache
def text() -> str:
    file = Path(qiusuo.data.__file__).parent / "builtin" / "tinyshakespeare.txt.xz"
    with lzma.open(file, "rt") as lines:
        return lines.read()[:80_000]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([text()[:50_000]], VOCABULARY)


@cache
def prompts(count: int, length: int = 16) -> list[list[int]]:
    ids = tokenizer().encode(text()[50_000:])
    return [ids[start : start + length] for start in range(0, count * length, length)]


def model_of(**changes: object) -> Transformer:
    return tiny_model(**{"vocab_size": VOCABULARY} | changes)


def write(model: Transformer, path: Path, kind: str = "f32") -> Path:
    return write_gguf(checkpoint_of(model, tokenizer()), path, kind)


def agreement(model: Transformer, path: Path, count: int, steps: int) -> Agreement:
    with serve(path) as server:
        return compare(server, model, tokenizer(), prompts(count), steps)


# -- the same model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v3-mtp", "v3-yarn", "llama3", "qwen2"])
def test_a_few_answers(name, tmp_path):
    model = model_of(**WRITABLE[name])
    found = agreement(model, write(model, tmp_path / "m.gguf"), count=5, steps=20)
    assert (found.same_answers, found.same_first) == (5, 100)
    assert found.difference < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("changes", (WRITABLE | OTHERS).values(), ids=WRITABLE | OTHERS)
def test_fifty_answers_and_two_thousand_positions(changes, tmp_path):
    model = model_of(**changes)
    found = agreement(model, write(model, tmp_path / "m.gguf"), count=50, steps=40)
    assert found.positions == 2000
    assert found.same_answers == 50
    assert found.same_first >= 1998  # two may be as likely but for the last bit
    assert found.difference < 1e-4


@pytest.mark.parametrize(("kind", "share"), [("f16", 0.98), ("bf16", 0.9), ("q8_0", 0.85)])
def test_smaller_kinds(kind, share, tmp_path):
    """llama.cpp rounds activations to the weights' type, so that near-ties fall otherwise."""
    model = model_of(hidden_size=64, num_nextn_predict_layers=1)
    path = write(model, tmp_path / "m.gguf", kind)
    rounded = load_model(open_gguf(path), dtype=torch.float32)
    found = agreement(rounded, path, count=5, steps=20)
    assert found.same_first >= share * found.positions


def test_same_tokens_of_a_text(tmp_path):
    with serve(write(model_of(), tmp_path / "m.gguf")) as server:
        for line in text()[50_000:].splitlines()[:50]:
            assert server.tokenize(line) == tokenizer().encode(line)


@pytest.mark.parametrize("name", ["llama", "llama-own-heads-tied", "qwen2", "qwen2-tied"])
def test_transformers_reads_the_same_model(name, tmp_path, monkeypatch):
    """An independent reader of the layout. (It does not know rope_freqs.weight, nor deepseek2.)"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    model = model_of(**WRITABLE[name])
    write(model, tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    tokens_BT = torch.tensor(prompts(4))
    with torch.no_grad():
        expected = theirs.eval()(tokens_BT).logits
        torch.testing.assert_close(model.logits(model(tokens_BT).x_BTD), expected)


# -- MTP ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_llama_cpp_drafts_with_our_mtp_module(tmp_path):
    """Its drafts are ours: of a model that knows its text it accepts as many as we predict."""
    ids = tokenizer().encode(text()[50_000:])
    model = model_of(num_nextn_predict_layers=1)
    _learn(model, torch.tensor(ids[:640]), steps=120)
    drafted = accepted = expected_drafted = expected_accepted = 0
    with serve(write(model, tmp_path / "m.gguf"), mtp=True) as server:
        for start in range(0, 1200, 30):  # half of what it knows and half of what is new
            prompt = ids[start : start + 12]
            answer = (
                LanguageModel(model, None)
                .generate([prompt], max_tokens=40, ignore_eos=True)[0]
                .token_ids
            )
            theirs = server.complete(prompt, 40, temperature=0)
            if 1 in answer:
                continue
            assert theirs["tokens"] == answer
            drafted += theirs["timings"]["draft_n"]
            accepted += theirs["timings"]["draft_n_accepted"]
            expected = _drafting(model, prompt, answer)
            expected_drafted += expected[0]
            expected_accepted += expected[1]
    assert drafted > 500
    assert accepted > 0.5 * drafted
    assert accepted == pytest.approx(expected_accepted, rel=0.02)
    assert drafted == pytest.approx(expected_drafted, rel=0.02)


def _learn(model: Transformer, ids: torch.Tensor, steps: int) -> None:
    """By heart, with the MTP module."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 66, (8,), generator=generator)
        tokens_BT = torch.stack([ids[start : start + 66] for start in starts])
        now, ahead, beyond = tokens_BT[:, :64], tokens_BT[:, 1:65], tokens_BT[:, 2:]
        hidden = model(now).x_BTD
        hidden_ahead = model.predict_ahead(hidden, ahead, 0, model.context(ahead)).x_BTD
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), ahead.flatten())
        loss += F.cross_entropy(model.logits(hidden_ahead).flatten(0, 1), beyond.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def _drafting(model: Transformer, prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """(drafted, accepted) where one token is drafted after each that the model gave itself."""
    tokens = [*prompt, *answer]
    now, ahead = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
    hidden = model.predict_ahead(model(now).x_BTD, ahead, 0, model.context(ahead)).x_BTD
    drafts = model.logits(hidden)[0].argmax(-1).tolist()  # drafts[t] guesses token t + 2
    drafted = accepted = 0
    place = len(prompt) + 1
    while place < len(tokens) - 1:  # the last token of a limit is not worth a draft
        drafted += 1
        right = drafts[place - 2] == tokens[place]
        accepted += right
        place += 1 + right
    return drafted, accepted


# -- the refusals -------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr("qiusuo.checkpoint.gguf.file.check_writable", lambda config: None)


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"num_hidden_layers": 27},
        {"n_shared_experts": 0},
        {"model_type": "qwen2", "head_dim": 10},
    ],
    ids=["full-query", "27-layers-low-rank-query", "no-shared-expert", "wide-heads"],
)
def test_what_is_refused_does_not_load(changes, unchecked, tmp_path):
    path = write(model_of(**changes), tmp_path / "m.gguf")
    with pytest.raises(LoadError), serve(path) as server:
        server.complete(prompts(1)[0], 1)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 2},
        {"num_nextn_predict_layers": 1, "first_k_dense_replace": 4},
        LITE | {"num_nextn_predict_layers": 1},
    ],
    ids=["two", "dense", "full-query"],
)
def test_mtp_modules_that_are_refused_do_not_draft(changes, unchecked, tmp_path):
    path = write(model_of(**changes), tmp_path / "m.gguf")
    with pytest.raises((LoadError, OSError)), serve(path, mtp=True) as server:
        server.complete(prompts(1)[0], 8, temperature=0)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        VARIANTS["v2-groups"] | {"q_lora_rank": 20},
        {"rope_scaling": type(YARN)(8.0, 16, mscale=1.0, mscale_all_dim=0.5)},
        {"rope_scaling": type(YARN)(8.0, 16, mscale=1.0, mscale_all_dim=0.0)},
        {"rope_scaling": type(YARN)(8.0, 4096, 4.0, 1.0, mscale=1.0, mscale_all_dim=1.0)},
        {"model_type": "qwen2", "rope_scaling": YARN},
    ],
    ids=["v2-groups", "mscales-differ", "no-mscale-all-dim", "beta-fast", "qwen2-mscale"],
)
def test_what_is_refused_is_computed_otherwise(changes, unchecked, tmp_path):
    model = model_of(**changes)
    found = agreement(model, write(model, tmp_path / "m.gguf"), count=5, steps=40)
    assert found.difference > 1e-2
