"""What loading costs: peak memory over the final weights, and seconds, beside two peers.

    .venv/bin/pip install accelerate        # transformers wants it for FP8
    .venv/bin/python benchmarks/loading.py

Made-up checkpoints of about 400 MB in bfloat16, shaped like Llama and like DeepSeek-V3, are loaded
by Qiusuo, by transformers and by the safetensors library alone (which knows no FP8), each in a
process of its own. Peak is the kernel's high-water mark (VmHWM) over what stood in memory after
imports and one load of a tiny model; mapped pages of a file count, as they do for the kernel. Every
weight is looked at once, so that nothing is lazily left out. The file cache is warm for all: where
the type stays, a peer that maps the file copies nothing and takes no time, but its weights are then
the file's (they change with it).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qiusuo.checkpoint.gguf.file import write_gguf
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.checkpoint.load import checkpoint_of, load_model
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.transformer import Transformer

CLAIM = 1.10
READERS = ("qiusuo", "transformers", "safetensors")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
SHARD_BYTES = {"one file": 1 << 40, "100 MB shards": 100 << 20}
CASES = [  # family, files, stored as, loaded as
    ("llama", "one file", "BF16", "BF16"),
    ("llama", "100 MB shards", "BF16", "BF16"),
    ("deepseek_v3", "one file", "BF16", "BF16"),
    ("deepseek_v3", "100 MB shards", "BF16", "BF16"),
    ("llama", "100 MB shards", "BF16", "F32"),
    ("deepseek_v3", "100 MB shards", "BF16", "F32"),
    ("llama", "100 MB shards", "F8_E4M3", "BF16"),
    ("deepseek_v3", "100 MB shards", "F8_E4M3", "BF16"),
    ("llama", "GGUF", "BF16", "BF16"),  # with a vocabulary of real size in its header
    ("deepseek_v3", "GGUF", "BF16", "BF16"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--rounds", type=int, default=3, help="median peak and least seconds of")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    print(f"{'checkpoint':46} {'final MB':>8}  " + "".join(f"{name:>21}" for name in READERS))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            rows.append(run_case(Path(folder), case, options.rounds))
            _tell(rows[-1])
    worst = max(row["readers"]["qiusuo"]["peak_ratio"] for row in rows)
    print("peak memory over the final weights; seconds, one look at every weight included")
    verdict = "holds" if worst <= CLAIM else "DOES NOT HOLD"
    print(f"Qiusuo's largest: {worst:.3f} (claim: at most {CLAIM:.2f}, {verdict}); {_machine()}")
    if options.out:
        result = {"machine": _machine(), "claim": CLAIM, "worst": worst, "cases": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_case(folder: Path, case: tuple[str, str, str, str], rounds: int) -> dict[str, Any]:
    family, files, stored, loaded = case
    model = checkpoint(folder, family, "large", files, stored)
    tiny = checkpoint(folder, family, "tiny", files, stored)
    row: dict[str, Any] = {"family": family, "files": files, "stored": stored, "loaded": loaded}
    row["readers"] = {}
    for reader in READERS:
        if files == "GGUF" and reader != "qiusuo":  # transformers dequantises to float32 first
            continue
        if reader == "safetensors" and stored == "F8_E4M3":
            continue
        runs = [_child(reader, model, tiny, loaded) for _ in range(rounds)]
        row["readers"][reader] = {
            "weights": runs[0]["weights"],
            "peak_ratio": statistics.median(run["peak"] / run["weights"] for run in runs),
            "seconds": min(run["seconds"] for run in runs),
        }
    return row


def checkpoint(folder: Path, family: str, size: str, files: str, stored: str) -> Path:
    """Made once; random numbers, since what they are costs nothing."""
    path = folder / "-".join((family, size, files.replace(" ", "_"), stored))
    path = path.with_suffix(".gguf") if files == "GGUF" else path
    if not path.exists():
        model = Transformer(config(family, size == "tiny")).bfloat16()
        model.initialize(torch.Generator().manual_seed(0))
        if files == "GGUF":
            return write_gguf(checkpoint_of(model, vocabulary(model.config.vocab_size)), path)
        save_huggingface(model, path, dtype=DTYPES[stored], shard_bytes=SHARD_BYTES[files])
    return path


@functools.cache
def vocabulary(size: int) -> Tokenizer:
    """A tokenizer of about ``size`` tokens, learned from words that nobody knows."""
    letters, draw = string.ascii_lowercase, random.Random(0)
    words = ("".join(draw.choices(letters, k=draw.randint(4, 12))) for _ in range(4 * size))
    return Tokenizer.train_bpe([" ".join(words)], size)


def config(family: str, tiny: bool) -> ModelConfig:
    """Sizes are whole blocks of 128, the only ones of which transformers can read FP8 right."""
    sizes: dict[str, Any] = dict(
        model_type=family,
        vocab_size=512 if tiny else 24576,
        hidden_size=128 if tiny else 1024,
        intermediate_size=128 if tiny else 2816,
        num_hidden_layers=2 if tiny else 12,
        num_attention_heads=1 if tiny else 8,
    )
    if family == "llama":
        return DenseConfig(**sizes)
    sizes |= dict(num_hidden_layers=2 if tiny else 7, first_k_dense_replace=1, n_group=2)
    sizes |= dict(n_routed_experts=4 if tiny else 16, moe_intermediate_size=128 if tiny else 512)
    sizes |= dict(q_lora_rank=128 if tiny else 384, kv_lora_rank=128, qk_rope_head_dim=128)
    return DeepseekConfig(topk_group=1, num_experts_per_tok=2, **sizes)


# -- in the child -------------------------------------------------------------------------


def measure(reader: str, folder: str, tiny: str, loaded: str) -> dict[str, float]:
    """Bytes of the peak over the baseline, bytes of the weights, seconds."""
    dtype = DTYPES[loaded]
    read(reader, tiny, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    baseline = _status("VmRSS")
    start = time.perf_counter()
    weights = read(reader, folder, dtype)
    seconds = time.perf_counter() - start
    return {"peak": _status("VmHWM") - baseline, "weights": weights, "seconds": seconds}


def read(reader: str, folder: str, dtype: torch.dtype) -> int:
    """Load, look at every page, and give the bytes of what was loaded."""
    if reader == "qiusuo":
        checkpoint = open_checkpoint(folder)
        checkpoint.read_tokenizer()  # as whoever loads a model does
        return look(load_model(checkpoint, dtype=dtype).state_dict().values())
    if reader == "transformers":
        return look(_with_transformers(folder, dtype).state_dict().values())
    from safetensors.torch import load_file

    held: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        held |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    return look(held.values())


def _with_transformers(folder: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    raw = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    more: dict[str, Any] = {}
    if "quantization_config" in raw:
        more["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)


def look(tensors: Iterable[torch.Tensor]) -> int:
    total = 0
    for tensor in tensors:
        tensor.detach().reshape(-1).view(torch.uint8)[::1024].sum()
        total += tensor.nbytes
    return total


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: this benchmark is for Linux")


# -- in the parent ------------------------------------------------------------------------


def _child(reader: str, folder: Path, tiny: Path, loaded: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", reader, str(folder), str(tiny), loaded]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _tell(row: dict[str, Any]) -> None:
    name = f"{row['family']}, {row['files']}, {row['stored']} -> {row['loaded']}"
    line = f"{name:46} {row['readers']['qiusuo']['weights'] / 1e6:8.0f}  "
    for reader in READERS:
        found = row["readers"].get(reader)
        cell = f"{found['peak_ratio']:.3f} {found['seconds']:6.2f} s" if found else "-"
        line += f"{cell:>21}"
    print(line, flush=True)


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's lines."""


if __name__ == "__main__":
    main()
