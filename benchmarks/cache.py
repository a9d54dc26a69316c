"""What the cache takes for a token, against what the same model would take with every head's own
keys and values (MHA), and the longest context that fits a given memory.

    .venv/bin/python benchmarks/cache.py [--gigabytes 16]

V2-Lite, V3 and the quickstart recipe's shape, in bfloat16. The law (DeepSeek-V2 §2.1.4:
kv_lora_rank + qk_rope_head_dim numbers a token and layer) stands beside what the engine's pages
really take; for the small model the pages are allocated, filled and counted in resident memory.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from qiusuo.engine.paged_cache import PAGE_TOKENS, PagedCache
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import measure
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.training.recipe import read_recipe

V3 = DeepseekConfig(max_position_embeddings=163840)
V2_LITE = DeepseekConfig(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    max_position_embeddings=163840,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=16.0)
    budget = parser.parse_args().gigabytes * 1e9
    recipe = read_recipe("quickstart")
    ours = recipe.model_for(recipe.tokenizer.vocab_size)
    head = f"{'model':12} {'law':>10} {'pages':>10} {'MHA':>12} {'saved':>7}"
    print(f"{head}  longest context in {budget / 1e9:.0f} GB")
    for name, config in (("V2-Lite", V2_LITE), ("V3", V3), ("quickstart", ours)):
        row(name, replace(config, num_nextn_predict_layers=0), budget)
    whole = PagedCache.page_bytes(ours, torch.bfloat16) / PAGE_TOKENS
    print(
        f"quickstart with its MTP layer: {whole:,.0f} bytes a token; 65,536 tokens of pages, "
        f"filled, are {resident(ours):,} bytes resident for each"
    )


def row(name: str, config: ModelConfig, budget: float) -> None:
    cost = measure(config)
    law, heads = 2 * cost.cache_elements, 2 * cost.expanded_cache_elements
    pages = PagedCache.page_bytes(config, torch.bfloat16) / PAGE_TOKENS
    room = int(budget // PagedCache.page_bytes(config, torch.bfloat16)) * PAGE_TOKENS
    print(
        f"{name:12} {law:>8,} B {pages:>8,.0f} B {heads:>10,} B {heads / law:>6.1f}x  "
        f"{room:,} tokens (with MHA {int(budget // heads):,})"
    )


def resident(config: ModelConfig, tokens: int = 65536) -> int:
    """Growth of resident memory for each token when pages are filled."""
    before = _resident_bytes()
    cache = PagedCache(config, tokens // PAGE_TOKENS, torch.bfloat16, torch.device("cpu"))
    cache.entries_LpsW.fill_(1.0)
    return round((_resident_bytes() - before) / tokens)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
