"""Hours of the day at which prices differ."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from fractions import Fraction
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from qiusuo.data.errors import DataError

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class PriceError(DataError):
    """A price or a window that cannot hold."""


@dataclass(frozen=True)
class Window:
    """Hours at which prices are multiplied: from ``start`` up to, not including, ``end`` ("HH:MM",
    "24:00" too) on ``weekdays`` (0 is Monday) but for the dates in ``excluded``. A window that
    ends before it starts runs past midnight and belongs to the day on which it starts."""

    start: str
    end: str
    factor: Fraction = Fraction(2)
    timezone: str = "Asia/Shanghai"
    weekdays: tuple[int, ...] = (0, 1, 2, 3, 4)
    excluded: frozenset[date] = frozenset()

    def __post_init__(self) -> None:
        zone(self.timezone)
        if _minute(self.start) == _minute(self.end):
            raise PriceError(f"a window from {self.start} to {self.end} has no length")
        if not self.weekdays or not set(self.weekdays) <= set(range(7)):
            raise PriceError(f"weekdays {self.weekdays} are not among 0 (Monday) to 6")
        if self.factor < 0:
            raise PriceError(f"a factor of {self.factor} would pay people for asking")

    def holds(self, at: datetime) -> bool:
        """Whether it is these hours; ``at`` has a timezone."""
        local = at.astimezone(zone(self.timezone))
        now, start, end = local.hour * 60 + local.minute, _minute(self.start), _minute(self.end)
        if start < end:
            return start <= now < end and self._day(local.date())
        if now >= start:
            return self._day(local.date())
        return now < end and self._day(local.date() - timedelta(days=1))

    def _day(self, day: date) -> bool:
        return day.weekday() in self.weekdays and day not in self.excluded


def deepseek_peak(excluded: Iterable[date] = ()) -> tuple[Window, ...]:
    """Twice the price on working days in Beijing, 9 to 12 and 14 to 18; ``excluded``: holidays."""
    holidays = frozenset(excluded)
    return tuple(
        Window(start, end, excluded=holidays)
        for start, end in (("09:00", "12:00"), ("14:00", "18:00"))
    )


def window_table(window: Window) -> dict[str, Any]:
    """A window in plain JSON, as ``window_from`` reads it."""
    return {
        "start": window.start,
        "end": window.end,
        "factor": str(window.factor),
        "timezone": window.timezone,
        "weekdays": [WEEKDAYS[day] for day in window.weekdays],
        "excluded": sorted(day.isoformat() for day in window.excluded),
    }


def window_from(table: dict[str, Any]) -> Window:
    """A window of a TOML or JSON table; "start" and "end" are needed. PriceError."""
    known = {"start", "end", "factor", "timezone", "weekdays", "excluded"}
    if surplus := set(table) - known:
        raise PriceError(f"a window has no {', '.join(sorted(surplus))}: it has {sorted(known)}")
    if missing := {"start", "end"} - set(table):
        raise PriceError(f"a window lacks its {' and '.join(sorted(missing))}")
    given: dict[str, Any] = {
        key: table[key] for key in ("start", "end", "timezone") if key in table
    }
    try:
        if "factor" in table:
            given["factor"] = Fraction(str(table["factor"]))
        if "weekdays" in table:
            given["weekdays"] = tuple(WEEKDAYS.index(day) for day in table["weekdays"])
        if "excluded" in table:
            given["excluded"] = frozenset(map(_date, table["excluded"]))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise PriceError(f"a window cannot be read: {error}") from error
    return Window(**given)


def _date(given: object) -> date:
    return given if type(given) is date else date.fromisoformat(str(given))


def _minute(text: str) -> int:
    found = re.fullmatch("([01][0-9]|2[0-3]):([0-5][0-9])|24:00", str(text))
    if found is None:
        raise PriceError(f"{text!r} is no time of day: write 09:00, or 24:00 for a day's end")
    return 24 * 60 if found[1] is None else int(found[1]) * 60 + int(found[2])


@cache
def zone(name: str) -> ZoneInfo:
    """By its name, like Asia/Shanghai. PriceError."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise PriceError(
            f"unknown timezone {name!r}: write one like Asia/Shanghai (where the system has none: "
            "pip install tzdata)"
        ) from error
