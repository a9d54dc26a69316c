"""The engine: answers many requests at once, one pass of the model at a time.

A pass takes the new tokens of every sequence that has some: chunks of prompts, and for an answer
its last token with the drafts behind it. Whatever reaches the end of what is known gives logits,
from which the next token is drawn (writing.py).
"""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from qiusuo.engine.disk_prefix import DiskPrefix, model_mark
from qiusuo.engine.drafting import Drafter, NoDrafter, Pass
from qiusuo.engine.limits import Limits, few_queries
from qiusuo.engine.paged_cache import PagedCache, PagedGroup
from qiusuo.engine.pages import PagePool
from qiusuo.engine.report import Statistics
from qiusuo.engine.request import Request, RequestError, Sequence, check_tokens
from qiusuo.engine.scheduler import Scheduler, Work
from qiusuo.engine.writing import Writer
from qiusuo.model.cost import available_memory
from qiusuo.model.low_bit import is_low_bit
from qiusuo.model.mla import MultiHeadLatentAttention
from qiusuo.model.transformer import Transformer

# N tokens of a pass.

CACHE_SHARE = 0.3  # of the free memory, where no one says how much
SHORT_PROMPT = 256  # tokens; longer ones gain nothing side by side
FIXED_ROWS = 16  # of a product in the batch-invariant mode


class Engine:
    """Not for several threads at once: whoever drives ``step`` owns it. ``draft_model`` has a cache
    beside the model's, on the same pages and out of the same memory. ``cache``: what entries are
    kept in, "int8" or, with None, the model's type."""

    def __init__(
        self,
        model: Transformer,
        limits: Limits | None = None,
        drafter: Drafter | None = None,
        draft_model: Transformer | None = None,
        cache: str | None = None,
    ) -> None:
        self.kept_as = cache
        self.model, self.limits = model.eval(), limits or Limits()
        self.models = [model] if draft_model is None else [model, draft_model.eval()]
        weights = [one.model.embed_tokens.weight for one in self.models]
        self.device, config = weights[0].device, model.config
        size = self.limits.page_tokens
        self.page_bytes = sum(
            PagedCache.page_bytes(one.config, weight.dtype, size, cache)
            for one, weight in zip(self.models, weights, strict=True)
        )
        pages = self._cache_bytes(self.page_bytes) // self.page_bytes
        self.cache, *beside = (
            PagedCache(one.config, pages, weight.dtype, weight.device, size, cache)
            for one, weight in zip(self.models, weights, strict=True)
        )
        self.cache.beside = beside
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
        self.writer = Writer(model, self.scheduler, self.statistics)
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
        stored = "" if self.kept_as is None else f" of {self.kept_as}"
        return (
            f"cache: {taken / 1e6:,.1f} MB{stored} ({why}), {self.pool.count:,} pages of "
            f"{self.cache.page_tokens}: {tokens:,} tokens; longest context {self.capacity:,}{kept}"
        )

    def keep_on_disk(self, beside: str = "") -> None:
        """Find beginnings in ``limits.prefix_folder`` too, and keep them there; nothing without
        one. ``beside``: what a cache depends on beside the models, such as the tokenizer.
        RequestError for a folder that cannot be written."""
        limits = self.limits
        if limits.prefix_folder is None:
            return
        beside = f"{beside} invariant={limits.batch_invariant} cache={self.kept_as}"
        mark = model_mark(self.models, limits.page_tokens, beside)
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
        vocabulary, sampling = self.model.config.vocab_size, request.sampling
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_ids", sampling.stop_ids)):
            if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
                raise RequestError(f"{name}: token id {wrong[0]} is outside 0..{vocabulary - 1}")
        layers = range(self.model.config.num_hidden_layers)
        if request.keep_experts and not any(map(self.model.config.is_moe_layer, layers)):
            raise RequestError("keep_experts: this model has no experts")

    def cancel(self, sequence: Sequence) -> None:
        """Stop it where it is; its siblings go on."""
        if sequence.finish_reason is None:
            self._end(sequence, "cancelled")

    @property
    def version(self) -> int:
        """Of the weights: how often they were swapped."""
        return self.writer.version

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
        if state and is_low_bit(self.model):
            raise RequestError(
                "the model is quantised, and its weights are not swapped: load it with a dtype, "
                'such as "bfloat16"'
            )
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
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            sequence.swapped = bool(sequence.experts)
        self.writer.version += 1
        return self.version

    def _absorb(self) -> None:
        """What is derived from the weights for decoding; who changes weights otherwise than by
        ``swap_weights`` (an optimizer's step) calls that with nothing to swap."""
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
            touched += self.writer.write(done)
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
            if sequence.request.keep_experts:  # those of drafts that were right come last of all
                sequence.length = min(sequence.length, sequence.routed)
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
        """Single new tokens side by side, in groups of equally many drafts and of about equal
        length, since a group is padded to its longest; short prompts by those of equal length,
        which need none; other prompts one by one."""
        alike: dict[tuple[int, int, int], list[Work]] = defaultdict(list)
        for number, work in enumerate(plan):
            about = work.sequence.length.bit_length()
            if work.count > SHORT_PROMPT or (work.count > 1 and about > 0):
                about = -1 - number  # alone
            alike[work.count, len(work.drafts), about].append(work)
        batches = list(alike.values())
        groups = [group for works in batches for group in self._groups(works)]
        plan = [work for works in batches for work in works]
        lengths = [work.sequence.length for work in plan]
        tokens_N: list[int] = []
        positions_N: list[int] = []
        starts = []
        for work, length in zip(plan, lengths, strict=True):
            starts.append(len(tokens_N))
            tokens_N += work.tokens
            positions_N += range(length, length + len(tokens_N) - starts[-1])
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

    def _end(self, sequence: Sequence, reason: str) -> None:
        """Finish it between passes. Siblings that waited for its prompt read it themselves."""
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        heirs = [one for one in sequence.siblings if one.finish_reason is None]
        sequence.siblings = []
        if heirs:
            heirs[0].siblings = heirs[1:]
            self.scheduler.waiting.append(heirs[0])
