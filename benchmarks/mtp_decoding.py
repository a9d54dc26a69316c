"""What a multi-token prediction module is worth in decoding, where its guesses hold or not.

    .venv/bin/python benchmarks/mtp_decoding.py --folder runs/mtp [--minutes 8] [--rounds 5]

A DeepSeek-V3 shape of 61M parameters is trained once on records as a firm's programs write them
(JSON lines: names of fields and much of a line's form can be foreseen, its numbers cannot), and
kept in the folder. Then it goes on from beginnings of records, and from beginnings of verse, which
it has never seen and of which it foresees nothing, greedily, one answer at a time, without drafts
and with its own module's; the two take turns. The pace of drafting is left to the engine. Answers
in float32 must be equal; in fewer bits a near-tie may fall otherwise, and how many are equal is
told.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import qiusuo
from qiusuo.data.corpora import open_corpus
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
RECIPE = """
name = "mtp-decoding"
[tokenizer]
kind = "bpe"
vocab_size = 4096
[model]
hidden_size = 512
intermediate_size = 1536
moe_intermediate_size = 512
num_hidden_layers = 9
num_attention_heads = 8
q_lora_rank = 192
kv_lora_rank = 128
qk_nope_head_dim = 32
qk_rope_head_dim = 32
v_head_dim = 32
n_routed_experts = 6
num_experts_per_tok = 2
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
first_k_dense_replace = 1
num_nextn_predict_layers = 1
max_position_embeddings = 1024
[[stages]]
kind = "pretrain"
steps = 2000
minutes = {minutes}
sequence_length = 256
batch_size = 8
mtp_weight = 0.3
[stages.data]
corpora = [{{ source = "{text}" }}]
[stages.optimizer]
learning_rate = 0.01
adamw_learning_rate = 0.002
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, the first time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    options = parser.parse_args()
    if not (options.folder / "run" / "model").is_dir():
        train(options.folder, options.minutes)
    held_out = random.Random(1)
    records = [record(held_out)[:60] for _ in range(6)]
    verse = [text[:24] for text in list(open_corpus("tang-poems").documents())[:600:100]]
    for weights in options.weights:
        low = weights in ("int8", "int4")
        loaded = qiusuo.load(
            options.folder / "run",
            dtype="bfloat16" if low else weights,
            quantize=weights if low else None,
        )
        for name, prompts in (("records", records), ("verse", verse)):
            compare(f"{weights:8} {name:8}", loaded, prompts, options.tokens, options.rounds)


def train(folder: Path, minutes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text, recipe = folder / "records.jsonl", folder / "recipe.toml"
    generator = random.Random(0)
    lines = ["".join(record(generator) for _ in range(8)) for _ in range(4000)]
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in lines))
    recipe.write_text(RECIPE.format(minutes=minutes, text=text.resolve()))
    command = [sys.executable, "-m", "qiusuo", "train", str(recipe), "--run", str(folder / "run")]
    subprocess.run(command, check=True)


def record(draw: random.Random) -> str:
    """A line of a shop's log."""
    city = draw.choice(["Berlin", "Lisbon", "Nairobi", "Osaka", "Quito", "Xi'an"])
    item = draw.choice(["lamp", "chair", "kettle", "ladder", "mirror"])
    content = {
        "order_number": draw.randrange(10_000),
        "shipping_address": {"city": city, "postal_code": draw.randrange(100)},
        "customer_status": draw.choice(["new customer", "returning customer"]),
        "ordered_items": [{"article": item, "quantity": draw.randrange(1, 10)}],
        "payment": {"method": "bank transfer", "currency": "EUR", "settled": draw.random() < 0.5},
        "message": f"Your {item} is on its way to {city}. Thank you for shopping with us!",
    }
    return json.dumps(content) + "\n"


def compare(
    label: str, loaded: LanguageModel, prompts: list[str], tokens: int, rounds: int
) -> None:
    """Print the median of the rounds' ratios of speed, drafts' acceptance, and equal answers."""
    limits = Limits(cache_bytes=1 << 28, prefix_cache=False)
    plain, drafting = (
        LanguageModel(loaded.model, loaded.tokenizer, limits, draft=kind)
        for kind in ("none", "mtp")
    )
    for lm in (plain, drafting):
        answers(lm, prompts[:2], tokens)
    ratios, equal, rates = [], 0, []
    for _ in range(rounds):
        seconds, without = answers(plain, prompts, tokens)
        drafted_seconds, drafted = answers(drafting, prompts, tokens)
        ratios.append(seconds / drafted_seconds)
        rates.append(len(prompts) * tokens / seconds)
        equal = sum(a == b for a, b in zip(without, drafted, strict=True))
        if label.startswith("float32") and equal < len(prompts):
            raise SystemExit("answers in float32 differ with drafts: that must not be")
    told = drafting.engine.statistics
    accepted = told.accepted / max(1, told.drafted)
    print(
        f"{label} {statistics.median(rates):7.1f} tokens/s without drafts; with: "
        f"{statistics.median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"{told.drafted} drafts, {accepted:.0%} accepted, {equal} of {len(prompts)} answers equal",
        flush=True,
    )


def answers(lm: LanguageModel, prompts: list[str], tokens: int) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    made = [
        lm.generate([prompt], max_tokens=tokens, temperature=0.0, ignore_eos=True)[0].token_ids
        for prompt in prompts
    ]
    return time.perf_counter() - began, made


if __name__ == "__main__":
    main()
