"""The models that are served, each with an engine of its own that runs as long as it is here.

Loading takes seconds to minutes and must not stop the others: it is done in a thread, and until it
is done the model's name is known and answers 503.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.data.errors import DataError
from qiusuo.data.tool_format import ToolFormat
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.loading import load
from qiusuo.engine.running import RunningEngine
from qiusuo.engine.tool_calls import format_of
from qiusuo.model.checks import ConfigError
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import read_recipe
from qiusuo.server.api.errors import ApiError
from qiusuo.server.settings import Settings

T = TypeVar("T")
log = logging.getLogger("qiusuo.server")

OLD_NAMES = ("deepseek-chat", "deepseek-reasoner")  # clients have them built in
REFUSALS = (CheckpointError, ConfigError, DataError, RunError, OSError, ValueError)


@dataclass(frozen=True)
class ServedModel:
    """``kind``: "chat", or "text" for a model that only goes on with a text: one without a
    template, or from a run that never saw a conversation. ``thinks``: its template can open a
    thought."""

    name: str
    lm: LanguageModel
    engine: RunningEngine
    created: int
    source: str
    kind: str
    thinks: bool
    tools: ToolFormat | None

    @property
    def context(self) -> int:
        return self.lm.engine.capacity


@dataclass
class Loading:
    """A model that is on its way: ``done`` of ``total`` bytes, or why it will not come."""

    name: str
    source: str
    done: int = 0
    total: int = 0
    error: str | None = None


class Registry:
    """Belongs to one event loop. ``loader`` opens what a person names; see ``load``."""

    def __init__(self, settings: Settings, loader: Callable[..., LanguageModel] = load) -> None:
        self.settings, self._load = settings, loader
        self.models: dict[str, ServedModel] = {}
        self.loading: dict[str, Loading] = {}
        self._order = asyncio.Lock()

    def get(self, name: str) -> ServedModel:
        """By its name; "deepseek-chat" and "deepseek-reasoner" are the first model here. ApiError
        400 where there is none, 503 while it is loading."""
        if name in self.models:
            return self.models[name]
        coming = self.loading.get(name)
        if coming is not None and coming.error is None:
            raise ApiError(503, f"the model {name} is being loaded; try again in a moment")
        if name in OLD_NAMES and self.models:
            return next(iter(self.models.values()))
        known = ", ".join(self.models) or "none yet"
        raise ApiError(400, f"Model Not Exist: {name!r}; there are: {known}")

    def free_name(self, source: str, name: str | None = None) -> str:
        """What to call it. ApiError 400 where that name is taken."""
        chosen = name or plain_name(source)
        coming = self.loading.get(chosen)
        if chosen in self.models or (coming is not None and coming.error is None):
            raise ApiError(400, f"there is a model named {chosen} already: give it another name")
        return chosen

    def announce(self, source: str, name: str | None = None) -> str:
        """Say that it is coming, before ``add`` begins; its name."""
        chosen = self.free_name(source, name)
        self.loading[chosen] = Loading(chosen, source)
        return chosen

    async def add(self, source: str | Path, name: str | None = None) -> ServedModel:
        """Load a model and start its engine; one after another, as each wants the free memory.
        ApiError 400 with the reason for what cannot be loaded."""
        chosen = self.announce(str(source), name)
        return await self.bring(chosen)

    async def bring(self, name: str) -> ServedModel:
        """Load the announced model ``name``."""
        coming = self.loading[name]

        def progress(done: int, total: int) -> None:
            coming.done, coming.total = done, total

        try:
            async with self._order:
                served = await in_daemon(self._open, coming, progress)
                await asyncio.to_thread(served.engine.start)
        except Exception as error:  # whatever it is, the name must not be on its way for ever
            coming.error = str(error) or type(error).__name__
            log.warning(
                "%s cannot be served: %s",
                name,
                coming.error,
                exc_info=None if isinstance(error, REFUSALS) else error,
            )
            raise ApiError(400, f"{coming.source} cannot be served: {coming.error}") from error
        self.models[name] = served
        del self.loading[name]
        log.info("%s is served; %s", name, served.lm.describe())
        return served

    def adopt(self, name: str, lm: LanguageModel, source: str = "") -> ServedModel:
        """Serve a model that is in memory already. Its engine is started."""
        served = _served(name, lm, source)
        served.engine.start()
        self.models[name] = served
        return served

    async def remove(self, name: str) -> None:
        """End what it is answering, and forget it."""
        served = self.get(name)
        self.models.pop(served.name)
        await asyncio.to_thread(served.engine.stop)

    async def stop(self) -> None:
        for name in list(self.models):
            await self.remove(name)

    def _open(self, coming: Loading, progress: Callable[[int, int], None]) -> ServedModel:
        settings = self.settings
        lm = self._load(
            coming.source,
            dtype=settings.dtype,
            quantize=settings.quantize,
            cache=settings.cache,
            device=settings.device,
            progress=progress,
            limits=settings.limits,
            draft=settings.draft,
        )
        _ = lm.engine  # takes its memory now, and not with the first question
        return _served(coming.name, lm, coming.source)


async def in_daemon(work: Callable[..., T], *words: Any) -> T:
    """``asyncio.to_thread`` for what takes long: a server that is asked to stop does not wait."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(cast(T, result))
        else:
            done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work(*words)
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop has ended, and nobody asks any more
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name="qiusuo-load", daemon=True).start()
    return await done


def run_of(source: str) -> Path | None:
    """The folder of the run whose model this is; None for one that is no run's."""
    path = Path(source)
    run = path.parent if path.name == "model" else path
    return run if source and (run / "recipe.toml").is_file() else None


def plain_name(source: str) -> str:
    """The last word of a path or a reference."""
    path = run_of(source) or Path(source)
    return (path.resolve().name if path.exists() else path.name).removesuffix(".gguf")


def _served(name: str, lm: LanguageModel, source: str) -> ServedModel:
    tokenizer = lm.tokenizer
    template = None if tokenizer is None else tokenizer.chat_template
    talks = template is not None and not _only_read(source)
    return ServedModel(
        name=name,
        lm=lm,
        engine=RunningEngine(lm),
        created=int(time.time()),
        source=source,
        kind="chat" if talks else "text",
        thinks=template is not None and "think" in template,
        tools=None if tokenizer is None else format_of(tokenizer),
    )


def _only_read(source: str) -> bool:
    """Whether it is the model of a run that was pre-trained and nothing else: it has a template
    for the stages to come, and knows no conversations."""
    run = run_of(source)
    if run is None:
        return False
    stages = read_recipe(run).get("stages", [])
    return all(stage.get("kind", stage.get("name")) == "pretrain" for stage in stages)
