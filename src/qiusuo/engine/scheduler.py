"""Who computes what in the next pass.

A pass has room for so many tokens. Every answer that is being written gets one (and its drafts);
what is left is shared out among the prompts, in chunks, so that a long prompt stops neither the
answers of others nor their prompts.
When pages run out, the last in rank gives its own back and waits; the pages it had filled stay
findable as long as no one needs their place, so it mostly goes on from where it stood. The first
in rank is never preempted and always fits, so everything ends.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from qiusuo.engine.disk_prefix import DiskPrefix
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.pages import PagePool, first_key, next_key
from qiusuo.engine.request import Sequence

PATIENCE = 256  # requests


@dataclass(frozen=True)
class Work:
    """``count`` known tokens of a sequence from its ``length`` on, and then its drafts."""

    sequence: Sequence
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        start = self.sequence.length
        return [*self.sequence.tokens[start : start + self.count], *self.drafts]

    @property
    def draws(self) -> bool:
        """Whether it reaches the end of what is known, so that a token is to be drawn."""
        return self.count == self.sequence.pending


class Scheduler:
    def __init__(
        self, cache: PagedCache, pool: PagePool, step_tokens: int, max_running: int
    ) -> None:
        self.cache, self.pool = cache, pool
        self.step_tokens, self.max_running = step_tokens, max_running
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.disk: DiskPrefix | None = None
        self.preempted = self.found = 0  # times, and tokens in the cache, so far
        self.from_disk = 0  # tokens

    def plan(self) -> list[Work]:
        """Work for the next pass; admits, preempts, and gives every sequence in it its pages."""
        while self._admit():
            pass
        self.running.sort(key=lambda sequence: sequence.rank)
        shares, preempted = self._shares(), self.preempted
        plan: list[Work] = []
        for sequence in list(self.running):
            # Preempted by one before it; looking through all of them is slow where they are many.
            if self.preempted > preempted and sequence not in self.running:
                continue
            if sequence.pending > 1:
                work = Work(sequence, shares[sequence])
            else:
                work = Work(sequence, 1, self._affordable(sequence) if sequence.drafts else ())
            if work.count and self._make_room(sequence, work.count + len(work.drafts)):
                plan.append(work)
        return plan

    def _shares(self) -> dict[Sequence, int]:
        """Tokens of each prompt in the next pass: what answers leave is shared out evenly, so that
        a short prompt does not wait for a long one; what is left of a share goes by rank."""
        prompts = [sequence for sequence in self.running if sequence.pending > 1]
        if not prompts:
            return {}
        answering = sum(1 + len(s.drafts) for s in self.running if s.pending == 1)
        left = max(self.step_tokens - answering, self.cache.page_tokens)
        shares: dict[Sequence, int] = {}
        for place, sequence in enumerate(prompts):
            fair = max(self.cache.page_tokens, left // (len(prompts) - place))
            shares[sequence] = min(sequence.pending, fair, left)
            left -= shares[sequence]
        for sequence in prompts:
            more = min(sequence.pending - shares[sequence], left)
            shares[sequence] += more
            left -= more
        return shares

    def _affordable(self, sequence: Sequence) -> tuple[int, ...]:
        """Its drafts, if there are pages for them: no one is preempted for a guess."""
        end = sequence.length + 1 + len(sequence.drafts)
        missing = self.cache.pages_for(end) - len(sequence.pages)
        return tuple(sequence.drafts) if missing <= self.pool.available else ()

    def _admit(self) -> bool:
        """Let the next one begin. One of lower priority gives way; others are not disturbed."""
        if not self.waiting:
            return False
        chosen = self._next()
        while not self._fits(chosen):
            last = max(self.running, key=lambda s: s.rank, default=None)
            if last is None or last.request.priority >= chosen.request.priority:
                return False
            self.preempt(last)
        chosen.refused = None
        self.found += chosen.length
        self._recall_experts(chosen)
        self.waiting.remove(chosen)
        self.running.append(chosen)
        return True

    def _next(self) -> Sequence:
        """By priority, then from the namespace that has least running; but whoever has seen
        ``PATIENCE`` others arrive after it goes first, lest new namespaces pass it by for ever."""
        busy = Counter(sequence.request.namespace for sequence in self.running)
        late = max(sequence.arrival for sequence in self.waiting) - PATIENCE

        def rank(sequence: Sequence) -> tuple[int, int, int, int]:
            running = -1 if sequence.arrival < late else busy[sequence.request.namespace]
            return -sequence.request.priority, running, sequence.arrival, sequence.choice

        return min(self.waiting, key=rank)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there is a place and pages for all of its prompt, beside what those that run
        still need for theirs; it then holds the pages with its beginning."""
        if len(self.running) >= self.max_running:
            return False
        free = self.pool.available - sum(map(self._missing_pages, self.running))
        wanted = self.cache.pages_for(len(sequence.tokens) + 1)
        if wanted > free and not self._shares_enough(sequence, wanted - free, free):
            return False
        self._find_prefix(sequence)
        return True

    def _shares_enough(self, sequence: Sequence, missing: int, free: int) -> bool:
        """Whether those that run hold so many pages of its beginning that ``missing`` more are not
        needed; pages that no one holds cost as much as empty ones. A request that waits is asked at
        every pass: its beginning is gone through again only when more pages are free than the last
        time, or the first page that was missed is there."""
        if sequence.refused is not None:
            before, place = sequence.refused
            if free <= before and not self._shared(sequence, place):
                return False
        shared = 0
        while shared < missing and self._shared(sequence, shared):
            shared += 1
        sequence.refused = free, shared
        return shared == missing

    def _shared(self, sequence: Sequence, place: int) -> bool:
        """Whether a page of its beginning could be taken over from someone who runs."""
        if place >= self._findable(sequence) or not self._experts_known(sequence, place):
            return False
        return self.pool.holds(self._key(sequence, place))

    def _missing_pages(self, sequence: Sequence) -> int:
        return max(0, self.cache.pages_for(len(sequence.tokens) + 1) - len(sequence.pages))

    def _find_prefix(self, sequence: Sequence) -> None:
        """Take over the pages that hold the beginning already; one token at least is computed."""
        size = self.cache.page_tokens
        for place in range(self._findable(sequence)):
            key = self._key(sequence, place)
            if not self._experts_known(sequence, place):
                break
            page = self.pool.find(key)
            if page is None:
                page = self._from_disk(key)
            elif self.disk is not None:
                self.disk.keep(key, page)
            if page is None:
                break
            sequence.pages.append(page)
        sequence.length = len(sequence.pages) * size
        if not sequence.answered:
            sequence.cached_tokens = sequence.length

    def _findable(self, sequence: Sequence) -> int:
        """Full pages of its beginning. None, where the states of every token of the prompt are
        wanted, and not only what the cache holds of them."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return 0
        return (len(sequence.tokens) - 1) // self.cache.page_tokens

    def _experts_known(self, sequence: Sequence, place: int) -> bool:
        """Whether a page can be taken over without losing what the routers chose, if that is
        wanted: it was told before a preemption, or is remembered with the page."""
        if not sequence.request.keep_experts:
            return True
        told = sequence.routed >= (place + 1) * self.cache.page_tokens
        return told or self.pool.remembers(self._key(sequence, place))

    def _recall_experts(self, sequence: Sequence) -> None:
        """The choices remembered with the pages that it has just taken over."""
        if not sequence.request.keep_experts:
            return
        size = self.cache.page_tokens
        for place in range(sequence.routed // size, len(sequence.pages)):
            experts_sLK = self.pool.experts_of[sequence.pages[place]]
            sequence.add_experts(experts_sLK[sequence.routed - place * size :])

    def _from_disk(self, key: bytes) -> int | None:
        """Hold a page for what another run left on disk, and let others find it."""
        if self.disk is None or not self.pool.available:
            return None
        data = self.disk.read(key)
        if data is None:
            return None
        (page,) = self.pool.take(1)
        self.disk.restore(page, data)
        self.pool.publish(page, key)
        self.from_disk += self.cache.page_tokens
        return page

    def _key(self, sequence: Sequence, place: int) -> bytes:
        """The key of a full page of this sequence."""
        size = self.cache.page_tokens
        while len(sequence.keys) <= place:
            start = len(sequence.keys) * size
            before = sequence.keys[-1] if start else first_key(sequence.request.namespace)
            sequence.keys.append(next_key(before, sequence.tokens[start : start + size]))
        return sequence.keys[place]

    def publish(self, sequence: Sequence, since: int) -> None:
        """Let others find the pages that were filled since the cache held ``since`` tokens."""
        if sequence.outdated or sequence.finish_reason == "error":
            return
        size = self.cache.page_tokens
        for place in range(since // size, sequence.length // size):
            key = self._key(sequence, place)
            self.pool.publish(sequence.pages[place], key)
            if sequence.request.keep_experts and not sequence.swapped:
                self.pool.remember(key, sequence.experts_between(place * size, (place + 1) * size))
            if self.disk is not None:
                self.disk.keep(key, sequence.pages[place])

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for ``count`` more tokens; False if only others of higher rank could give them."""
        place, held = sequence.length // self.cache.page_tokens, len(sequence.pages)
        missing = max(0, self.cache.pages_for(sequence.length + count) - held)
        # A page that a fork has in common is copied before one of them writes on.
        copied = place < held and self.pool.shared(sequence.pages[place])
        if not missing and not copied:
            return True
        while missing + copied > self.pool.available:
            victim = max(self.running, key=lambda s: s.rank)
            self.preempt(victim)
            if victim is sequence:
                return False
            copied = copied and self.pool.shared(sequence.pages[place])
        if copied:
            (page,) = self.pool.take(1)
            self.cache.copy_page(sequence.pages[place], page)
            self.pool.release([sequence.pages[place]])
            sequence.pages[place] = page
        new = self.pool.take(missing)
        self.cache.clear_pages(new)
        sequence.pages += new
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Give back its pages; it waits, and its tokens so far are a prompt when it goes on."""
        self.preempted += 1
        self.drop_pages(sequence)
        self.running.remove(sequence)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It is finished, wherever it was."""
        self.drop_pages(sequence)
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def drop_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.length, sequence.drafts = [], 0, []
        sequence.outdated = False
