"""All that a running server consists of, put together once and handed to every route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.loading import load
from qiusuo.server.database import Database
from qiusuo.server.desk import Desk
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger
from qiusuo.server.metrics import Metrics
from qiusuo.server.prices import PriceBook
from qiusuo.server.rates import Rates
from qiusuo.server.registry import Registry
from qiusuo.server.settings import Settings
from qiusuo.server.usage import UsageReports


@dataclass
class House:
    settings: Settings
    database: Database
    keys: Keys
    ledger: Ledger
    prices: PriceBook
    rates: Rates
    usage: UsageReports
    metrics: Metrics
    registry: Registry
    desk: Desk

    @classmethod
    def open(cls, settings: Settings, loader: Callable[..., LanguageModel] = load) -> House:
        """Opens the database, and gives back what a killed server had reserved."""
        database = Database(settings.database)
        ledger, prices, rates, metrics = Ledger(database), PriceBook(database), Rates(), Metrics()
        ledger.release_stale()
        registry = Registry(settings, loader)
        metrics.models = registry.models
        return cls(
            settings=settings,
            database=database,
            keys=Keys(database),
            ledger=ledger,
            prices=prices,
            rates=rates,
            usage=UsageReports(database),
            metrics=metrics,
            registry=registry,
            desk=Desk(settings, registry, ledger, prices, rates, metrics),
        )

    async def close(self) -> None:
        await self.registry.stop()
        self.shut()

    def shut(self) -> None:
        """Where nothing was served yet."""
        self.ledger.close()
        self.database.close()
