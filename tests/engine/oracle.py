"""What the engine's tests compare with: an answer computed alone, pass by full pass, uncached; and
a model whose next token is a hash of every token it sees in the cache, exact and quick."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qiusuo.engine.core import Engine
from qiusuo.engine.request import Request, Sequence
from qiusuo.engine.sampler import BadLogits, Drawn, Row, draw, token_logprobs
from qiusuo.model.dense_config import DenseConfig
from qiusuo.model.groups import Group, Whole, cut
from qiusuo.model.transformer import Hidden

WORDS = 13
POISON = WORDS - 1  # whoever sees this token computes NaN
MODULUS = 99991.0


class HashModel(nn.Module):
    """Logits that depend on every (token, position) in sight, all else alike: one wrong page, one
    token too many or a stale one gives another answer. What may not be seen is multiplied by 0, as
    attention does it, so a NaN left in the cache hurts whoever comes across it."""

    def __init__(self, context: int = 64) -> None:
        super().__init__()
        self.config = DenseConfig(
            vocab_size=WORDS,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=2,
            max_position_embeddings=context,
        )
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(WORDS, 1, dtype=torch.float64)
        self.model.main_blocks = self.model.mtp_blocks = []  # type: ignore[assignment]

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        groups: SequenceOf[Group] | None = None,
    ) -> Hidden:
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1])[None]
        groups = groups or [Whole(*tokens_BT.shape)]
        seen_BT2 = torch.stack((tokens_BT.double(), positions_BT.double()), -1)
        seen_BT2[tokens_BT == POISON] = torch.nan
        sums = []
        for group, (entry_BT2, other_BT2) in cut(groups, seen_BT2, seen_BT2):
            token_BS, position_BS = group.extend(0, entry_BT2, other_BT2).first_BSX.unbind(-1)
            keys = token_BS.shape[1]
            mask_BTS = group.mask_BTS
            if mask_BTS is None:
                ones_TS = torch.ones(group.tokens, keys, dtype=torch.bool)
                mask_BTS = ones_TS.tril(keys - group.tokens)[None]
            mixed_BS = ((token_BS + 1) * (position_BS + 7) * 7907 + token_BS * 31) % MODULUS
            sums.append((mask_BTS.double() @ mixed_BS[..., None]).flatten())
        return Hidden((torch.cat(sums) % MODULUS).view(*tokens_BT.shape, 1), {})

    def fix_rows(self, rows: int | None) -> None:
        """Its sums are exact in any shape."""

    def logits(self, x: Tensor) -> Tensor:
        odd_W = 2 * torch.arange(WORDS, dtype=torch.float64) + 1
        logits = (x * odd_W * 7919) % 1009 / 1009 * 5
        logits[..., POISON] -= 40  # never drawn
        return logits.float()


@dataclass
class Expected:
    """An answer computed without the engine."""

    tokens: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    reason: str = "length"
    error: str | None = None


@torch.no_grad()
def full_logits(model: nn.Module, tokens: SequenceOf[int]) -> Tensor:
    """[T, W] of one pass over all tokens without any cache."""
    out: Tensor = model.logits(model(torch.tensor([list(tokens)])).x_BTD)[0]
    return out


def alone(
    model: nn.Module,
    request: Request,
    choice: int = 0,
    forced: dict[int, int] | None = None,
    capacity: int | None = None,
) -> Expected:
    """The answer to a request. ``forced``: tokens at places of the answer."""
    sampling, told = request.sampling, Expected()
    room = min(sampling.max_tokens, (capacity or 10**9) - len(request.prompt))
    room = min(room, model.config.max_position_embeddings - len(request.prompt))
    ends = set(sampling.stop_ids) | (set() if sampling.ignore_eos else set(request.end_ids))
    while len(told.tokens) < room:
        logits_W = full_logits(model, [*request.prompt, *told.tokens])[-1:]
        place = len(told.tokens)
        if place in (forced or {}):
            (one,) = token_logprobs(logits_W, [forced[place]])
        else:
            banned = frozenset(ends) if place < sampling.min_tokens else frozenset()
            row = Row(sampling, request.prompt, told.tokens, place, choice, None, banned)
            (one,) = draw(logits_W, [row])
        if isinstance(one, BadLogits):
            told.reason, told.error = "error", one.reason
            return told
        told.tokens.append(one.token)
        told.drawn.append(one)
        if one.token in ends:
            told.reason = "stop"
            return told
    return told


def greedy(model: nn.Module, prompt: SequenceOf[int], tokens: int) -> list[int]:
    """The argmax of full passes: no sampler, no cache, no end."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(int(full_logits(model, text)[-1].argmax()))
    return text[len(prompt) :]


def run(engine: Engine, *, most: int = 2000) -> None:
    """Until all is answered, checking at every step that no page is lost."""
    for _ in range(most):
        if engine.idle:
            break
        engine.step()
        check_pages(engine)
    assert engine.idle, "not done"
    assert engine.pool.available == engine.pool.count, "pages leaked"


def check_pages(engine: Engine) -> None:
    """Every reference to a page belongs to someone who is running."""
    engine.pool.check()
    held = [0] * engine.pool.count
    for sequence in engine.scheduler.running:
        for page in sequence.pages:
            held[page] += 1
    assert held == engine.pool.references
    assert all(not one.pages for one in engine.scheduler.waiting)
    for sequence in (*engine.scheduler.running, *engine.scheduler.waiting):
        assert sequence.finish_reason is None
        assert sequence.pending >= 1


def assert_as_expected(sequence: Sequence, expected: Expected, exact: bool = True) -> None:
    assert list(sequence.answer) == expected.tokens
    assert (sequence.finish_reason, sequence.error) == (expected.reason, expected.error)
    assert len(sequence.versions) == len(sequence.drawn) == len(expected.tokens)
    if exact:
        assert sequence.drawn == expected.drawn


class Steady:
    """A pace that always asks for the longest draft: tests must not hang on a clock."""

    def __init__(self, most: int) -> None:
        self.most = most

    def length(self, sequences: int) -> int:
        return self.most

    def learn(self, *figures: float) -> None:
        pass

    def idle(self, sequences: int) -> bool:
        return False
