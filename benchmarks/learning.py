"""How long until a character model knows tinyshakespeare: Qiusuo against nanoGPT, side by side.

    git clone https://github.com/karpathy/nanoGPT /tmp/nanoGPT
    .venv/bin/python benchmarks/learning.py --nanogpt /tmp/nanoGPT

nanoGPT runs its README's CPU recipe, Qiusuo its recipe `tinyshakespeare`. Time is wall clock from
process start to process end, everything in it: imports, data, evaluation, saving. Both are judged
afterwards, by the same rule, on the whole last tenth of the text: non-overlapping windows of the
model's own training length, mean nats per character. `--recipe` and `--set` try another recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qiusuo
from qiusuo.data.corpora import open_corpus
from qiusuo.runs.folder import read_recipe

TARGET = 1.8857
NANOGPT_FLAGS = """config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
    --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128
    --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --always_save_checkpoint=True""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without it: ours only")
    parser.add_argument("--recipe", default="tinyshakespeare")
    parser.add_argument("--set", action="append", default=[], help="as of `qiusuo train`")
    parser.add_argument("--rounds", type=int, default=1, help="alternate so many times")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    text = next(open_corpus("tinyshakespeare").documents())
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            if options.nanogpt:
                theirs.append(run_nanogpt(options.nanogpt, Path(folder, f"n{number}"), text))
                _tell("nanoGPT", theirs[-1])
            run = Path(folder, f"q{number}")
            ours.append(run_qiusuo(options.recipe, options.set, run, text))
            _tell("Qiusuo", ours[-1])
    result = {"machine": _machine(), "target": TARGET, "qiusuo": ours, "nanogpt": theirs}
    if theirs:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
        result["time_ratio"] = statistics.median(ratios)
        print(f"time, Qiusuo / nanoGPT: {result['time_ratio']:.3f} (median of {len(ratios)})")
    reached = all(run["loss"] <= TARGET for run in ours)
    print(f"validation loss {TARGET} {'reached' if reached else 'NOT reached'}; {_machine()}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_qiusuo(recipe: str, changes: list[str], run: Path, text: str) -> dict[str, float]:
    command = [sys.executable, "-m", "qiusuo", "train", recipe, "--run", str(run)]
    for change in changes:
        command += ["--set", change]
    # An empty cache: the tokenizer and the shards are made anew, within the time.
    seconds = _timed(command, run.parent, {"QIUSUO_HOME": str(run) + "-cache"})
    lm = qiusuo.load(run, dtype="float32")
    length = read_recipe(run)["stages"][-1]["sequence_length"]
    assert lm.tokenizer is not None
    ids = torch.tensor(lm.tokenizer.encode(text[int(len(text) * 0.9) :]))

    def nats(inputs_BT: torch.Tensor) -> torch.Tensor:
        return lm.model.logits(lm.model(inputs_BT).x_BTD)

    return {"seconds": seconds, "loss": judge(nats, ids, length)}


def run_nanogpt(checkout: Path, folder: Path, text: str) -> dict[str, float]:
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    ids = np.array([number[c] for c in text], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    data = folder / "data" / "shakespeare_char"
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    meta = {"vocab_size": len(characters), "stoi": number, "itos": dict(enumerate(characters))}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    seconds = _timed([sys.executable, "train.py", *NANOGPT_FLAGS], folder, {})
    sys.path.insert(0, str(folder))
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    validation = torch.from_numpy(ids[cut:].astype(np.int64))

    def logits(inputs_BT: torch.Tensor) -> torch.Tensor:
        return model(inputs_BT, inputs_BT)[0]  # with targets it gives every place's logits

    return {"seconds": seconds, "loss": judge(logits, validation, 64)}


@torch.inference_mode()
def judge(logits: Any, ids: torch.Tensor, length: int) -> float:
    """Mean nats per character over all of ``ids`` but the first, in windows of ``length``."""
    total, targets = 0.0, len(ids) - 1
    whole = targets // length
    spans = [
        (ids[: whole * length].view(whole, length), ids[1 : whole * length + 1].view(whole, length))
    ]
    if targets % length:
        spans.append((ids[None, whole * length : -1], ids[None, whole * length + 1 :]))
    for inputs, labels in spans:
        for start in range(0, len(inputs), 64):
            scores = logits(inputs[start : start + 64]).float().flatten(0, 1)
            wanted = labels[start : start + 64].flatten()
            total += torch.nn.functional.cross_entropy(scores, wanted, reduction="sum").item()
    assert math.isfinite(total)
    return total / targets


def _timed(command: list[str], folder: Path, variables: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        command, cwd=folder, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def _tell(name: str, run: dict[str, float]) -> None:
    print(f"{name:8} {run['seconds']:7.1f} s   loss {run['loss']:.4f}", flush=True)


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
