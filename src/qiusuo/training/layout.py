"""How a training run lies on many devices, and what each of them then holds and sends.

Three ways to divide, as DeepSeek-V3 was trained (arXiv:2412.19437 §3.2): the layers into
``pipeline`` stages, the experts of a layer over ``expert`` devices, the sequences of a step over
all devices of a stage. Optimizer states are divided among the devices that hold the same weights
(ZeRO-1). There is no tensor parallelism. What is counted:

- weights in the type they are multiplied in; gradients in float32; for the optimizer a float32
  copy and two moments in bfloat16 (§3.3.3);
- activations that wait for the backward pass: on the first stage of a 1F1B pipeline as many
  micro-batches as there are stages. ``recompute="parts"`` keeps what V3 keeps (§3.2.3, §3.3.3):
  the residual stream, the latents (or queries, keys and values), attention's output, the inputs of
  the experts and of their SwiGLU; norms, up-projections and SwiGLU's output are computed again.
  ``recompute="layers"`` keeps a layer's input alone and pays one more forward pass;
- traffic of one step: tokens to their experts and back, both ways; activations to the next stage
  and gradients to the one before; gradients reduced and new weights gathered.

Activations are those of the first stage, the rest are means over stages. Not counted: logits,
buffers of communication, fragmentation, and the second copy of the weights that DualPipe holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

from qiusuo.checkpoint.fp8 import is_quantized_name
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import BYTES_PER_WEIGHT, meta_model
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig

NODE = 8  # devices of one machine, as of the H800 cluster
GRADIENT, MASTER, MOMENTS, BF16 = 4, 4, 2 * 2, 2  # bytes a number
FP8 = "fp8 (128×128 blocks)"


class PlanError(ValueError):
    """A plan that cannot be; the message names the option and the remedy."""


Choice = TypeVar("Choice", bound=str)


def checked_choice(option: str, given: str, known: tuple[Choice, ...]) -> Choice:
    """One of the values that an option has. PlanError where it is none."""
    if given not in known:
        raise PlanError(f"{option} {given}: expected {' or '.join(known)}")
    return given


@dataclass(frozen=True)
class Layout:
    """``batch`` and ``micro_batch`` in sequences of ``sequence_length`` tokens: of a step over all
    devices, and of one pass on one. ``precision``: of matrix products."""

    devices: int
    batch: int
    sequence_length: int
    pipeline: int = 1
    expert: int = 1
    micro_batch: int = 1
    precision: Literal["fp8", "bfloat16"] = "bfloat16"
    recompute: Literal["parts", "layers"] = "parts"

    @property
    def replicas(self) -> int:
        """Devices of one stage: each reads its own sequences."""
        return self.devices // self.pipeline

    @property
    def step_tokens(self) -> int:
        return self.batch * self.sequence_length

    def check(self, config: ModelConfig) -> None:
        """PlanError where the model cannot lie so."""
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        if self.sequence_length > config.max_position_embeddings:
            raise PlanError(
                f"--sequence {self.sequence_length} is over the model's max_position_embeddings "
                f"{config.max_position_embeddings}"
            )
        if self.devices % self.pipeline:
            raise PlanError(
                f"--devices {self.devices} is not a multiple of --pipeline {self.pipeline}"
            )
        if self.pipeline > layers:
            raise PlanError(f"--pipeline {self.pipeline} is more stages than layers ({layers})")
        experts = config.n_routed_experts if isinstance(config, DeepseekConfig) else 0
        if self.expert > 1 and (experts == 0 or experts % self.expert):
            raise PlanError(
                f"--expert {self.expert} does not divide the model's {experts} routed experts"
            )
        if self.replicas % self.expert:
            raise PlanError(
                f"--expert {self.expert} does not divide the {self.replicas} devices of a stage "
                "(--devices / --pipeline)"
            )
        if self.batch % (self.replicas * self.micro_batch):
            raise PlanError(
                f"--batch {self.batch} is not a multiple of {self.replicas * self.micro_batch}: "
                "the devices of a stage, a micro-batch each"
            )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one step. ``between_nodes``: of ``experts``, what leaves the
    machine where every token goes to as many machines as it may."""

    experts: float
    between_nodes: float
    pipeline: float
    data: float

    @property
    def network(self) -> float:
        """What goes between machines, where neighbouring stages are on different ones."""
        return self.between_nodes + self.pipeline + self.data


@dataclass(frozen=True)
class _Held:
    """Of one device's weights: numbers of parameters, and bytes in the precision of products."""

    experts: float
    others: float
    expert_bytes: float
    other_bytes: float


def memory(config: ModelConfig, layout: Layout) -> Memory:
    """What a device holds."""
    held = _held(config, layout)
    states = MASTER + MOMENTS
    optimizer = states * held.others / layout.replicas
    optimizer += states * held.experts * layout.expert / layout.replicas
    layers = -(-(config.num_hidden_layers + config.num_nextn_predict_layers) // layout.pipeline)
    tokens = layout.micro_batch * layout.sequence_length
    return Memory(
        weights=held.expert_bytes + held.other_bytes,
        gradients=GRADIENT * (held.experts + held.others),
        optimizer=optimizer,
        activations=layout.pipeline * tokens * layers * kept_bytes(config, layout),
    )


def kept_bytes(config: ModelConfig, layout: Layout) -> float:
    """What one token leaves for the backward pass in one layer (the mean of MoE and dense ones)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if layout.recompute == "layers":
        return BF16 * hidden
    if isinstance(config, DeepseekConfig):
        queries = config.q_lora_rank or heads * config.qk_head_dim
        inputs = queries + config.cache_width
    else:
        assert isinstance(config, DenseConfig)
        inputs = heads * config.head_dim + config.cache_width
    attention = BF16 * (inputs + heads * config.head_widths[1]) + 4 * heads  # and log-sum-exp
    number = 1 if layout.precision == "fp8" else BF16
    dense = 2 * config.intermediate_size  # of SwiGLU; the layer's input is a norm's, made again
    if not isinstance(config, DeepseekConfig) or config.n_routed_experts == 0:
        return 2 * BF16 * hidden + attention + number * dense
    share = _moe_layers(config) / (config.num_hidden_layers + config.num_nextn_predict_layers)
    used = config.num_experts_per_tok + config.n_shared_experts
    moe = used * 2 * config.moe_intermediate_size + config.num_experts_per_tok * hidden
    return 2 * BF16 * hidden + attention + number * (share * moe + (1 - share) * dense)


def traffic(config: ModelConfig, layout: Layout) -> Traffic:
    """What a device sends in one step."""
    held = _held(config, layout)
    tokens = layout.step_tokens / layout.replicas
    hidden = config.hidden_size
    experts = between = 0.0
    if isinstance(config, DeepseekConfig) and layout.expert > 1:
        # There in the precision of products and back in bf16; the same for the gradients (§3.3.3).
        number = 1 if layout.precision == "fp8" else BF16
        a_copy = tokens * _moe_layers(config) / layout.pipeline * 2 * hidden * (number + BF16)
        experts = a_copy * config.num_experts_per_tok * (1 - 1 / layout.expert)
        nodes = max(1, layout.expert // NODE)
        # A token goes to each machine once, and to those of its groups alone (§3.2.2).
        reached = config.topk_group if config.n_group > 1 else config.num_experts_per_tok
        between = a_copy * min(reached, nodes, config.num_experts_per_tok) * (1 - 1 / nodes)
    stages = 2 * tokens * BF16 * hidden if layout.pipeline > 1 else 0.0
    data = 0.0
    groups = (
        (held.others, held.other_bytes, layout.replicas),
        (held.experts, held.expert_bytes, layout.replicas // layout.expert),
    )
    for count, in_products, among in groups:
        data += (GRADIENT * count + in_products) * (1 - 1 / among)
    return Traffic(experts, between, stages, data)


def state_bytes(config: ModelConfig) -> float:
    """A checkpoint to train on from: the float32 copy and the moments."""
    return (MASTER + MOMENTS) * float(sum(count for _, count, _ in _tensors(config)))


def _held(config: ModelConfig, layout: Layout) -> _Held:
    counts = {True: 0.0, False: 0.0}  # by whether they are experts'
    sizes = {True: 0.0, False: 0.0}
    for expert, count, quantized in _tensors(config):
        over = layout.pipeline * (layout.expert if expert else 1)
        eight = quantized and layout.precision == "fp8"
        counts[expert] += count / over
        sizes[expert] += count / over * (BYTES_PER_WEIGHT[FP8] if eight else BF16)
    return _Held(counts[True], counts[False], sizes[True], sizes[False])


@lru_cache(maxsize=4)
def _tensors(config: ModelConfig) -> list[tuple[bool, int, bool]]:
    """Of every parameter: whether it is of routed experts, how many numbers, whether DeepSeek
    multiplies with it in FP8."""
    found = []
    for name, tensor in meta_model(config).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        expert = ".experts." in name
        found.append((expert, tensor.numel(), expert or is_quantized_name(name)))
    return found


def _moe_layers(config: DeepseekConfig) -> int:
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return sum(config.is_moe_layer(layer) for layer in range(layers))
