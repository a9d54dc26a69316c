"""The models that benchmarks/ablations.py compares, as recipes and changes to them.

One text, one schedule, one optimizer, one depth and width for all. What differs is one thing at a
time, and what has to move with it for a fair comparison is computed here, from the configs alone:

- a dense model with as many *active* parameters as the MoE, and one with as many *in all*: the
  same MLA, every layer dense (``first_k_dense_replace = num_hidden_layers``), its
  ``intermediate_size`` chosen to the nearest eight;
- MHA, GQA and MQA with exactly MLA's parameters, by the width of a head (30, 40, 48), and with the
  MLPs of the dense model that MLA is compared in; RoPE turns all of their keys, of MLA's a third as
  in V3 (so MLA is there once more with two thirds turned, and 2% fewer parameters of attention);
- MTP once with the same tokens, once with as many fewer steps as its module costs in FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qiusuo.model.cost import Cost, measure
from qiusuo.model.families import config_from_recipe

LENGTH, BATCH = 128, 16
VOCABULARY = 65  # characters of tinyshakespeare; cancels where two models are compared
SHARED: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "intermediate_size": 192,  # of the first layer: a shared expert and two routed ones
}
DEEPSEEK: dict[str, Any] = {"model_type": "deepseek_v3"} | SHARED | LATENT | EXPERTS
TURNED = ("model.qk_nope_head_dim=16", "model.qk_rope_head_dim=32")
CONTEXT = {"max_position_embeddings": 256}

RECIPE = """
name = "ablation-{family}"
[tokenizer]
kind = "characters"
[model]
{model}
[[stages]]
kind = "pretrain"
steps = 1
sequence_length = {length}
batch_size = {batch}
checkpoint_steps = 50
[stages.data]
corpora = [{{ source = "tinyshakespeare" }}]
validation_fraction = 0.02
[stages.optimizer]
learning_rate = 0.02
adamw_learning_rate = 0.005
[stages.schedule]
warmup_steps = 10
decay_fraction = {decay}
"""
LOOKS, DECAY = 8, 0.25  # validations a run; the last quarter of its steps anneals


@dataclass(frozen=True)
class Variant:
    """A model to train: the recipe it starts from, what is changed in it, and the share of the
    steps that it gets."""

    name: str
    words: str
    changes: tuple[str, ...] = ()
    family: str = "deepseek"
    share: float = 1.0


def recipes() -> dict[str, str]:
    """The two written recipes, by family."""
    families: dict[str, dict[str, Any]] = {
        "deepseek": DEEPSEEK,
        "llama": {"model_type": "llama"} | SHARED | {"head_dim": 30},
    }
    families["llama"] = families["llama"] | {"intermediate_size": equal_width("active")}
    return {
        name: RECIPE.format(
            family=name,
            model="\n".join(f"{key} = {_toml(value)}" for key, value in (model | CONTEXT).items()),
            length=LENGTH,
            batch=BATCH,
            decay=DECAY,
        )
        for name, model in families.items()
    }


def variants() -> dict[str, Variant]:
    """All of them, by name, in the order in which a seed's are trained."""
    active, total = (_dense(equal_width(count)) for count in ("active", "parameters"))
    mtp = "model.num_nextn_predict_layers=1"
    unbiased = "stages.0.balance.bias_update_speed=0"
    found = [
        Variant("moe", "MoE: 2 of 16 experts and a shared one, bias 0.001"),
        Variant("dense-active", "dense, equal active parameters, MLA", active),
        Variant("dense-total", "dense, equal parameters in all, MLA", total),
        Variant("mla-rope", "dense, MLA, two thirds of a key turned by RoPE", (*active, *TURNED)),
        Variant("mha", "dense, MHA", ("model.head_dim=30",), "llama"),
        Variant("gqa", "dense, GQA of 2", _grouped(2, 40), "llama"),
        Variant("mqa", "dense, MQA (GQA of 1)", _grouped(1, 48), "llama"),
        Variant("mtp", "MoE with MTP, equal tokens", (mtp,)),
        Variant("mtp-flops", "MoE with MTP, equal FLOPs", (mtp,), share=equal_flops_share()),
        Variant("bias-fast", "MoE, bias 0.01", ("stages.0.balance.bias_update_speed=0.01",)),
        Variant("aux-0.001", "MoE, auxiliary loss 0.001", (unbiased, _weight(0.001))),
        Variant("aux-0.01", "MoE, auxiliary loss 0.01", (unbiased, _weight(0.01))),
        Variant("unbalanced", "MoE, no balancing", (unbiased, _weight(0))),
    ]
    return {variant.name: variant for variant in found}


def equal_width(count: str) -> int:
    """The ``intermediate_size``, a multiple of eight, whose dense model has as many parameters as
    the MoE: ``active`` ones, or all ``parameters``."""
    wanted = getattr(_cost(DEEPSEEK), count)

    def distance(width: int) -> int:
        return abs(getattr(_cost(_dense_table(width)), count) - wanted)

    narrow, wide = getattr(_cost(_dense_table(8)), count), getattr(_cost(_dense_table(16)), count)
    guess = 8 + 8 * ((wanted - narrow) // (wide - narrow))  # parameters are linear in the width
    return min((guess, guess + 8), key=distance)


def equal_flops_share() -> float:
    """Of the steps: what a model with an MTP module may take for the FLOPs of one without."""
    plain, mtp = _cost(DEEPSEEK), _cost(DEEPSEEK | {"num_nextn_predict_layers": 1})
    return plain.training_flops(LENGTH) / mtp.training_flops(LENGTH)


def _cost(table: dict[str, Any]) -> Cost:
    return measure(config_from_recipe({"vocab_size": VOCABULARY} | table | CONTEXT))


def _dense_table(width: int) -> dict[str, Any]:
    layers = SHARED["num_hidden_layers"]
    return DEEPSEEK | {"first_k_dense_replace": layers, "intermediate_size": width}


def _dense(width: int) -> tuple[str, ...]:
    layers = SHARED["num_hidden_layers"]
    return (f"model.first_k_dense_replace={layers}", f"model.intermediate_size={width}")


def _grouped(heads: int, width: int) -> tuple[str, ...]:
    return (f"model.num_key_value_heads={heads}", f"model.head_dim={width}")


def _weight(weight: float) -> str:
    return f"stages.0.balance.sequence_weight={weight}"


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
