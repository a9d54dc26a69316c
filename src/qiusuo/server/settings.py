"""What a server may be told, and what holds where it is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qiusuo.data.cache import cache_folder
from qiusuo.engine.limits import Limits


def default_database() -> Path:
    """Keys, ledger and conversations, beside what was pulled."""
    return cache_folder() / "server.sqlite3"


@dataclass(frozen=True)
class Settings:
    """``host`` other than loopback needs keys. Sizes in bytes, times in seconds.

    ``request_seconds``: an answer that takes longer is ended where it stands. ``most_waiting``:
    requests under way or in the queue of one model; one more is answered 503. ``drain_seconds``:
    how long running answers may take to end when the server is asked to stop. ``origins``: web
    pages of other sites that may call the API (CORS); none."""

    host: str = "127.0.0.1"
    port: int = 8000
    database: Path = field(default_factory=default_database)
    runs: Path = Path("runs")
    recipes: Path = Path("recipes")
    most_body: int = 8 << 20
    most_messages: int = 2048
    most_tokens: int = 65_536
    most_answers: int = 16
    most_waiting: int = 512
    request_seconds: float = 1800.0
    keep_alive_seconds: float = 10.0
    drain_seconds: float = 20.0
    origins: tuple[str, ...] = ()
    dtype: str | None = None
    quantize: str | None = None
    cache: str | None = None
    device: str = "cpu"
    draft: str = "auto"
    limits: Limits = field(default_factory=Limits)
