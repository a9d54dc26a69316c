"""Large models of random weights in every format that `cpu_inference.py` compares, made on demand.

A weight is a function of its name and place, drawn when a writer asks for its rows. So the same
model can be written in bfloat16, as GGUF and in our low-bit format one after the other, and is
never whole anywhere: 15.7 B parameters take no more memory than a few rows, and no bfloat16 file.
"""

from __future__ import annotations

import functools
import random
import string
import subprocess
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.checkpoint.gguf.file import write_gguf
from qiusuo.checkpoint.huggingface import write_huggingface
from qiusuo.checkpoint.quantize import quantize_checkpoint
from qiusuo.checkpoint.stored import Checkpoint, StoredTensor
from qiusuo.checkpoint.tensors import disk_shapes
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.cost import ROUTER_BIAS
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.rope_scaling import YarnScaling

WORDS = 32000  # of the made-up vocabulary
BLOCK_NUMBERS = 1 << 20  # drawn from one seed
_V3 = DeepseekConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=6,
    num_attention_heads=16,
    q_lora_rank=768,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    max_position_embeddings=32768,
    bos_token_id=0,
    eos_token_id=1,
)
SHAPES = {
    "v3": _V3,  # 3.12 B parameters, 547 M of them active
    "v2-lite": replace(  # DeepSeek-V2-Lite as published: 15.7 B, 2.4 B active
        _V3,
        model_type="deepseek_v2",
        vocab_size=102400,
        num_hidden_layers=27,
        q_lora_rank=None,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_scaling=YarnScaling(
            factor=40.0,
            original_max_position_embeddings=4096,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        max_position_embeddings=163840,
    ),
    "tiny": replace(  # seconds, to see that everything runs
        _V3,
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        q_lora_rank=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
    ),
}


# -- the model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomTensor:
    """Normal numbers, ones for norms, zeros for biases: as ``Transformer.initialize`` has them."""

    name: str
    shape: tuple[int, ...]
    deviation: float

    @property
    def kind(self) -> str:
        return "F32" if self.name.endswith(ROUTER_BIAS) else "BF16"

    @property
    def stored_bytes(self) -> int:
        return torch.Size(self.shape).numel() * (4 if self.kind == "F32" else 2)

    @property
    def place(self) -> str:
        return self.name

    def rows(self, start: int, stop: int) -> Tensor:
        if len(self.shape) == 1:
            whole = torch.ones if self.name.endswith("norm.weight") else torch.zeros
            return whole(
                stop - start, dtype=torch.float32 if self.kind == "F32" else torch.bfloat16
            )
        height = max(1, BLOCK_NUMBERS // self.shape[1])
        first, last = start // height, -(-stop // height)
        blocks = [_drawn(self, block, height) for block in range(first, last)]
        return torch.cat(blocks)[start - first * height : stop - first * height]


@functools.lru_cache(maxsize=4)  # writers come back for the next rows of the same block
def _drawn(tensor: RandomTensor, block: int, height: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{tensor.name} {block}".encode()))
    rows = min(height, tensor.shape[0] - block * height)
    drawn = torch.randn(rows, *tensor.shape[1:], generator=generator)
    return drawn.mul_(tensor.deviation).bfloat16()


def random_checkpoint(shape: str) -> Checkpoint:
    config = SHAPES[shape]
    tensors: dict[str, StoredTensor] = {
        name: RandomTensor(name, size, config.initializer_range)
        for name, size in disk_shapes(config).items()
    }
    return Checkpoint(Path(f"random {shape}"), "memory", config, tensors, vocabulary)


@functools.cache
def vocabulary() -> Tokenizer:
    """Learned from words that nobody knows; llama.cpp's programs ask for one."""
    letters, draw = string.ascii_lowercase, random.Random(0)
    words = ("".join(draw.choices(letters, k=draw.randint(4, 12))) for _ in range(4 * WORDS))
    return Tokenizer.train_bpe([" ".join(words)], WORDS)


# -- its files ----------------------------------------------------------------------------


def our_model(folder: Path, shape: str, bits: int) -> Path:
    """Ours in 16, 8 or 4 bits."""
    kind = {16: "bf16", 8: "int8", 4: "int4"}[bits]
    path = folder / f"{shape}-{kind}"
    if (path / "config.json").is_file():
        return path
    with _Telling(path):
        if bits == 16:
            return write_huggingface(random_checkpoint(shape), path, "BF16")
        return quantize_checkpoint(random_checkpoint(shape), path, kind).folder


def gguf_model(folder: Path, shape: str, bits: int, binaries: Path) -> Path:
    """llama.cpp's in 16, 8 or 4 bits. Q4_0 is what its own quantiser makes with its own choice of
    types (the head is Q6_K), out of the bfloat16 where that is there and of Q8_0 otherwise."""
    path = folder / f"{shape}-{ {16: 'bf16', 8: 'q8_0', 4: 'q4_0'}[bits] }.gguf"
    if path.is_file():
        return path
    if bits == 4:
        finer = [folder / f"{shape}-{kind}.gguf" for kind in ("bf16", "q8_0")]
        found = next((one for one in finer if one.is_file()), None)
        source = found or gguf_model(folder, shape, 8, binaries)
        with _Telling(path):
            llama_quantize(binaries, source, path, "Q4_0", "--allow-requantize")
        if found is None:  # of V2-Lite 16.7 GB, for this alone
            source.unlink()
        return path
    with _Telling(path):
        return write_gguf(random_checkpoint(shape), path, "bf16" if bits == 16 else "q8_0")


def llama_quantize(binaries: Path, source: Path, target: Path, kind: str, *more: str) -> Path:
    draft = target.with_suffix(".part")
    command = [binaries / "llama-quantize", *more, source, draft, kind]
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"llama-quantize failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return draft.rename(target)


class _Telling:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {self.path} ...", flush=True)
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        print(f"    {time.perf_counter() - self.began:.0f} s", flush=True)
