"""What Prometheus may read at /metrics: requests, tokens, waiting times, and the engines' state.

Counters hold what was settled, so they agree with the ledger. Engine figures are read when asked
for, not kept up to date in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qiusuo.engine.request import EngineError

if TYPE_CHECKING:
    from qiusuo.server.ledger import Used
    from qiusuo.server.registry import ServedModel

FIRST = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """One registry a server, so that several may live in one process. ``models`` is looked at when
    figures are read."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.models: dict[str, ServedModel] = {}
        self._requests = Counter(
            "qiusuo_requests", "Answered HTTP requests", ["path", "status"], registry=self.registry
        )
        self._tokens = Counter(
            "qiusuo_tokens", "Settled tokens", ["model", "kind"], registry=self.registry
        )
        self._first = Histogram(
            "qiusuo_time_to_first_token_seconds",
            "From an admitted question to its first token",
            ["model"],
            buckets=FIRST,
            registry=self.registry,
        )
        self._between = Histogram(
            "qiusuo_time_between_tokens_seconds",
            "Between two events of one answer",
            ["model"],
            buckets=BETWEEN,
            registry=self.registry,
        )
        self.registry.register(_Engines(self))

    def request(self, path: str, status: int) -> None:
        """``path``: the route's pattern, never what a client typed."""
        self._requests.labels(path, str(status)).inc()

    def used(self, used: Used) -> None:
        for kind in ("hit", "miss", "output", "reasoning"):
            self._tokens.labels(used.model, kind).inc(getattr(used, kind))

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def between_tokens(self, model: str, seconds: float) -> None:
        self._between.labels(model).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is read at registration

    def collect(self) -> Iterator[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"qiusuo_engine_{name}", text, labels=["model"])
            for name, text in (
                ("up", "1, or 0 where the engine has failed"),
                ("running", "Answers being written"),
                ("waiting", "Requests in the queue"),
                ("cache_tokens_used", "Tokens in pages that someone holds"),
                ("cache_tokens", "Tokens that the cache has room for"),
            )
        }
        for model in list(self.metrics.models.values()):
            try:
                load = asdict(model.engine.load()) | {"up": 1}
            except EngineError:  # it is the failure that one wants to hear of
                load = {"up": 0}
            for name in gauges.keys() & load.keys():
                gauges[name].add_metric([model.name], float(load[name]))
        yield from gauges.values()
