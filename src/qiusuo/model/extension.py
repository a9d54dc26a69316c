"""A longer context for a model that has learnt a shorter one.

YaRN (arXiv:2309.00071) slows the pairs of RoPE that turn less than once over the context, so that
positions never seen look like some that were; a little training on long texts does the rest.
DeepSeek-V3 (arXiv:2412.19437 §4.3) goes from 4K to 128K with a factor of 40, in two stages of 1,000
steps and of growing length, both with the same YaRN. Only the config changes; the weights fit as
they are.
"""

from __future__ import annotations

from dataclasses import replace

from qiusuo.model.checks import ConfigError
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.rope_scaling import YarnScaling


def extended(
    config: ModelConfig,
    factor: float,
    original: int | None = None,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 1.0,
) -> ModelConfig:
    """The config of a context ``factor`` times as long as ``original``, what the model has learnt
    (None: its max_position_embeddings). ``mscale``: in a DeepSeek model it sharpens the softmax and
    leaves the turned pairs their length, as in DeepSeek's files; elsewhere the pairs grow, which is
    YaRN's own way. ConfigError where the context is stretched already or would not grow."""
    known = config.max_position_embeddings
    if config.rope_scaling is not None:
        how = config.rope_scaling.to_hf()
        raise ConfigError(
            f"the context is stretched already, by {how.get('type', how.get('rope_type'))} with "
            f"factor {config.rope_scaling.factor:g} to {known} positions: leave extend out, a "
            "longer sequence_length is enough"
        )
    positions = round((original or known) * factor)
    if positions <= known:
        raise ConfigError(
            f"extend: {original or known} positions times {factor:g} are {positions}, and the "
            f"model has max_position_embeddings {known} already: give a larger factor"
        )
    yarn = YarnScaling(
        factor=factor,
        original_max_position_embeddings=original or known,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        mscale=mscale,
        mscale_all_dim=mscale if isinstance(config, DeepseekConfig) else 0.0,
    )
    return replace(config, rope_scaling=yarn, max_position_embeddings=positions)
