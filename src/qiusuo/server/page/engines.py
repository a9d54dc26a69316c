"""The engines' state in figures, for who runs them: queues, caches, speeds, drafts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from qiusuo.engine.request import EngineError
from qiusuo.server.page.live import event
from qiusuo.server.registry import Registry, ServedModel

LOOK_SECONDS = 1.0
SOONEST, LATEST = 0.5, 5.0  # seconds between two looks that make a speed


class Engines:
    """Belongs to one event loop. A speed is that between two looks, so the first has none."""

    def __init__(self, registry: Registry, ending: Callable[[], bool]) -> None:
        self._registry, self._ending = registry, ending
        self._before: dict[ServedModel, tuple[float, int, int]] = {}
        self._speeds: dict[ServedModel, tuple[float | None, float | None]] = {}

    def look(self) -> list[dict[str, Any]]:
        """Each model that is served, and those on their way."""
        registry = self._registry
        served = list(registry.models.values())
        for gone in set(self._before) - set(served):
            del self._before[gone]
            self._speeds.pop(gone, None)
        coming = [
            {
                "id": one.name,
                "source": one.source,
                "state": "loading" if one.error is None else "failed",
                "error": one.error,
                "done": one.done,
                "total": one.total,
            }
            for one in registry.loading.values()
        ]
        return [self._told(model) for model in served] + coming

    async def stream(self) -> AsyncIterator[bytes]:
        """An `engine` event each second, until the server ends or nobody reads."""
        while not self._ending():
            yield event("engine", self.look())
            await asyncio.sleep(LOOK_SECONDS)

    def _told(self, model: ServedModel) -> dict[str, Any]:
        told: dict[str, Any] = {"id": model.name, "source": model.source, "created": model.created}
        try:
            load, done = model.engine.load(), model.engine.statistics
        except EngineError as error:
            return told | {"state": "failed", "error": str(error)}
        computed, written = self._speed(model, done.tokens, done.drawn)
        return told | {
            "state": "serving",
            "error": None,
            "running": load.running,
            "waiting": load.waiting,
            "cache_tokens_used": load.cache_tokens_used,
            "cache_tokens": load.cache_tokens,
            "capacity": load.capacity,
            "tokens_per_second": written,
            "computed_per_second": computed,
            "prompt_tokens": done.prompt_tokens,
            "cached_tokens": done.cached_tokens,
            "disk_tokens": done.disk_tokens,
            "written_tokens": done.drawn,
            "computed_tokens": done.tokens,
            "passes": done.passes,
            "preempted": done.preempted,
            "drafting": model.lm.drafting,
            "drafted": done.drafted,
            "accepted": done.accepted,
            "acceptance": done.acceptance,
        }

    def _speed(
        self, model: ServedModel, computed: int, written: int
    ) -> tuple[float | None, float | None]:
        """Tokens computed and written a second since the last look that is neither too near nor
        too long ago."""
        now = time.monotonic()
        before = self._before.get(model)
        passed = LATEST + 1 if before is None else now - before[0]
        if passed < SOONEST:
            return self._speeds.get(model, (None, None))
        self._before[model] = (now, computed, written)
        speeds: tuple[float | None, float | None] = (None, None)
        if before is not None and passed <= LATEST:
            speeds = (computed - before[1]) / passed, (written - before[2]) / passed
        self._speeds[model] = speeds
        return speeds
