"""From a pass to tokens: draws them, checks drafts, lets forks part.

A drawn token depends on its logits, on the sequence's own history and on (seed, choice, position),
and on nothing else: not on neighbours, chunks, preemption or drafts. A draft is accepted where the
drawn token is the draft's (speculative sampling with a proposal of one token; arXiv:2211.17192), so
drafts save passes and change no answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.engine.drafting import Pass
from qiusuo.engine.report import Statistics
from qiusuo.engine.request import Sequence
from qiusuo.engine.sampler import BadLogits, Drawn, Row, draw, token_logprobs
from qiusuo.engine.scheduler import Scheduler
from qiusuo.model.transformer import Transformer

# R rows that want logits, D hidden, W vocabulary.

NONE: frozenset[int] = frozenset()

Drawing = tuple[Sequence, int, tuple[int, ...]]  # who draws, from which row, its drafts from there


class Writer:
    """``version``: of the weights, which every token carries."""

    def __init__(self, model: Transformer, scheduler: Scheduler, statistics: Statistics) -> None:
        self.model, self.scheduler, self.statistics = model, scheduler, statistics
        self.version = 0

    def write(self, done: Pass) -> list[Sequence]:
        """Draw a token wherever a sequence has reached its end, and on as long as drafts hold."""
        drawing = [place for place, work in enumerate(done.plan) if work.draws]
        touched: list[Sequence] = []
        chosen_NLK = None
        if any(work.sequence.request.keep_experts for work in done.plan):
            chosen_NLK = done.experts(0, len(done.hidden_ND))
        for place, work in enumerate(done.plan):
            work.sequence.length += work.count
            work.sequence.drafts = []
            self._keep_experts(done, place, chosen_NLK)
            if not self._read_prompt(done, place):
                touched += [work.sequence, *work.sequence.siblings]
        drawing = [place for place in drawing if done.plan[place].sequence.finish_reason is None]
        if not drawing:
            return touched
        rows = [done.last_row(place) + j for place in drawing for j in range(done.width(place))]
        logits_RW = self.model.logits(
            done.hidden_ND[torch.tensor(rows, device=done.hidden_ND.device)]
        )
        first_row = dict(zip(rows, range(len(rows)), strict=True))
        for place in drawing:
            touched += self._with_siblings(done.plan[place].sequence)
        going = [
            (sequence, first_row[done.last_row(place)], done.plan[place].drafts)
            for place in drawing
            for sequence in (done.plan[place].sequence, *done.plan[place].sequence.siblings)
        ]
        for place in drawing:
            done.plan[place].sequence.siblings = []
        while going:
            going = self._draw(going, logits_RW)
        for place in drawing:
            if done.plan[place].drafts:
                self._keep_experts(done, place, chosen_NLK)  # of those that were right
        return touched

    def _with_siblings(self, sequence: Sequence) -> list[Sequence]:
        """A sequence that has read its prompt, and those that were waiting for it to: they share
        its pages from now on."""
        if not sequence.siblings:
            return [sequence]
        sequence.siblings = [one for one in sequence.siblings if one.finish_reason is None]
        for sibling in sequence.siblings:
            self.scheduler.pool.hold(sequence.pages)
            sibling.pages, sibling.length = list(sequence.pages), sequence.length
            sibling.cached_tokens = sequence.length
            sibling.outdated = sequence.outdated
            sibling.prompt_drawn = sequence.prompt_drawn
            sibling.experts, sibling.loose = list(sequence.experts), sequence.loose
            sibling.routed = sequence.routed
            sibling.swapped = sequence.swapped
            self.scheduler.running.append(sibling)
        return [sequence, *sequence.siblings]

    def _draw(self, going: list[Drawing], logits_RW: Tensor) -> list[Drawing]:
        """A token for each (sequence, row, its drafts from here on); those whose draft was right
        go on with the next row."""
        going, rows = self._rows(going)
        if not going:
            return []
        index_R = torch.tensor([row for _, row, _ in going], device=logits_RW.device)
        drawn = draw(logits_RW[index_R], rows)
        right = []
        for (sequence, row, drafts), free in zip(going, drawn, strict=True):
            if sequence.finish_reason is not None:  # a listener of another has cancelled it
                continue
            chosen = free
            if sequence.forced:
                top = sequence.request.sampling.logprobs or 0
                (chosen,) = token_logprobs(logits_RW[row][None], [sequence.forced.pop(0)], top)
            if isinstance(chosen, BadLogits):
                self._fail(sequence, chosen.reason)
                continue
            self._append(sequence, chosen)
            if drafts:
                self.statistics.drafted += 1
                if chosen.token == drafts[0] and sequence.finish_reason is None:
                    self.statistics.accepted += 1
                    sequence.length += 1
                    right.append((sequence, row + 1, drafts[1:]))
        return right

    def _rows(self, going: list[Drawing]) -> tuple[list[Drawing], list[Row]]:
        """Without those whose constraint cannot go on: they have failed."""
        able, rows = [], []
        for drawing in going:
            try:
                rows.append(self._row(drawing[0]))
                able.append(drawing)
            except ValueError as error:
                self._fail(drawing[0], str(error))
        return able, rows

    def _row(self, sequence: Sequence) -> Row:
        request, answered = sequence.request, sequence.answered
        early = answered < request.sampling.min_tokens
        return Row(
            sampling=request.sampling,
            prompt=request.prompt,
            answer=sequence.answer if request.looks_back else (),
            position=answered,
            choice=sequence.choice,
            allowed_W=None if sequence.matcher is None else sequence.matcher.allowed(),
            banned=request.ends if early else NONE,
        )

    @staticmethod
    def _fail(sequence: Sequence, reason: str) -> None:
        for one in (sequence, *sequence.siblings):
            if one.finish_reason is None:
                one.error, one.finish_reason = reason, "error"

    def _append(self, sequence: Sequence, drawn: Drawn) -> None:
        request = sequence.request
        sequence.tokens.append(drawn.token)
        sequence.drawn.append(drawn)
        sequence.versions.append(self.version)
        self.statistics.drawn += 1
        if sequence.matcher is not None:
            sequence.matcher.advance(drawn.token)
        reason = "stop" if drawn.token in request.ends else None
        if sequence.on_token is not None:
            reason = sequence.on_token(sequence, drawn) or reason
            reason = sequence.finish_reason or reason  # it may have cancelled itself
        if reason is None and sequence.matcher is not None and sequence.matcher.finished:
            reason = "stop"
        if reason is None and sequence.answered >= sequence.room:
            reason = "length"
        sequence.finish_reason = reason

    def _read_prompt(self, done: Pass, place: int) -> bool:
        """The log probabilities of a prompt's tokens, if they are asked for; False if they are
        not numbers."""
        work, length = done.plan[place], done.lengths[place]
        sequence, prompt = work.sequence, work.sequence.request.prompt
        top = sequence.request.sampling.prompt_logprobs
        known = len(sequence.prompt_drawn)  # more than ``length`` if it was preempted
        targets = prompt[known + 1 : length + work.count + 1]
        if top is None or not targets:
            return True
        start = done.starts[place] + known - length
        logits_RW = self.model.logits(done.hidden_ND[start : start + len(targets)])
        for told in token_logprobs(logits_RW, targets, top):
            if isinstance(told, BadLogits):
                self._fail(sequence, told.reason)
                return False
            sequence.prompt_drawn.append(told)
        return True

    @staticmethod
    def _keep_experts(done: Pass, place: int, chosen_NLK: Tensor | None) -> None:
        """The routers' choices for the tokens that are in the cache now, each once."""
        sequence = done.plan[place].sequence
        if chosen_NLK is not None and sequence.request.keep_experts:
            # What was preempted is computed twice.
            first, stop = max(0, sequence.routed - done.lengths[place]), done.kept(place)
            if first < stop:
                start = done.starts[place]
                sequence.add_experts(chosen_NLK[start + first : start + stop])
