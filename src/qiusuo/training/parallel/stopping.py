"""Being asked to stop, by Ctrl-C or SIGTERM, as a wish that is met at the next good moment."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self


class StopAsked:
    """Counts how often this process was asked to stop; after ``wishes`` times the next one works as
    usual. None: all are wishes."""

    def __init__(self, wishes: int | None) -> None:
        self.wishes, self.times = wishes, 0

    def __enter__(self) -> Self:
        self.former = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        if self.times == self.wishes:
            self.restore()

    def restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def __exit__(self, *details: object) -> None:
        self.restore()
