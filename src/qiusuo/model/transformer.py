"""The whole network: embedding, blocks, norm and head, with multi-token prediction behind them.

Modules and parameters carry Hugging Face's names, so a checkpoint of DeepSeek's is a state dict of
ours. MTP modules are layers too: number ``num_hidden_layers + k`` predicts the token k+2 ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.gqa import GroupedQueryAttention
from qiusuo.model.groups import Group, Whole
from qiusuo.model.layers import MLP, Linear, ResidualNorm, RMSNorm
from qiusuo.model.low_bit import LowBitExperts, LowBitLinear
from qiusuo.model.mla import MultiHeadLatentAttention
from qiusuo.model.moe import Experts, MoE, Router, Routing
from qiusuo.model.recompute import Out, Run, recomputed
from qiusuo.model.rope import rotations

# B batch, T new tokens, S visible tokens, D hidden, W vocabulary, P rope pairs, L MoE layers of the
# main model, K experts of a token, M = B*T.


class Hidden(NamedTuple):
    """Hidden states, ready for the head, and every MoE layer's routing on the way."""

    x_BTD: Tensor
    routings: dict[int, Routing]  # by layer number


class Context(NamedTuple):
    """What all blocks of one pass share."""

    turns_BTP: Tensor
    groups: Sequence[Group]
    replayed: Mapping[int, Tensor] = {}  # by layer number: experts [M, K] to take, see ``Router``


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm x), then x + mlp(norm x).

    The stream comes and goes as (x, added), what is yet to be added to it (None: nothing): whose
    norm reads the sum next does the sum."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.self_attn = _attention(config)
        if isinstance(config, DeepseekConfig) and config.is_moe_layer(layer):
            self.mlp: MLP | MoE = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ResidualNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, added_BTD: Tensor | None, context: Context
    ) -> tuple[tuple[Tensor, Tensor], Routing | None]:
        x_BTD, normed_BTD = self.input_layernorm(x_BTD, added_BTD)
        attended_BTD = self.self_attn(normed_BTD, context.turns_BTP, context.groups, self.layer)
        x_BTD, normed_BTD = self.post_attention_layernorm(x_BTD, attended_BTD)
        if isinstance(self.mlp, MoE):
            out_BTD, routing = self.mlp(normed_BTD, context.replayed.get(self.layer))
            return (x_BTD, out_BTD), routing
        return (x_BTD, self.mlp(normed_BTD)), None


def _attention(config: ModelConfig) -> MultiHeadLatentAttention | GroupedQueryAttention:
    match config:
        case DeepseekConfig():
            return MultiHeadLatentAttention(config)
        case DenseConfig():
            return GroupedQueryAttention(config)
    raise TypeError(f"{type(config).__name__} is no family of models")


class SharedHead(nn.Module):
    """An MTP module's own norm; the head itself is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = ResidualNorm(config.hidden_size, config.rms_norm_eps)


class MTPBlock(Block):
    """One MTP module (V3 §2.2): joins a hidden state with the next token's embedding.

    h' = block(eh_proj([enorm(embedding); hnorm(h)])), then its own norm. Released checkpoints put
    the embedding first, the reverse of the paper's eq. 21, and take h after the main model's norm.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def predict(
        self, embedding_BTD: Tensor, hidden_BTD: Tensor, context: Context
    ) -> tuple[Tensor, Routing | None]:
        joined = torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1)
        stream, routing = super().forward(self.eh_proj(joined), None, context)
        return self.shared_head.norm(*stream)[1], routing


class Decoder(nn.Module):
    """``model`` of a checkpoint. Layers from ``num_hidden_layers`` on are MTP modules."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # PyTorch's own values, which nobody wants, cost a second of imports on the meta device.
        numbers_WD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(numbers_WD, freeze=False)
        main = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        mtp = [
            MTPBlock(config, config.num_hidden_layers + depth)
            for depth in range(config.num_nextn_predict_layers)
        ]
        self.layers = nn.ModuleList([*main, *mtp])
        self.norm = ResidualNorm(config.hidden_size, config.rms_norm_eps)
        self.depth = len(main)

    @property
    def main_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers[: self.depth]))

    @property
    def mtp_blocks(self) -> list[MTPBlock]:
        return cast(list[MTPBlock], list(self.layers[self.depth :]))


class Transformer(nn.Module):
    """A language model of any family. ``forward`` gives hidden states; ``logits`` the head's.
    ``recompute``: where gradients are wanted, run blocks again instead of keeping what they
    computed (recompute.py)."""

    recompute: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        groups: Sequence[Group] | None = None,
        experts_BTLK: Tensor | None = None,
    ) -> Hidden:
        """Hidden states after the final norm. Without ``positions`` tokens count from 0; without
        ``mask`` every token sees itself and all before it. ``groups`` instead of a mask: tokens
        [1, N] of many sequences, which see what their groups say.

        ``experts``: those to take again, as the engine's ``Completion.experts`` has them (MoE
        layers in order, MTP modules left out); −1 where a token's are to be chosen now, as at the
        end of a text and in padding. ValueError where they are of another shape or model."""
        context = self.context(tokens_BT, positions_BT, mask_BTS, groups)
        if experts_BTLK is not None:
            context = context._replace(replayed=self._by_layer(experts_BTLK, tokens_BT))
        x_BTD: Tensor = self.model.embed_tokens(tokens_BT)
        added_BTD: Tensor | None = None
        routings: dict[int, Routing] = {}
        for block in self.model.main_blocks:
            if self._recomputes() and added_BTD is not None:
                x_BTD, added_BTD = x_BTD + added_BTD, None  # a block's input is kept: one, not two
            (x_BTD, added_BTD), routing = self._run(block, block, (x_BTD, added_BTD), context)
            if routing is not None:
                routings[block.layer] = routing
        return Hidden(self.model.norm(x_BTD, added_BTD)[1], routings)

    def predict_ahead(
        self, hidden_BTD: Tensor, next_tokens_BT: Tensor, depth: int, context: Context
    ) -> Hidden:
        """MTP module ``depth`` (from 0): from the states that predicted ``next_tokens`` to states
        that predict the tokens after those. Chain depth by depth with what the last one gave."""
        block = self.model.mtp_blocks[depth]
        embedding_BTD = self.model.embed_tokens(next_tokens_BT)
        inputs = (embedding_BTD, hidden_BTD)
        x_BTD, routing = self._run(block, block.predict, inputs, context)
        return Hidden(x_BTD, {} if routing is None else {block.layer: routing})

    def _run(
        self, block: Block, run: Run[Out], inputs: tuple[Tensor | None, ...], context: Context
    ) -> tuple[Out, Routing | None]:
        if self._recomputes():
            return recomputed(run, block, inputs, context)
        return run(*inputs, context)

    def _recomputes(self) -> bool:
        return self.recompute and torch.is_grad_enabled()

    def context(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        groups: Sequence[Group] | None = None,
    ) -> Context:
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if groups is None:
            batch, tokens = tokens_BT.shape
            groups = (Whole(batch, tokens, mask_BTS),)
        return Context(rotations(self.config, positions_BT), groups)

    def _by_layer(self, experts_BTLK: Tensor, tokens_BT: Tensor) -> dict[int, Tensor]:
        """Experts to replay, by the number of their layer."""
        layers = [one.layer for one in self.model.main_blocks if isinstance(one.mlp, MoE)]
        config = self.config
        if not layers or not isinstance(config, DeepseekConfig):
            raise ValueError("experts to replay: this model has none")
        wanted = (*tokens_BT.shape, len(layers), config.num_experts_per_tok)
        if experts_BTLK.shape != wanted:
            raise ValueError(
                f"experts to replay {tuple(experts_BTLK.shape)}: {wanted} wanted, [rows, tokens, "
                "MoE layers, experts of a token]"
            )
        if experts_BTLK.numel() and int(experts_BTLK.max()) >= config.n_routed_experts:
            raise ValueError(
                f"experts to replay: number {int(experts_BTLK.max())}, but the model has "
                f"{config.n_routed_experts}; were they chosen by another model?"
            )
        each = experts_BTLK.flatten(0, 1).unbind(1)
        return dict(zip(layers, each, strict=True))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Float32 logits [B, T, W] of hidden states."""
        out_BTW: Tensor = self.lm_head(x_BTD).float()
        return out_BTW

    def fix_rows(self, rows: int | None) -> None:
        """Compute every product with weights for so many rows at a time (None: as they come), so
        that a token's result does not depend on what else is in the pass."""
        for module in self.modules():
            if isinstance(module, Linear | Experts | Router | LowBitLinear | LowBitExperts):
                module.rows = rows

    def routers(self) -> dict[int, Router]:
        """Every MoE layer's router by layer number, MTP modules' too."""
        blocks: list[Block] = [*self.model.main_blocks, *self.model.mtp_blocks]
        return {block.layer: block.mlp.gate for block in blocks if isinstance(block.mlp, MoE)}

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Random weights: normal with ``initializer_range``; norms one, biases zero."""
        for name, parameter in self.named_parameters():
            self.draw(name, parameter, generator)
        for router_bias in self.buffers():
            router_bias.zero_()

    def draw(self, name: str, into: Tensor, generator: torch.Generator | None) -> None:
        """Fill a tensor with what the parameter of that name begins with."""
        if name.endswith("norm.weight"):
            into.fill_(1.0)
        elif name.endswith(".bias"):
            into.zero_()
        else:
            into.normal_(0.0, self.config.initializer_range, generator=generator)
