"""Where the engine should switch between its two forms of attention.

    .venv/bin/python benchmarks/attention.py

For a context already in the cache and so many new tokens of one sequence: MLA absorbed against
expanded (16 heads, a latent of 512, in the widths of V2-Lite), and grouped-query attention with the
heads of a group as rows of one product against every head by itself (12 heads on 2). One attention
module, without the projections that both share; the least of the rounds, the forms in turn. The
context grows by one each round, as it does while an answer is written, so what PyTorch prepares for
a new shape is paid here as it is there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from qiusuo.engine.limits import few_queries
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.families import config_from_hf
from qiusuo.model.gqa import GroupedQueryAttention
from qiusuo.model.groups import Given
from qiusuo.model.mla import MultiHeadLatentAttention

ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 192, 256])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for name, make in (("MLA", latent), ("GQA", grouped)):
        config, few, many = make(dtype)
        print(f"{name}: the engine switches above {few_queries(config)} new tokens")
        for context in options.contexts:
            for tokens in options.tokens:
                first, second = timed(few, context, tokens), timed(many, context, tokens)
                print(
                    f"  context {context:5,}, {tokens:3} new tokens: {first * 1e3:7.2f} ms few, "
                    f"{second * 1e3:7.2f} ms many, {second / first:5.2f} times"
                )


Form = Callable[[int, int], object]


def timed(form: Form, context: int, tokens: int) -> float:
    least = float("inf")
    with torch.inference_mode():
        for more in range(ROUNDS):
            began = time.perf_counter()
            form(context + more, tokens)
            least = min(least, time.perf_counter() - began)
    return least


def latent(dtype: torch.dtype) -> tuple[ModelConfig, Form, Form]:
    config = DeepseekConfig(
        hidden_size=2048,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    module = MultiHeadLatentAttention(config).to(dtype)
    module.absorb()
    cache = torch.randn(1, 1 << 14, 576).to(dtype)

    def run(attend: Callable[..., object]) -> Form:
        def form(context: int, tokens: int) -> object:
            seen = cache[:, : context + tokens]
            q_nope = torch.randn(1, tokens, 16, 128).to(dtype)
            q_rope = torch.randn(1, tokens, 16, 64).to(dtype)
            return attend(q_nope, q_rope, Given(seen[..., :512], seen[..., 512:], seen), None)

        return form

    return config, run(module.attend_absorbed), run(module.attend_expanded)


def grouped(dtype: torch.dtype) -> tuple[ModelConfig, Form, Form]:
    config = config_from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": 64,
            "hidden_size": 1536,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        }
    )
    assert isinstance(config, DenseConfig)
    module = GroupedQueryAttention(config).to(dtype)
    cache = torch.randn(1, 1 << 14, 512).to(dtype)

    def run(attend: Callable[..., object]) -> Form:
        def form(context: int, tokens: int) -> object:
            k, v = cache[:, : context + tokens].unflatten(-1, (4, 128)).split(2, dim=2)
            return attend(torch.randn(1, tokens, 12, 128).to(dtype), k, v, None)

        return form

    return config, run(module.attend_shared), run(module.attend_expanded)


if __name__ == "__main__":
    main()
