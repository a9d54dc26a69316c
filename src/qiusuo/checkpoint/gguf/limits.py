"""What llama.cpp cannot load, or would compute otherwise: it is refused before a file is begun.

Each limit was looked up in llama.cpp b11434: src/models/{deepseek2,llama,qwen2}.cpp,
`load_hparams` in llama-model.cpp, `build_moe_ffn` in llama-graph.cpp, YaRN in llama-context.cpp.
"""

from __future__ import annotations

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.rope_scaling import YarnScaling

MAX_LAYERS, MAX_EXPERTS = 512, 1024


def check_writable(config: ModelConfig) -> None:
    """CheckpointError with the reason if llama.cpp would not load this, or compute it otherwise."""
    _refuse(
        config.num_hidden_layers + config.num_nextn_predict_layers > MAX_LAYERS,
        f"llama.cpp has room for {MAX_LAYERS} layers",
    )
    if isinstance(config, DeepseekConfig):
        _check_deepseek(config)
        if config.num_nextn_predict_layers:
            _check_mtp(config)
    elif isinstance(config, DenseConfig):
        width = config.num_attention_heads * config.head_dim
        if config.model_type == "qwen2":
            _refuse(
                width != config.hidden_size,
                f"llama.cpp takes qwen2's heads together to be as wide as the model, "
                f"{config.hidden_size}, and here they are {width}",
            )
    if isinstance(config.rope_scaling, YarnScaling):
        _check_yarn(config.rope_scaling, isinstance(config, DeepseekConfig))


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise CheckpointError(
            f"this model cannot be written to GGUF: {reason}. Save it as a Hugging Face folder"
        )


def lacks_query_rank(layers: int, vocab_size: int) -> bool:
    """How llama.cpp tells the models whose queries have no rank: by their number of layers."""
    return layers in (26, 27) or (layers == 48 and vocab_size == 128256)


def _check_deepseek(config: DeepseekConfig) -> None:
    layers = config.num_hidden_layers
    lite = lacks_query_rank(layers, config.vocab_size)
    _refuse(
        config.q_lora_rank is None and not lite,
        f"q_lora_rank is null, which llama.cpp reads with 26 or 27 layers only, not {layers}",
    )
    _refuse(
        config.q_lora_rank is not None and lite,
        f"llama.cpp takes a model of {layers} layers to have no q_lora_rank",
    )
    if config.n_routed_experts == 0:
        return
    _refuse(
        config.n_routed_experts > MAX_EXPERTS,
        f"llama.cpp has room for {MAX_EXPERTS} experts in a layer",
    )
    _refuse(
        config.n_shared_experts == 0
        and config.is_moe_layer(layers + config.num_nextn_predict_layers - 1),
        "llama.cpp asks for a shared expert in every MoE layer, and n_shared_experts is 0",
    )
    _refuse(
        config.model_type == "deepseek_v2" and config.topk_group < config.n_group,
        "llama.cpp scores a group by its two best experts, as V3 does, and V2 by its best",
    )


def _check_mtp(config: DeepseekConfig) -> None:
    remedy = "leave the MTP modules out (--no-mtp), or"
    reason = None
    if config.num_nextn_predict_layers > 1:
        reason = f"llama.cpp drafts with one MTP module, not {config.num_nextn_predict_layers}"
    elif config.q_lora_rank is None:
        reason = "llama.cpp drafts with an MTP module only where queries have a q_lora_rank"
    elif not config.is_moe_layer(config.num_hidden_layers):
        reason = "llama.cpp expects experts in the MTP module, and this one is dense"
    if reason is not None:
        raise CheckpointError(
            f"this model cannot be written to GGUF with its MTP modules: {reason}; "
            f"{remedy} save it as a Hugging Face folder"
        )


def _check_yarn(yarn: YarnScaling, deepseek: bool) -> None:
    _refuse(
        (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0),
        "llama.cpp does not read YaRN's beta_fast and beta_slow from the file and takes "
        f"32 and 1, and here they are {yarn.beta_fast} and {yarn.beta_slow}",
    )
    _refuse(
        yarn.factor < 1, f"llama.cpp computes YaRN otherwise for a factor below 1, {yarn.factor}"
    )
    if yarn.factor == 1:
        return
    if deepseek:
        _refuse(
            yarn.mscale != yarn.mscale_all_dim or yarn.mscale == 0,
            "llama.cpp takes YaRN's mscale to be mscale_all_dim and not 0, and here they are "
            f"{yarn.mscale} and {yarn.mscale_all_dim}",
        )
    else:
        _refuse(
            (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0),
            "llama.cpp takes YaRN's mscale to be 1 and mscale_all_dim 0, and here they are "
            f"{yarn.mscale} and {yarn.mscale_all_dim}",
        )
