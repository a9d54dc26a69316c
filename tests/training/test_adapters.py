"""LoRA against the equation, the engine on merged weights, and PEFT's files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from qiusuo.checkpoint.adapter_files import read_adapter
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.engine.core import Engine
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampling import Sampling
from qiusuo.model.transformer import Transformer
from qiusuo.training.lora import LoRA, adaptable
from qiusuo.training.losses import Losses, Window, language_model_losses, make_window
from qiusuo.training.optimizers import build_optimizers
from qiusuo.training.recipe import RecipeError
from qiusuo.training.sections import OptimizerSection
from tests.model.shapes import tiny_model

MODELS: dict[str, dict[str, object]] = {
    "v3": {"num_nextn_predict_layers": 1},
    "v3-tied-full-query": {"tie_word_embeddings": True, "q_lora_rank": None},
    "v2": {"model_type": "deepseek_v2"},
    "qwen2": {"model_type": "qwen2"},  # with biases
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
}
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on(model: Transformer, *, worn: bool = True, **settings: object) -> LoRA:
    """An adapter; ``worn``: one that has learnt something."""
    adapter = LoRA(model, seeded(), **({"rank": 3, "alpha": 5.0} | settings))
    if worn:
        for layer in adapter.layers.values():
            layer.b_OR.data.normal_(0, 0.2, generator=seeded(1))
    return adapter


def window_for(model: Transformer) -> Window:
    tokens_BS = torch.randint(97, (2, 25), generator=seeded(2))
    documents_BS = torch.arange(25).expand(2, -1) // 10
    depth = model.config.num_nextn_predict_layers
    return make_window(tokens_BS, documents_BS, torch.ones(2, 25, dtype=torch.bool), depth, True)


def total(losses: Losses) -> Tensor:
    return losses.main + sum(losses.mtp, torch.zeros(())) + 0.1 * losses.balance


class Loss(torch.nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: Window) -> Tensor:
        return total(language_model_losses(self.model, window))


def snapshot(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: Transformer, before: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name


# -- what it computes ---------------------------------------------------------------------


@every_model
def test_training_computes_w_plus_scaled_ba(changes: dict) -> None:
    """Loss and gradients of A and B against a model whose weights are made of them."""
    model = tiny_model(**changes)
    plain = copy.deepcopy(model)
    adapter = on(model)
    assert set(adapter.layers) == set(adaptable(model))
    window = window_for(model)
    loss = total(language_model_losses(model, window))
    loss.backward()
    pairs = {
        name: [m.detach().clone().requires_grad_() for m in (layer.a_RI, layer.b_OR)]
        for name, layer in adapter.layers.items()
    }
    own = dict(plain.named_parameters())
    weights = {
        f"model.{n}.weight": own[f"{n}.weight"] + 5.0 / 3 * b_OR @ a_RI
        for n, (a_RI, b_OR) in pairs.items()
    }
    expected = functional_call(Loss(plain), weights, (window,), tie_weights=False)
    expected.backward()
    assert abs(loss - expected) <= 1e-5 * abs(expected)
    for name, layer in adapter.layers.items():
        for mine, theirs in zip((layer.a_RI, layer.b_OR), pairs[name], strict=True):
            assert mine.grad is not None, name
            assert theirs.grad.abs().max() > 0, name
            difference = (mine.grad - theirs.grad).abs().max()
            assert difference <= 1e-5 * theirs.grad.abs().max(), name
    assert all(parameter.grad is None for parameter in model.parameters())


@every_model
def test_a_new_adapter_changes_nothing(changes: dict) -> None:
    model, window = tiny_model(**changes), window_for(tiny_model(**changes))
    before, state = language_model_losses(model, window), snapshot(model)
    adapter = on(model, worn=False)
    after = language_model_losses(model, window)
    assert torch.equal(after.main_states, before.main_states)
    assert_unchanged(model, state)
    for layer in adapter.layers.values():  # as nn.Linear begins: uniform up to 1/√I
        bound = layer.a_RI.shape[1] ** -0.5
        assert 0.7 * bound < layer.a_RI.abs().max() <= bound
    again = LoRA(tiny_model(**changes), seeded(), rank=3)
    assert all(map(torch.equal, adapter.state_dict().values(), again.state_dict().values()))


def test_modules_by_pattern() -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    names = set(LoRA(model, seeded(), modules=("kv_b_proj", "shared_experts.*")).layers)
    assert names == {
        *(f"model.layers.{n}.self_attn.kv_b_proj" for n in range(4)),
        *(
            f"model.layers.{n}.mlp.shared_experts.{part}_proj"
            for n in (1, 2, 3)
            for part in ("gate", "up", "down")
        ),
    }


@pytest.mark.parametrize(
    ("pattern", "says"), [("kv_b_pro", "kv_b_proj"), ("lm_head", "lm_head"), ("experts", "experts")]
)
def test_a_pattern_that_fits_nothing(pattern: str, says: str) -> None:
    model = tiny_model()
    with pytest.raises(RecipeError, match=says):
        LoRA(model, seeded(), modules=("q_b_proj", pattern))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_bf16_learns_in_float32(autocast: bool) -> None:
    model = tiny_model(num_nextn_predict_layers=1)
    window = window_for(model)
    adapter = on(model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = total(language_model_losses(model, window))
    loss.backward()
    for parameter in adapter.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    reference = tiny_model(num_nextn_predict_layers=1)
    reference.load_state_dict(model.state_dict())
    on(reference)
    expected = total(language_model_losses(reference, window))
    assert abs(loss - expected) <= 0.02 * abs(expected)


# -- inside the weights -------------------------------------------------------------------


def answer(engine: Engine, prompt: list[int]) -> Sequence:
    (sequence,) = engine.submit(Request(tuple(prompt), Sampling(temperature=0.0, max_tokens=12)))
    while engine.step() or not sequence.finish_reason:
        pass
    return sequence


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_the_engine_draws_from_what_is_trained(name: str) -> None:
    """An engine on the model itself, whose decoding reads weights without calling modules."""
    model = tiny_model(**MODELS[name])
    engine = Engine(model, Limits(cache_bytes=1 << 20))
    prompt = [5, 17, 2, 80, 33]
    plain = answer(engine, prompt)
    adapter, state = on(model), snapshot(model)
    with adapter.merged():
        engine.swap_weights({})
        drawn = answer(engine, prompt)
    tokens = torch.tensor([drawn.tokens])
    logprobs = model.logits(model(tokens).x_BTD)[0].log_softmax(-1)  # through the hooks
    for place, (token, said) in enumerate(zip(drawn.answer, drawn.drawn, strict=True)):
        row = logprobs[len(prompt) - 1 + place]
        assert said.logprob == pytest.approx(row[token].item(), abs=1e-4)
    assert_unchanged(model, state)
    with adapter.disabled():
        engine.swap_weights({})
        again = answer(engine, prompt)
    assert again.answer == plain.answer != drawn.answer
    other = Engine(tiny_model(**MODELS[name]), Limits(cache_bytes=1 << 20))
    other.swap_weights(adapter.merged_weights())
    assert answer(other, prompt).answer == drawn.answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_model(**MODELS["v3"]).to(dtype)
    adapter, state = on(model), snapshot(model)
    changed: set[str] = set()

    def roll_out_and_fail() -> None:
        with adapter.merged():
            now = model.state_dict()
            changed.update(name for name in now if not now[name].equal(state[name]))
            raise KeyError("a rollout that failed")

    with pytest.raises(KeyError, match="a rollout"):
        roll_out_and_fail()
    assert changed == {f"{name}.weight" for name in adapter.layers}
    assert_unchanged(model, state)
    window = window_for(model)
    loss = total(language_model_losses(model, window))  # the hooks are back
    with adapter.disabled():
        assert total(language_model_losses(model, window)) != loss
        with pytest.raises(RuntimeError, match="already"), adapter.merged():
            pass
    assert total(language_model_losses(model, window)) == loss


def test_merged_for_good_it_is_an_ordinary_model() -> None:
    model = tiny_model(**MODELS["v3"])
    model.model.norm.weight.requires_grad_(False)
    window, adapter = window_for(model), on(model)
    expected = language_model_losses(model, window).main
    adapter.merge_for_good()
    assert torch.allclose(language_model_losses(model, window).main, expected, rtol=1e-5)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.norm.weight"]
    with pytest.raises(RuntimeError, match="already"):
        adapter.merge_for_good()


# -- learning -----------------------------------------------------------------------------


def learn(model: Transformer, adapter: LoRA, optimizers: list, steps: int) -> list[float]:
    window, losses = window_for(model), []
    for _ in range(steps):
        loss = total(language_model_losses(model, window))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_only_the_adapter_learns_and_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    model = tiny_model(**MODELS[name])
    state = snapshot(model)
    adapter, section = on(model, worn=False), OptimizerSection(adamw_learning_rate=0.01)
    optimizers = build_optimizers(model, section, adapter.parameters())
    assert [len(o.param_groups) for o in optimizers] == [1]
    assert len(optimizers[0].param_groups[0]["params"]) == len(adapter.parameters())
    losses = learn(model, adapter, optimizers, 6)
    assert losses[-1] < 0.9 * losses[0]
    assert_unchanged(model, state)
    kept = {"adapter": adapter.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(kept, tmp_path / "state.pt")
    further = learn(model, adapter, optimizers, 3)
    twin = tiny_model(**MODELS[name])
    twin_adapter = LoRA(twin, seeded(9), rank=3, alpha=5.0)
    twins = build_optimizers(twin, section, twin_adapter.parameters())
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    twin_adapter.load_state_dict(kept["adapter"])
    for optimizer, saved in zip(twins, kept["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    assert learn(twin, twin_adapter, twins, 3) == further


def test_another_adapters_state_is_refused_whole() -> None:
    adapter = on(tiny_model())
    before = {name: matrix.clone() for name, matrix in adapter.state_dict().items()}
    for other in (on(tiny_model(), rank=4), on(tiny_model(), modules=("q_b_proj",))):
        with pytest.raises(CheckpointError, match="rank and modules"):
            adapter.load_state_dict(other.state_dict())
    assert all(map(torch.equal, adapter.state_dict().values(), before.values()))


def test_with_nothing_to_train_there_is_no_optimizer() -> None:
    model = tiny_model()
    LoRA(model, seeded())
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizers(model, OptimizerSection())


# -- files --------------------------------------------------------------------------------


@every_model
def test_saved_and_loaded(changes: dict, tmp_path: Path) -> None:
    model = tiny_model(**changes)
    adapter = on(model)
    adapter.save(tmp_path / "a", "someone/model")
    adapter.save(tmp_path / "a", "someone/model")  # over itself
    back = LoRA.load(tiny_model(**changes), tmp_path / "a")
    assert (back.rank, back.alpha) == (3, 5.0)
    assert back.state_dict().keys() == adapter.state_dict().keys()
    assert all(map(torch.equal, back.state_dict().values(), adapter.state_dict().values()))
    assert read_adapter(tmp_path / "a").base == "someone/model"
    adapter.save(tmp_path / "half", "someone/model", torch.bfloat16)
    size, half = (next((tmp_path / f).glob("*.safetensors")).stat().st_size for f in ("a", "half"))
    assert half < 0.7 * size


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_b_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"r": 4}, "rank 4"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes: dict, says: str, tmp_path: Path) -> None:
    on(tiny_model()).save(tmp_path / "a", "m")
    edit(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=says):
        read_adapter(tmp_path / "a")


def test_damaged_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    adapter = on(tiny_model())
    folder = adapter.save(tmp_path / "a", "someone/model")
    with pytest.raises(CheckpointError, match="someone/model"):
        LoRA.load(tiny_model(hidden_size=32), folder)
    with pytest.raises(CheckpointError, match="nothing that can have one"):
        LoRA.load(tiny_model(model_type="llama"), folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        read_adapter(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.txt"):
        adapter.save(folder, "m")
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.long
@pytest.mark.parametrize("name", ["v3", "v2", "qwen2", "llama-tied"])
def test_peft_reads_ours_and_we_read_peft(name: str, tmp_path: Path) -> None:
    """With transformers 5, PEFT takes MLPs of a model with experts for routed experts: attention
    alone there."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(97, (2, 20), generator=seeded(4))
    model = tiny_model(**MODELS[name])
    save_huggingface(model, tmp_path / "base")
    adapter = on(model, modules=("self_attn.*",) if model.routers() else ())
    adapter.save(tmp_path / "ours", str(tmp_path / "base"))
    with torch.no_grad():
        ours = model.logits(model(tokens).x_BTD)
        with adapter.disabled():
            plain = model.logits(model(tokens).x_BTD)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        peer = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
        theirs = peer(tokens).logits
        assert (ours - plain).abs().max() > 0.1
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
        peer.save_pretrained(tmp_path / "theirs")
        back = tiny_model(**MODELS[name])
        LoRA.load(back, tmp_path / "theirs")
        assert torch.equal(back.logits(back(tokens).x_BTD), ours)
