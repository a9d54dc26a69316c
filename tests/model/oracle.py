"""DeepSeek-V2 and V3 from the papers' equations, in NumPy float64, one token and head at a time.

Written from DeepSeek-V2 (arXiv:2405.04434 §2), DeepSeek-V3 (arXiv:2412.19437 §2) and YaRN
(arXiv:2309.00071), not from this package's code, and knows only what a reader of a checkpoint
knows: a dict of tensors under their on-disk names and the dict of config.json. Slow on purpose.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tensors = dict[str, Array]
Config = dict[str, Any]


def forward(tensors: Tensors, config: Config, tokens: list[int]) -> tuple[Array, Array]:
    """(hidden states after the final norm [T, D], logits [T, W])."""
    h = np.stack([tensors["model.embed_tokens.weight"][token] for token in tokens])
    for layer in range(config["num_hidden_layers"]):
        h = block(tensors, config, layer, h)
    h = rms_norm(h, tensors["model.norm.weight"], config["rms_norm_eps"])
    return h, h @ head(tensors, config).T


def predict_ahead(
    tensors: Tensors, config: Config, tokens: list[int], h: Array, depth: int
) -> tuple[Array, Array]:
    """MTP module ``depth`` from 0: (hidden after shared_head.norm, logits), both one row shorter.

    Row i of ``h`` has seen ``tokens[: i + depth + 1]``; it is joined with the token after them.
    """
    layer = config["num_hidden_layers"] + depth
    prefix, eps = f"model.layers.{layer}.", config["rms_norm_eps"]
    joined = []
    for i in range(len(h) - 1):
        embedding = tensors["model.embed_tokens.weight"][tokens[i + depth + 1]]
        left = rms_norm(embedding, tensors[prefix + "enorm.weight"], eps)
        right = rms_norm(h[i], tensors[prefix + "hnorm.weight"], eps)
        joined.append(tensors[prefix + "eh_proj.weight"] @ np.concatenate([left, right]))
    out = block(tensors, config, layer, np.stack(joined))
    out = rms_norm(out, tensors[prefix + "shared_head.norm.weight"], eps)
    return out, out @ head(tensors, config).T


def head(tensors: Tensors, config: Config) -> Array:
    tied = config["tie_word_embeddings"]
    return tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]


def block(tensors: Tensors, config: Config, layer: int, h: Array) -> Array:
    prefix, eps = f"model.layers.{layer}.", config["rms_norm_eps"]
    h = h + attention(
        tensors, config, prefix, rms_norm(h, tensors[prefix + "input_layernorm.weight"], eps)
    )
    normed = rms_norm(h, tensors[prefix + "post_attention_layernorm.weight"], eps)
    if layer < config["first_k_dense_replace"]:
        return h + np.stack([swiglu(tensors, prefix + "mlp.", x) for x in normed])
    return h + np.stack([mixture(tensors, config, prefix + "mlp.", x) for x in normed])


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def swiglu(tensors: Tensors, prefix: str, x: Array) -> Array:
    gate = tensors[prefix + "gate_proj.weight"] @ x
    up = tensors[prefix + "up_proj.weight"] @ x
    return tensors[prefix + "down_proj.weight"] @ (gate * sigmoid(gate) * up)


# -- attention: DeepSeek-V2 §2.1, eqs. 37 to 47 -------------------------------------------------


def attention(tensors: Tensors, config: Config, prefix: str, x: Array) -> Array:
    prefix += "self_attn."
    heads, latent_width = config["num_attention_heads"], config["kv_lora_rank"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    queries, keys, values = [], [], []
    for position, x_t in enumerate(x):
        compressed = tensors[prefix + "kv_a_proj_with_mqa.weight"] @ x_t
        latent, key_rope = compressed[:latent_width], compressed[latent_width:]
        latent = rms_norm(latent, tensors[prefix + "kv_a_layernorm.weight"], 1e-6)
        key_rope = rotate(config, key_rope, position)
        key_value = (tensors[prefix + "kv_b_proj.weight"] @ latent).reshape(heads, nope + value)
        if config["q_lora_rank"] is None:
            query = tensors[prefix + "q_proj.weight"] @ x_t
        else:
            low = tensors[prefix + "q_a_proj.weight"] @ x_t
            low = rms_norm(low, tensors[prefix + "q_a_layernorm.weight"], 1e-6)
            query = tensors[prefix + "q_b_proj.weight"] @ low
        query = query.reshape(heads, -1)
        queries.append(
            [np.concatenate([q[:nope], rotate(config, q[nope:], position)]) for q in query]
        )
        keys.append([np.concatenate([kv[:nope], key_rope]) for kv in key_value])
        values.append([kv[nope:] for kv in key_value])
    scale = softmax_scale(config)
    out = []
    for t in range(len(x)):
        per_head = []
        for i in range(heads):
            scores = np.array([queries[t][i] @ keys[s][i] * scale for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            per_head.append(sum(w * values[s][i] for s, w in enumerate(weights)))
        out.append(tensors[prefix + "o_proj.weight"] @ np.concatenate(per_head))
    return np.stack(out)


def softmax_scale(config: Config) -> float:
    scale = 1 / math.sqrt(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    yarn = config["rope_scaling"]
    if yarn and yarn["mscale_all_dim"]:
        scale *= (0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1) ** 2
    return scale


def rotate(config: Config, x: Array, position: int) -> Array:
    """Turn the pairs (x0, x1), (x2, x3), ... each by its own angle."""
    width, base, yarn = len(x), config["rope_theta"], config["rope_scaling"]
    out = np.empty_like(x)
    for pair in range(width // 2):
        frequency, magnitude = base ** (-2 * pair / width), 1.0
        if yarn:
            frequency = yarn_frequency(frequency, pair, width, base, yarn)
            factors = [
                0.1 * yarn[key] * math.log(yarn["factor"]) + 1
                for key in ("mscale", "mscale_all_dim")
            ]
            magnitude = factors[0] / factors[1]
        angle = position * frequency
        a, b = x[2 * pair], x[2 * pair + 1]
        out[2 * pair] = magnitude * (a * math.cos(angle) - b * math.sin(angle))
        out[2 * pair + 1] = magnitude * (a * math.sin(angle) + b * math.cos(angle))
    return out


def yarn_frequency(plain: float, pair: int, width: int, base: float, yarn: Config) -> float:
    """Fast pairs as they are, slow ones divided by the factor, a ramp between (§3.2)."""

    def pair_that_turns(times: float) -> float:
        length = yarn["original_max_position_embeddings"]
        return width * math.log(length / (2 * math.pi * times)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(yarn["beta_slow"])), width - 1)
    span = high - low if high != low else 0.001
    slow = min(max((pair - low) / span, 0.0), 1.0)
    return plain / yarn["factor"] * slow + plain * (1 - slow)


# -- mixture: DeepSeek-V3 §2.1.2, eqs. 12 to 16; DeepSeek-V2 §2.2 -------------------------------


def mixture(tensors: Tensors, config: Config, prefix: str, x: Array) -> Array:
    out = np.zeros_like(x)
    for expert, weight in route(tensors, config, prefix, x):
        out += weight * swiglu(tensors, f"{prefix}experts.{expert}.", x)
    if config["n_shared_experts"]:
        out += swiglu(tensors, prefix + "shared_experts.", x)
    return out


def route(tensors: Tensors, config: Config, prefix: str, x: Array) -> list[tuple[int, float]]:
    """The chosen experts of one token with their weights."""
    logits = tensors[prefix + "gate.weight"] @ x
    experts, method = len(logits), config["topk_method"]
    if config["scoring_func"] == "sigmoid":
        scores = sigmoid(logits)
    else:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    wanted = scores.copy()
    if method == "noaux_tc":
        wanted = wanted + tensors[prefix + "gate.e_score_correction_bias"]
    candidates = list(range(experts))
    if method in ("noaux_tc", "group_limited_greedy"):
        size = experts // config["n_group"]
        groups = [candidates[start : start + size] for start in range(0, experts, size)]

        def worth(group: list[int]) -> float:
            best = sorted((wanted[e] for e in group), reverse=True)
            return sum(best[:2]) if method == "noaux_tc" else best[0]

        groups = sorted(groups, key=worth, reverse=True)[: config["topk_group"]]
        candidates = [expert for group in groups for expert in group]
    chosen = sorted(candidates, key=lambda e: -wanted[e])[: config["num_experts_per_tok"]]
    weights = np.array([scores[e] for e in chosen])
    if config["norm_topk_prob"]:
        weights /= weights.sum()
    return list(zip(chosen, weights * config["routed_scaling_factor"], strict=True))
