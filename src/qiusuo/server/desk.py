"""The one way from a question, whichever API it came through, to the engine and through the ledger.

    admitted (model, rates, balance) -> reserved -> engine -> streamed -> settled

What an answer may cost at most is reserved before it begins; what it did cost is booked when it
ends, however it ends (job.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from qiusuo.data.errors import DataError
from qiusuo.engine.asking import Asked, prepare_chat, prepare_text
from qiusuo.engine.request import RequestError
from qiusuo.server.api.errors import ApiError
from qiusuo.server.job import Job
from qiusuo.server.ledger import InsufficientBalance, KeyRevoked, Ledger, OverBudget
from qiusuo.server.metrics import Metrics
from qiusuo.server.prices import Price, PriceBook, most
from qiusuo.server.question import Caller, ChatQuestion, TextQuestion
from qiusuo.server.rates import RateExceeded, Rates
from qiusuo.server.registry import Registry, ServedModel
from qiusuo.server.settings import Settings
from qiusuo.server.settlement import Used

COOKS = 4  # threads that prepare questions, apart from those that the ledger takes
log = logging.getLogger("qiusuo.server")


class Desk:
    """Belongs to one event loop. ``jobs``: under way, by request id."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        ledger: Ledger,
        prices: PriceBook,
        rates: Rates,
        metrics: Metrics,
    ) -> None:
        self.settings, self.registry, self.metrics = settings, registry, metrics
        self.ledger, self.prices, self.rates = ledger, prices, rates
        self.jobs: dict[str, Job] = {}
        self.closing = False
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._owed: dict[str, Used | None] = {}  # what could not be booked; None: given back
        self._cooks = ThreadPoolExecutor(COOKS, "qiusuo-prepare")
        self._begun: Counter[str] = Counter()  # questions that are no jobs yet, by model

    async def ask(
        self,
        caller: Caller,
        question: ChatQuestion | TextQuestion,
        request_id: str | None = None,
        endpoint: str = "",
    ) -> Job:
        """A job that is under way. ApiError with the status that DeepSeek gives: 400 for what
        cannot be answered, 402 without the money, 429 above a limit, 503 when all is full."""
        if self.closing:
            raise ApiError(503, "the server is shutting down")
        request_id = request_id or new_request_id()
        model = self._model(caller, question.model)
        under_way = sum(job.model is model for job in self.jobs.values())
        if under_way + self._begun[model.name] >= self.settings.most_waiting:
            raise ApiError(503, f"{model.name} has too many requests waiting; try again later")
        self._begun[model.name] += 1
        try:
            return await self._begin(caller, question, model, request_id, endpoint)
        finally:
            self._begun[model.name] -= 1

    async def _begin(
        self,
        caller: Caller,
        question: ChatQuestion | TextQuestion,
        model: ServedModel,
        request_id: str,
        endpoint: str,
    ) -> Job:
        asked = await self._prepared(caller, model, question)
        prompt_tokens, most_output = len(asked.request.prompt), _most_output(model, asked)
        price = self.prices.price(model.name)
        admitted = self._admit(caller, request_id, prompt_tokens, most_output)
        try:
            await self._reserve(
                caller, request_id, model, most(price, prompt_tokens, most_output), price
            )
            job = Job(
                request_id, caller, model, price, endpoint, asked, self.metrics, self._settle_once
            )
            self.jobs[request_id] = job
        except BaseException:
            if admitted:
                self.rates.leave(request_id, 0)
            raise
        try:
            await job.start()
        except BaseException:
            await job.close()
            raise
        return job

    def _model(self, caller: Caller, name: str) -> ServedModel:
        model = self.registry.get(name)
        if caller.key is not None and not caller.may_use(model.name):
            allowed = ", ".join(caller.key.models or ())
            raise ApiError(400, f"this key may not use {model.name}; it may: {allowed}")
        return model

    async def _prepared(
        self, caller: Caller, model: ServedModel, question: ChatQuestion | TextQuestion
    ) -> Asked[Any]:
        """Rendered, tokenised, its grammar compiled, in a thread."""
        request = {
            "n": question.options.get("n", 1),
            "deadline": time.monotonic() + self.settings.request_seconds,
            "namespace": caller.namespace(question.user),
        }
        chosen = {key: value for key, value in question.options.items() if key != "n"}
        options: dict[str, Any] = {"temperature": 1.0, **model.lm.sampling, **chosen}
        try:
            if isinstance(question, ChatQuestion):
                make: Any = partial(prepare_chat, model.lm, question.messages, request, **options)
            else:
                make = partial(prepare_text, model.lm, question.prompt, request, **options)
            loop = asyncio.get_running_loop()
            return cast("Asked[Any]", await loop.run_in_executor(self._cooks, make))
        except (RequestError, DataError, ValueError) as error:
            raise ApiError(400, str(error)) from error
        except RecursionError as error:
            raise ApiError(400, "the request is nested too deeply") from error

    def _admit(self, caller: Caller, request_id: str, prompt: int, output: int) -> bool:
        """Whether it counts for a key. An answer that may be longer than the key's minute allows is
        let in as all that the minute allows: most end long before."""
        key = caller.key
        if key is None:
            return False
        tokens = prompt + output
        if key.tpm is not None:
            tokens = max(prompt, min(tokens, key.tpm))
        try:
            self.rates.enter(key, request_id, tokens)
        except RateExceeded as error:
            raise ApiError(429, str(error), retry_after=error.retry_after) from error
        return True

    async def _reserve(
        self, caller: Caller, request_id: str, model: ServedModel, amount: int, price: Price
    ) -> None:
        reserve = asyncio.create_task(
            asyncio.to_thread(
                self.ledger.reserve,
                request_id,
                caller.key,
                caller.account,
                model.name,
                amount,
                price,
            )
        )
        try:
            await asyncio.shield(reserve)
        except asyncio.CancelledError:  # the client left meanwhile; the thread goes on
            await asyncio.wait([reserve])
            if reserve.exception() is None:
                await asyncio.to_thread(self.ledger.refund, request_id)
            raise
        except InsufficientBalance as error:
            raise ApiError(402, "Insufficient Balance") from error
        except OverBudget as error:
            raise ApiError(402, str(error)) from error
        except KeyRevoked as error:
            raise ApiError(401, str(error)) from error

    def _settle_once(self, job: Job) -> asyncio.Task[None]:
        """The task that ends and settles a job, begun once."""
        task = self._settling.get(job.request_id)
        if task is None:
            task = asyncio.create_task(self._settle(job))
            self._settling[job.request_id] = task
        return task

    async def _settle(self, job: Job) -> None:
        try:
            job.stop()
            await job.ended()
            used = job.used()
            tokens = 0 if used is None else used.hit + used.miss + used.output
            self.rates.leave(job.request_id, tokens)
            job.cost = await self._book(job.request_id, used)
            await self._book_owed()
        except Exception:
            log.exception("request %s could not be settled", job.request_id)
            raise
        finally:
            self.jobs.pop(job.request_id, None)
            self._settling.pop(job.request_id, None)

    async def _book(self, request_id: str, used: Used | None) -> int:
        """Settle, or give all back, once however often. What fails, on a full disk say, is owed
        from then on."""
        try:
            if used is None:
                await asyncio.to_thread(self.ledger.refund, request_id)
                self._owed.pop(request_id, None)
                return 0
            settled = await asyncio.to_thread(self.ledger.settle, request_id, used)
        except Exception:
            self._owed[request_id] = used
            raise
        self._owed.pop(request_id, None)
        self.metrics.used(used)
        return settled.amount

    async def _book_owed(self) -> None:
        """What another request owes is tried again, and is no fault of this one."""
        for request_id in list(self._owed):
            if request_id not in self._owed:  # another request has just seen to it
                continue
            used = self._owed.pop(request_id)
            try:
                await self._book(request_id, used)
            except Exception:
                log.exception("request %s is still owed", request_id)

    async def drain(self, seconds: float) -> None:
        """Take no more questions; let those under way end, and after so long end and settle them,
        whether or not their clients go on reading."""
        self.closing = True
        until = time.monotonic() + seconds
        while self.jobs and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for job in list(self.jobs.values()):
            self._settle_once(job)
        while self._settling:
            await asyncio.wait(self._settling.values())
        await self._book_owed()


def new_request_id() -> str:
    return uuid.uuid4().hex


def _most_output(model: ServedModel, asked: Asked[Any]) -> int:
    room = model.lm.engine.capacity - len(asked.request.prompt)
    return max(0, min(asked.request.sampling.max_tokens, room)) * asked.request.n
