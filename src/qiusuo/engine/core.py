"""The engine: answers many requests at once, one pass of the model at a time.

A pass takes the new tokens of every sequence that has some: chunks of prompts, and for an answer
its last token with the drafts behind it. Whatever reaches the end of what is known gives logits,
from which the next token is drawn. A drawn token depends on its logits, on the sequence's own
history and on (seed, choice, position), and on nothing else: not on neighbours, chunks, preemption
or drafts. A draft is accepted where the drawn token is the draft's (speculative sampling with a
proposal of one token; arXiv:2211.17192), so drafts save passes and change no answer.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.engine.disk_prefix import DiskPrefix, model_mark
from qiusuo.engine.drafting import Drafter, NoDrafter, Pass
from qiusuo.engine.paged_cache import PAGE_TOKENS, PagedCache, PagedGroup
from qiusuo.engine.pages import PagePool
from qiusuo.engine.report import Statistics
from qiusuo.engine.request import Request, RequestError, Sequence, check_tokens
from qiusuo.engine.sampler import BadLogits, Drawn, Row, draw, token_logprobs
from qiusuo.engine.scheduler import Scheduler, Work
from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import available_memory
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.mla import MultiHeadLatentAttention
from qiusuo.model.transformer import Transformer

# N tokens of a pass, R rows that want logits, D hidden, W vocabulary.

STEP_TOKENS = 256
MAX_RUNNING = 64
Drawing = tuple[Sequence, int, tuple[int, ...]]  # who draws, from which row, its drafts from there
CACHE_SHARE = 0.3  # of the free memory, where no one says how much
PREFIX_BYTES = 4 << 30
FIXED_ROWS = 16
FEW_SHARED = 16  # queries for which a dense model's heads are rows of one product


@dataclass
class Limits:
    """``cache_bytes``: None takes a share of what is free. ``absorbed_below``: up to how many new
    tokens a sequence attends in the form for few queries; None: by the arithmetic of both.
    ``batch_invariant``: the same bits for a token whatever runs beside it and however its prompt
    is cut, in any precision, at a cost (benchmarks/invariance.py). ``prefix_folder``: beginnings
    are kept there too, in files of ``prefix_disk_bytes`` in all (``Engine.keep_on_disk``)."""

    cache_bytes: int | None = None
    page_tokens: int = PAGE_TOKENS
    step_tokens: int = STEP_TOKENS
    max_running: int = MAX_RUNNING
    prefix_cache: bool = True
    prefix_folder: Path | None = None
    prefix_disk_bytes: int = PREFIX_BYTES
    absorbed_below: int | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("page_tokens", "step_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prefix_folder is not None and not self.prefix_cache:
            raise ValueError("prefix_folder keeps what prefix_cache finds: do not switch that off")


class Engine:
    """Not for several threads at once: whoever drives ``step`` owns it. ``draft_model`` has a cache
    beside the model's, on the same pages and out of the same memory."""

    def __init__(
        self,
        model: Transformer,
        limits: Limits | None = None,
        drafter: Drafter | None = None,
        draft_model: Transformer | None = None,
    ) -> None:
        self.model, self.limits = model.eval(), limits or Limits()
        self.models = [model] if draft_model is None else [model, draft_model.eval()]
        weights = [one.model.embed_tokens.weight for one in self.models]
        self.device, config = weights[0].device, model.config
        size = self.limits.page_tokens
        self.page_bytes = sum(
            PagedCache.page_bytes(one.config, weight.dtype, size)
            for one, weight in zip(self.models, weights, strict=True)
        )
        pages = self._cache_bytes(self.page_bytes) // self.page_bytes
        self.cache, *self.cache.beside = (
            PagedCache(one.config, pages, weight.dtype, weight.device, size)
            for one, weight in zip(self.models, weights, strict=True)
        )
        self.pool = PagePool(pages)
        self.scheduler = Scheduler(
            self.cache, self.pool, self.limits.step_tokens, self.limits.max_running
        )
        below = self.limits.absorbed_below
        self.absorbed_below = few_queries(config) if below is None else below
        self.drafter: Drafter = drafter or NoDrafter()
        model.fix_rows(FIXED_ROWS if self.limits.batch_invariant else None)
        self._absorb()
        self.statistics = Statistics()
        self.version = 0
        self.arrivals = count()

    def _cache_bytes(self, page_bytes: int) -> int:
        """As told, or a share of what is free; never more than every request could fill."""
        size, config = self.limits.page_tokens, self.model.config
        context_pages = -(-config.max_position_embeddings // size)
        most = page_bytes * (context_pages + 1) * self.limits.max_running
        told = self.limits.cache_bytes
        if told is None:
            return max(page_bytes, min(most, int(available_memory() * CACHE_SHARE)))
        if told < page_bytes:
            raise RequestError(f"cache_bytes {told:,} is less than one page, {page_bytes:,}")
        return told

    @property
    def capacity(self) -> int:
        """Tokens of one sequence that the model and the cache have room for."""
        kept = self.pool.count * self.cache.page_tokens
        return min(self.model.config.max_position_embeddings, kept)

    def describe(self) -> str:
        """One line for people: what the cache takes and holds."""
        tokens, taken = self.pool.count * self.cache.page_tokens, self.pool.count * self.page_bytes
        why = "a share of the free memory" if self.limits.cache_bytes is None else "as told"
        disk = self.scheduler.disk
        kept = "" if disk is None else f", beginnings kept in {disk.folder}"
        return (
            f"cache: {taken / 1e6:,.1f} MB ({why}), {self.pool.count:,} pages of "
            f"{self.cache.page_tokens}: {tokens:,} tokens; longest context {self.capacity:,}{kept}"
        )

    def keep_on_disk(self, beside: str = "") -> None:
        """Find beginnings in ``limits.prefix_folder`` too, and keep them there; nothing without
        one. ``beside``: what a cache depends on beside the models, such as the tokenizer.
        RequestError for a folder that cannot be written."""
        limits = self.limits
        if limits.prefix_folder is None:
            return
        mark = model_mark(
            self.models, limits.page_tokens, f"{beside} invariant={limits.batch_invariant}"
        )
        folder, most = Path(limits.prefix_folder), limits.prefix_disk_bytes
        self.scheduler.disk = DiskPrefix(folder, most, mark, self.cache)

    # -- requests ---------------------------------------------------------------------------

    def submit(self, request: Request) -> list[Sequence]:
        """Queue a request: its ``n`` sequences. RequestError for what can never be answered."""
        self.check(request)
        room = min(request.sampling.max_tokens, self.capacity - len(request.prompt))
        arrival = next(self.arrivals)
        sequences = [
            Sequence(request, request.first_choice + i, room, arrival, list(request.prompt))
            for i in range(request.n)
        ]
        sequences[0].siblings = sequences[1:]
        self.scheduler.waiting.append(sequences[0])
        self.statistics.prompt_tokens += len(request.prompt)
        return sequences

    def check(self, request: Request, what: str = "the prompt") -> None:
        """RequestError for what can never be answered."""
        prompt = request.prompt
        check_tokens(self.model.config, prompt, what)
        if len(prompt) >= self.capacity:
            context = self.model.config.max_position_embeddings
            limit = "context" if self.capacity == context else "cache"
            raise RequestError(
                f"{what} has {len(prompt)} tokens; the {limit} holds {self.capacity} and one must "
                "be free for the answer"
            )
        layers = range(self.model.config.num_hidden_layers)
        if request.keep_experts and not any(map(self.model.config.is_moe_layer, layers)):
            raise RequestError("keep_experts: this model has no experts")

    def cancel(self, sequence: Sequence) -> None:
        """Stop it where it is; its siblings go on."""
        if sequence.finish_reason is None:
            self._end(sequence, "cancelled")

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    # -- weights ----------------------------------------------------------------------------

    @torch.no_grad()
    def swap_weights(self, state: dict[str, Tensor]) -> int:
        """Put other weights into the model where it stands; their version, which answer tokens
        drawn from now on carry. Answers under way go on with what the cache holds of them; new
        requests find nothing in it."""
        own = self.model.state_dict()
        for name, tensor in state.items():  # all or none
            if name not in own:
                raise RequestError(f"the model has no {name}")
            if tensor.shape != own[name].shape:
                shapes = f"{list(own[name].shape)}, not {list(tensor.shape)}"
                raise RequestError(f"{name} must have the shape {shapes}")
        for name, tensor in state.items():
            own[name].copy_(tensor)
        self._absorb()
        self.pool.forget()
        self.scheduler.disk = None  # its mark was another model's
        for sequence in self.scheduler.running:
            sequence.outdated = True
        self.version += 1
        return self.version

    def _absorb(self) -> None:
        """What is derived from the weights for decoding."""
        for model in self.models:
            for block in (*model.model.main_blocks, *model.model.mtp_blocks):
                if isinstance(block.self_attn, MultiHeadLatentAttention):
                    block.self_attn.absorb()

    # -- one pass ---------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """One pass; the sequences that got tokens, or ended. Nothing where all is idle."""
        touched = self._expire()
        plan = self.scheduler.plan()
        self.statistics.preempted = self.scheduler.preempted
        self.statistics.cached_tokens = self.scheduler.found
        self.statistics.disk_tokens = self.scheduler.from_disk
        if not plan:
            return touched
        began = time.perf_counter()
        done = self._forward(plan)
        try:
            touched += self._answer(done)
            done.seconds = time.perf_counter() - began
            self.statistics.count(done)
            self.drafter.observe(done)
            # Only now: a page also holds what the drafter keeps.
            for work, before in zip(done.plan, done.lengths, strict=True):
                if self.limits.prefix_cache:
                    self.scheduler.publish(work.sequence, before)
        except BaseException:  # of a listener, or a key pressed: everyone else goes on
            self._mend()
            raise
        for sequence in touched:
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
        return touched

    def _mend(self) -> None:
        """After a pass that broke off while its tokens were given out: those that got none compute
        their last known token anew."""
        for sequence in list(self.scheduler.running):
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
            sequence.length = min(sequence.length, len(sequence.tokens) - 1)
            sequence.drafts = []

    def _expire(self) -> list[Sequence]:
        now = time.monotonic()
        late = [
            one
            for sequence in (*self.scheduler.running, *self.scheduler.waiting)
            if (deadline := sequence.request.deadline) is not None and deadline <= now
            for one in (*sequence.siblings, sequence)
            if one.finish_reason is None
        ]
        for sequence in late:
            self._end(sequence, "deadline")
        return late

    def _forward(self, plan: list[Work]) -> Pass:
        """Single new tokens side by side, in groups of equally many drafts; prompts one by one."""
        answers: dict[int, list[Work]] = defaultdict(list)
        for work in plan:
            if work.count == 1:
                answers[len(work.drafts)].append(work)
        batches = [*answers.values(), *([work] for work in plan if work.count > 1)]
        groups = [group for works in batches for group in self._groups(works)]
        plan = [work for works in batches for work in works]
        lengths = [work.sequence.length for work in plan]
        tokens_N: list[int] = []
        positions_N: list[int] = []
        starts = []
        for work, length in zip(plan, lengths, strict=True):
            starts.append(len(tokens_N))
            tokens_N += work.tokens
            positions_N += range(length, length + len(work.tokens))
        tokens_1N = torch.tensor([tokens_N], device=self.device)
        positions_1N = torch.tensor([positions_N], device=self.device)
        hidden = self.model(tokens_1N, positions_1N, groups=groups)
        self.statistics.passes += 1
        self.statistics.tokens += len(tokens_N)
        return Pass(plan, lengths, starts, hidden.x_BTD[0], hidden.routings)

    def _groups(self, works: list[Work]) -> list[PagedGroup]:
        sequences, tokens = [work.sequence for work in works], len(works[0].tokens)
        if self.limits.batch_invariant:
            return self.cache.one_by_one(sequences, tokens)
        return [self.cache.group(sequences, tokens, tokens <= self.absorbed_below)]

    # -- from logits to tokens --------------------------------------------------------------

    def _answer(self, done: Pass) -> list[Sequence]:
        """Draw a token wherever a sequence has reached its end, and on as long as drafts hold."""
        drawing = [place for place, work in enumerate(done.plan) if work.draws]
        touched: list[Sequence] = []
        for place, work in enumerate(done.plan):
            work.sequence.length += work.count
            work.sequence.drafts = []
            self._keep_experts(done, place)
            if not self._read_prompt(done, place):
                touched += [work.sequence, *work.sequence.siblings]
        drawing = [place for place in drawing if done.plan[place].sequence.finish_reason is None]
        if not drawing:
            return touched
        rows = [done.last_row(place) + j for place in drawing for j in range(done.width(place))]
        logits_RW = self.model.logits(done.hidden_ND[torch.tensor(rows, device=self.device)])
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
            self._keep_experts(done, place)  # of drafts that were right
        return touched

    def _with_siblings(self, sequence: Sequence) -> list[Sequence]:
        """A sequence that has read its prompt, and those that were waiting for it to: they share
        its pages from now on."""
        sequence.siblings = [one for one in sequence.siblings if one.finish_reason is None]
        for sibling in sequence.siblings:
            self.pool.hold(sequence.pages)
            sibling.pages, sibling.length = list(sequence.pages), sequence.length
            sibling.cached_tokens = sequence.length
            sibling.outdated = sequence.outdated
            sibling.prompt_drawn, sibling.experts = sequence.prompt_drawn, list(sequence.experts)
            self.scheduler.running.append(sibling)
        return [sequence, *sequence.siblings]

    def _draw(self, going: list[Drawing], logits_RW: Tensor) -> list[Drawing]:
        """A token for each (sequence, row, its drafts from here on); those whose draft was right
        go on with the next row."""
        going, rows = self._rows(going)
        if not going:
            return []
        index_R = torch.tensor([row for _, row, _ in going], device=self.device)
        drawn = draw(logits_RW[index_R], rows)
        right = []
        for (sequence, row, drafts), free in zip(going, drawn, strict=True):
            if sequence.finish_reason is not None:  # a listener of another has cancelled it
                continue
            chosen = free
            if sequence.forced:
                (chosen,) = token_logprobs(logits_RW[row][None], [sequence.forced.pop(0)], 0)
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
        sampling, request = sequence.request.sampling, sequence.request
        early = sequence.answered < sampling.min_tokens
        return Row(
            sampling=sampling,
            prompt=request.prompt,
            answer=sequence.answer,
            position=sequence.answered,
            choice=sequence.choice,
            allowed_W=None if sequence.matcher is None else sequence.matcher.allowed(),
            banned=self._ends(request) if early else frozenset(),
        )

    @staticmethod
    def _ends(request: Request) -> frozenset[int]:
        own = frozenset() if request.sampling.ignore_eos else request.end_ids
        return own | request.sampling.stop_ids

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
        reason = "stop" if drawn.token in self._ends(request) else None
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

    def _keep_experts(self, done: Pass, place: int) -> None:
        """The routers' choices for the tokens that are in the cache now, each once."""
        sequence = done.plan[place].sequence
        if sequence.request.keep_experts:
            known = sum(map(len, sequence.experts))  # what was preempted is computed twice
            first, stop = max(0, known - done.lengths[place]), done.kept(place)
            if first < stop:
                start = done.starts[place]
                sequence.experts.append(done.experts(start + first, start + stop))

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Finish it between passes. Siblings that waited for its prompt read it themselves."""
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        heirs = [one for one in sequence.siblings if one.finish_reason is None]
        sequence.siblings = []
        if heirs:
            heirs[0].siblings = heirs[1:]
            self.scheduler.waiting.append(heirs[0])


def few_queries(config: ModelConfig) -> int:
    """Up to how many new tokens the absorbed form takes less arithmetic than the expanded one.

    For each key seen and each head: absorbed, a query costs 2C + R products (scores with latent
    and rope key, values from the latent); expanded, N + R + V, and the key itself C(N + V)."""
    if not isinstance(config, DeepseekConfig):
        return FEW_SHARED
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    saved = 2 * latent - nope - value
    return max(1, latent * (nope + value) // saved) if saved > 0 else STEP_TOKENS
