"""The tensors of a GGUF file against those of a Hugging Face folder: names and arrangement.

Most differ in name only. What is arranged otherwise:

- The experts of a layer are one tensor, `ffn_up_exps` [E, F, D].
- MLA's `kv_b_proj` is cut in two, for the absorbed form: every head's key matrix, transposed
  (`attn_k_b` [H, C, N]), and its value matrix (`attn_v_b` [H, V, C]).
- RoPE turns adjacent elements in `llama`, so the rows of every head of q and k are interleaved:
  p, p + E/2, p + 1, ... Qwen2's and DeepSeek's stay as they are.

Reading puts all that back a few rows at a time; plan.py is the way out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.gguf.weights import FileTensor
from qiusuo.checkpoint.stored import StoredTensor
from qiusuo.model.config import ModelConfig
from qiusuo.model.dense_config import DenseConfig

# H heads, C latent width, N nope width, V value width.

ROPE_FREQS = "rope_freqs.weight"
WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# What follows `model.layers.N.` against what follows `blk.N.`
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",  # in files from before the absorbed form
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "shared_head.head.weight": "nextn.shared_head_head.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
}
FROM_LAYER = {theirs: ours for ours, theirs in IN_LAYER.items()}
FROM_WHOLE = {theirs: ours for ours, theirs in WHOLE_MODEL.items()}
KEYS, VALUES = "attn_k_b.weight", "attn_v_b.weight"


def has_mtp(tensors: Mapping[str, FileTensor], blocks: int) -> bool:
    """Whether the last block is an MTP module; some files count one and leave it out."""
    return f"blk.{blocks - 1}.nextn.eh_proj.weight" in tensors


def stored_tensors(
    tensors: Mapping[str, FileTensor], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The file's tensors under Hugging Face's names; one that is not known keeps its own."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        layer, rest = _block(name)
        prefix = f"model.layers.{layer}."
        if name == ROPE_FREQS or rest == "attn_rot_embd.weight" or _left_out(config, layer):
            continue
        if layer is None:
            found[FROM_WHOLE.get(name, name)] = tensor
        elif (stack := re.fullmatch(r"ffn_(gate|up|down|gate_up)_exps\.weight", rest)) is not None:
            found |= _experts(f"{prefix}mlp.experts.", stack[1], tensor)
        elif rest == KEYS and f"blk.{layer}.{VALUES}" in tensors:
            values = tensors[f"blk.{layer}.{VALUES}"]
            found[f"{prefix}self_attn.kv_b_proj.weight"] = _joined(tensor, values)
        elif rest == VALUES and f"blk.{layer}.{KEYS}" in tensors:
            continue
        elif is_interleaved(config, rest):
            assert isinstance(config, DenseConfig)
            found[prefix + FROM_LAYER[rest]] = HalvedHeads(tensor, config.head_dim)
        else:
            found[prefix + FROM_LAYER[rest] if rest in FROM_LAYER else name] = tensor
    for depth in range(config.num_nextn_predict_layers):
        # An MTP module without a norm of its own uses the model's, says llama.cpp.
        norm = f"model.layers.{config.num_hidden_layers + depth}.shared_head.norm.weight"
        if "model.norm.weight" in found:
            found.setdefault(norm, found["model.norm.weight"])
    return found


def _block(name: str) -> tuple[int | None, str]:
    match = re.fullmatch(r"blk\.(\d{1,9})\.(.+)", name)
    return (None, name) if match is None else (int(match[1]), match[2])


def _left_out(config: ModelConfig, layer: int | None) -> bool:
    return layer is not None and layer >= config.num_hidden_layers + config.num_nextn_predict_layers


def is_interleaved(config: ModelConfig, rest: str) -> bool:
    """Whether this tensor of a block, by GGUF's name, has its heads' rows in pairs."""
    return config.model_type == "llama" and rest in ("attn_q.weight", "attn_k.weight")


def _experts(prefix: str, part: str, stack: FileTensor) -> dict[str, StoredTensor]:
    if len(stack.shape) != 3:
        raise CheckpointError(f"{stack.place} has shape {stack.shape}; expected one matrix each")
    found: dict[str, StoredTensor] = {}
    for expert in range(stack.shape[0]):
        matrix = stack.matrix(expert)
        if part == "gate_up":
            half = matrix.shape[0] // 2
            found[f"{prefix}{expert}.gate_proj.weight"] = matrix.part(0, half)
            found[f"{prefix}{expert}.up_proj.weight"] = matrix.part(half, 2 * half)
        else:
            found[f"{prefix}{expert}.{part}_proj.weight"] = matrix
    return found


def _joined(keys: FileTensor, values: FileTensor) -> JoinedHeads:
    if len(keys.shape) != 3 or len(values.shape) != 3 or keys.shape[:2] != values.shape[::2]:
        raise CheckpointError(
            f"{keys.place} has shape {keys.shape} and {values.name} {values.shape}: they are not "
            "the keys (head, latent, nope) and the values (head, value, latent) of one layer"
        )
    return JoinedHeads(keys, values)


@dataclass(frozen=True)
class HalvedHeads:
    """q or k of a Llama: the rows of each head put back from pairs to halves."""

    tensor: FileTensor
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def kind(self) -> str:
        return self.tensor.kind

    @property
    def stored_bytes(self) -> int:
        return self.tensor.stored_bytes

    @property
    def place(self) -> str:
        return self.tensor.place

    def rows(self, start: int, stop: int) -> Tensor:
        first = start // self.width * self.width
        last = min(-(-stop // self.width) * self.width, self.shape[0])
        return halves(self.tensor.rows(first, last), self.width)[start - first : stop - first]


@dataclass(frozen=True)
class JoinedHeads:
    """MLA's kv_b_proj [H*(N+V), C] out of its keys and its values."""

    keys: FileTensor  # H, C, N
    values: FileTensor  # H, V, C

    @property
    def shape(self) -> tuple[int, ...]:
        return self.keys.shape[0] * self._head_rows, self.keys.shape[1]

    @property
    def _head_rows(self) -> int:
        return self.keys.shape[2] + self.values.shape[1]

    @property
    def kind(self) -> str:
        return self.keys.kind

    @property
    def stored_bytes(self) -> int:
        return self.keys.stored_bytes + self.values.stored_bytes

    @property
    def place(self) -> str:
        return f"{self.keys.place} and {self.values.name}"

    def rows(self, start: int, stop: int) -> Tensor:
        first, last = start // self._head_rows, -(-stop // self._head_rows)
        heads: list[Tensor] = []
        for head in range(first, last):
            keys_CN, values_VC = self.keys.matrix(head), self.values.matrix(head)
            keys, values = keys_CN.rows(0, keys_CN.shape[0]), values_VC.rows(0, values_VC.shape[0])
            exact = torch.promote_types(keys.dtype, values.dtype)
            heads += keys.T.to(exact), values.to(exact)
        offset = first * self._head_rows
        return torch.cat(heads)[start - offset : stop - offset]


def halves(rows: Tensor, width: int) -> Tensor:
    """The rows of each head from pairs (p, p + width/2 side by side) to halves."""
    pairs = rows.unflatten(0, (-1, width // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
