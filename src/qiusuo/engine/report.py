"""What the engine has done, in figures: what drafts bring, and what they cost.

A draft pays by tokens that come out of a pass, and costs rows that go in: in a mixture of experts
every row touches experts of its own, which must be read from memory. So passes that only write
answers are counted in two sorts, without and with drafts, and can be held side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qiusuo.engine.drafting import Pass

# L MoE layers, E experts, K chosen for a row.


@dataclass
class Decoding:
    """Passes of one sort. ``turns``: sequences in them; ``rows``: tokens computed, drafts too;
    ``tokens``: of answers that came out; ``experts``: distinct ones in each MoE layer, all added
    up, and ``layers`` the MoE layers they were in."""

    passes: int = 0
    turns: int = 0
    rows: int = 0
    tokens: int = 0
    experts: int = 0
    layers: int = 0

    @property
    def tokens_per_turn(self) -> float | None:
        """Tokens of an answer from one pass, on average."""
        return self.tokens / self.turns if self.turns else None

    @property
    def experts_touched(self) -> float | None:
        """Distinct experts of a MoE layer in one pass, on average."""
        return self.experts / self.layers if self.layers else None

    def count(self, done: Pass) -> None:
        self.passes += 1
        self.turns += len(done.plan)
        self.rows += len(done.hidden_ND)
        self.tokens += sum(max(1, done.kept(place)) for place in range(len(done.plan)))
        if done.routings:
            chosen_LX = torch.stack([r.indices_MK.flatten() for r in done.routings.values()])
            experts = next(iter(done.routings.values())).scores_ME.shape[-1]
            touched_LE = torch.zeros(len(chosen_LX), experts, dtype=torch.bool)
            touched_LE = touched_LE.to(chosen_LX.device).scatter_(1, chosen_LX.long(), True)
            self.experts += int(touched_LE.sum())
            self.layers += len(chosen_LX)

    def told(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "rows_per_pass": self.rows / self.passes if self.passes else None,
            "tokens_per_pass_of_an_answer": self.tokens_per_turn,
            "experts_touched_per_layer": self.experts_touched,
        }


@dataclass
class Statistics:
    """Since the engine began. ``tokens``: computed in passes, drafts too. ``drafted`` and
    ``accepted``: draft tokens tried, and taken. ``cached_tokens``: found in the cache whenever a
    sequence began or went on; ``disk_tokens`` of them on disk. ``plain`` and ``guessed``: passes
    of answers alone, without drafts and with some."""

    passes: int = 0
    tokens: int = 0
    drawn: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    cached_tokens: int = 0
    disk_tokens: int = 0
    prompt_tokens: int = 0
    plain: Decoding = field(default_factory=Decoding)
    guessed: Decoding = field(default_factory=Decoding)

    @property
    def acceptance(self) -> float | None:
        """The share of the drafts tried that were right. A draft behind a wrong one is not."""
        return self.accepted / self.drafted if self.drafted else None

    def count(self, done: Pass) -> None:
        """A pass whose tokens have been drawn."""
        if all(work.count == 1 for work in done.plan):
            drafts = any(work.drafts for work in done.plan)
            (self.guessed if drafts else self.plain).count(done)

    def told(self) -> dict[str, Any]:
        """All of it, as a table that can be written down."""
        counted = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        sorts = {"without_drafts": self.plain.told(), "with_drafts": self.guessed.told()}
        return counted | {"acceptance": self.acceptance} | sorts
