"""Times that follow one another on the calendar: monthly, seasonal and yearly steps, whose seconds differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

_DAY = 86400.0
_ROUNDING = 60.0
"""Seconds by which times may be off, such as those that were days in float32."""


@dataclass(frozen=True)
class MonthStep:
    """A constant number of months between times."""

    months: int  #: from one time to the next: 1, 3 for seasons, 12 for years
    #: Where in its month a time is: ``start`` or ``end`` (so long after the start or the end of the month), ``middle``
    #: (of the span of so many months around it), ``day`` (a day of the month, or the last one of a shorter month).
    place: str
    offset: float  #: seconds from there

    def ahead(self, seconds: float, steps: int) -> float:
        """Seconds from a time, since 1970-01-01, to that so many steps later (or earlier, below 0) on the calendar."""
        month = months_of(np.array([seconds]))
        here, there = (_places(self, month + later) for later in (0, steps * self.months))
        return float(there[0] - here[0])

    def __str__(self) -> str:
        """``1 month``, ``2 years``."""
        count, unit = (self.months // 12, "year") if self.months % 12 == 0 else (self.months, "month")
        return f"{count} {unit}{'s' if count > 1 else ''}"


def month_step(seconds: Array) -> tuple[MonthStep, list[int]] | None:
    """The calendar step of times that increase, and where another one lies between two times.

    Args:
        seconds: Since 1970-01-01, float64 of shape (T,).

    Returns:
        The commonest step and the indices of the times that do not follow by it; None if two times lie in one month, or
        they do not lie at one place of their months.
    """
    if len(seconds) < 2:
        return None
    months = months_of(seconds)
    steps = np.diff(months)
    if not (steps > 0).all():
        return None
    count = int(Counter(steps.tolist()).most_common(1)[0][0])
    into = seconds - _starts(months)
    # Few times can lie at more than one place: the first of a month is its start, the 30th of June its end.
    likely = ["middle", "start", "end"]
    if (np.abs(into) <= _ROUNDING).all():
        likely = ["start"]
    elif into.max() >= 28 * _DAY:
        likely = ["middle", "end", "start", "day"]
    for place in likely:
        offset = 0.0
        if place == "day":
            offset = float(into.max())
        elif place != "middle":
            offset = float((seconds - _places(MonthStep(count, place, 0.0), months))[0])
        step = MonthStep(count, place, offset)
        if (np.abs(_places(step, months) - seconds) <= _ROUNDING).all():
            return step, [i + 1 for i, other in enumerate(steps.tolist()) if other != count]
    return None


def months_of(seconds: Array) -> Any:
    """Months since January 1970; a time just before a month, by rounding, is of that month."""
    moments = np.round((seconds + _ROUNDING) * 1e3).astype(np.int64).astype("datetime64[ms]")
    return moments.astype("datetime64[M]").astype(np.int64)


def _starts(months: Array) -> Any:
    """Seconds since 1970-01-01 at which months start."""
    return months.astype("datetime64[M]").astype("datetime64[s]").astype(np.int64).astype(np.float64)


def _places(step: MonthStep, months: Array) -> Any:
    """The time of each of some months."""
    start, end = _starts(months), _starts(months + 1)
    if step.place == "start":
        return start + step.offset
    if step.place == "end":
        return end + step.offset
    if step.place == "day":
        return np.minimum(start + step.offset, end - _DAY + step.offset % _DAY)
    first: Array = months - step.months // 2
    return (_starts(first) + _starts(first + step.months)) / 2 + step.offset
