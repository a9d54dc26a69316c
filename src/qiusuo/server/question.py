"""What is asked, and by whom: the same for every API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qiusuo.server.keys import Key


@dataclass(frozen=True)
class Caller:
    """Who asks. ``key`` is None where no key was ever made and the caller sits at this machine."""

    key: Key | None
    account: str

    @property
    def admin(self) -> bool:
        return self.key is None or self.key.admin

    def may_use(self, model: str) -> bool:
        """Whether this caller's key is for that model too."""
        return self.key is None or self.key.models is None or model in self.key.models

    def namespace(self, user: str | None) -> str:
        """Within which beginnings are shared in the cache. ``user``: the caller's own name for
        whom it asks; its people do not share either."""
        owner = "" if self.key is None else self.key.id
        return f"{owner}/{user or ''}"


@dataclass(frozen=True)
class ChatQuestion:
    """``options``: of ``RunningEngine.chat``, but priority, deadline and namespace."""

    model: str
    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    user: str | None = None


@dataclass(frozen=True)
class TextQuestion:
    """A text or token ids to continue; ``options`` of ``RunningEngine.complete``."""

    model: str
    prompt: str | Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    user: str | None = None
