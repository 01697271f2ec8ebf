"""Times of a data set: labels, seconds, and the runs in which they follow one another in equal steps or months."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

import numpy as np

from credit_parallel.app.data.months import MonthStep, month_step
from credit_parallel.app.data.source import Source

logger = logging.getLogger(__name__)

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class TimeAxis:
    """What a :class:`~credit_parallel.app.data.source.Source` says of its times; see there."""

    labels: tuple[str, ...]
    seconds: tuple[float, ...] | None
    segments: tuple[range, ...]
    step: float | None
    calendar: MonthStep | None = None

    @classmethod
    def from_seconds(cls, seconds: Sequence[float], name: str) -> TimeAxis:
        """Times that are moments; ``name`` is what errors call the data.

        The step is the commonest one; where another one lies between two times, a segment ends. It is a number of
        months where the times lie at one place of their months, and no more segments end so.

        Raises:
            ValueError: If they do not increase.
        """
        values = np.asarray(seconds, dtype=np.float64)
        labels = time_labels(values)
        steps = np.diff(values)
        if not (steps > 0).all():
            i = int(np.argmin(steps > 0))
            raise ValueError(f"{name}: times must increase, and {labels[i]} is followed by {labels[i + 1]}; sort them")
        if not len(steps):
            return cls(labels, tuple(values.tolist()), (range(len(values)),), None)
        step = float(Counter(np.round(steps, 3).tolist()).most_common(1)[0][0])
        gaps = [i + 1 for i, other in enumerate(steps.tolist()) if abs(other - step) > 1e-3 * step]
        said, calendar = f"{step:g} s", None
        on_calendar = month_step(values)
        if on_calendar is not None and len(on_calendar[1]) <= len(gaps):
            calendar, gaps = on_calendar
            said = str(calendar)
        ends = [0, *gaps, len(values)]
        if len(gaps) > len(values) // 4:
            logger.warning(
                "%s: times are irregular; steps of %s are the commonest, and the others split the %d times into %d "
                "runs, which no sample crosses",
                *(name, said, len(values), len(gaps) + 1),
            )
        segments = tuple(range(start, stop) for start, stop in pairwise(ends))
        return cls(labels, tuple(values.tolist()), segments, step if calendar is None else None, calendar)

    @classmethod
    def from_labels(cls, labels: Sequence[str]) -> TimeAxis:
        """Times that have names alone, such as the months of a climatology; they are one segment."""
        return cls(tuple(labels), None, (range(len(labels)),), None)


def time_labels(seconds: np.ndarray[Any, Any]) -> tuple[str, ...]:
    """``2019-03-01T06:00`` for each, with seconds where any has some."""
    moments = np.round(np.asarray(seconds) * 1e3).astype("datetime64[ms]")
    unit: Any  # numpy names the texts that will do
    for unit in ("m", "s"):
        if (moments.astype(f"datetime64[{unit}]") == moments).all():
            break
    else:
        unit = "ms"
    return tuple(np.datetime_as_string(moments, unit=unit).tolist())


def lead_in_steps(source: Source, lead: int | str) -> int:
    """How many times of the data a lead spans.

    Args:
        lead: A number of times, or text with a unit: ``6h``, ``30min``, ``1d``, ``90s``.

    Raises:
        ValueError: If it is not positive, no whole number of steps, or has a unit and the times are no moments, or
            follow one another on the calendar.
    """
    if isinstance(lead, int) and not isinstance(lead, bool) and lead >= 1:
        return lead
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(s|min|h|d)?\s*", lead) if isinstance(lead, str) else None
    if match is None or float(match[1]) == 0 or (match[2] is None and not match[1].isdigit()):
        raise ValueError(
            f"lead must be a number of times of the data, 1 or more, or text such as 6h, 30min or 1d; got {lead!r}"
        )
    if match[2] is None:
        return int(match[1])
    calendar = calendar_of(source)
    if calendar is not None:
        raise ValueError(
            f"{source.name}: lead={lead!r} is a time, and its times are {calendar} apart, which is no constant time: "
            "give the lead as a number of times, such as 1"
        )
    if not source.step:
        raise ValueError(
            f"{source.name}: lead={lead!r} needs times that are moments in equal steps, and these are "
            f"{_extent(source)}: give the lead as a number of times, such as 1"
        )
    seconds = float(match[1]) * _UNITS[match[2]]
    steps = round(seconds / source.step)
    if steps < 1 or abs(steps * source.step - seconds) > 1e-3 * source.step:
        raise ValueError(
            f"{source.name}: lead={lead!r} is no multiple of the {_duration(source.step)} between times of the data"
        )
    return steps


def calendar_of(source: Source) -> MonthStep | None:
    """The months between times that follow one another on the calendar; None for others."""
    calendar: MonthStep | None = getattr(source, "calendar", None)
    return calendar


def seconds_ahead(source: Source, time: int, steps: int) -> float | None:
    """Seconds from a time of the data to that which is so many times later, beyond the end of the data too.

    None where times are no moments, or there is one time alone.
    """
    if source.seconds is None:
        return None
    if source.step is not None:
        return source.step * steps
    calendar = calendar_of(source)
    return None if calendar is None else calendar.ahead(source.seconds[time], steps)


def times_between(source: Source, bounds: Sequence[Any]) -> list[int]:
    """The times from a first bound to before a second.

    Args:
        bounds: Two fractions of all times, or two texts such as ``2019-03-24`` (UTC where they have no offset) or, of
            times that are no moments, two labels; None for no bound.

    Raises:
        ValueError: If a bound cannot be read, or no times lie between.
    """
    if len(bounds) != 2:
        raise ValueError(f"bounds of times must be two; got {bounds!r}")
    count = len(source.labels)
    start, stop = (
        default if bound is None else _index(source, bound) for bound, default in zip(bounds, (0, count), strict=True)
    )
    if start >= stop:
        raise ValueError(f"{source.name}: no times from {bounds[0]} to before {bounds[1]}; it has {_extent(source)}")
    return list(range(start, stop))


def _index(source: Source, bound: Any) -> int:
    """The first time that is not before a bound."""
    if isinstance(bound, (int, float)) and not isinstance(bound, bool):
        if not 0 <= bound <= 1:
            raise ValueError(f"a bound of times that is a number is a fraction of all, from 0 to 1; got {bound!r}")
        return round(bound * len(source.labels))
    if source.seconds is None:
        if bound not in source.labels:
            raise ValueError(
                f"{source.name}: {bound!r} is none of its times, which are no moments ({_extent(source)}): give "
                "fractions of all times, such as 0.8, or labels"
            )
        return list(source.labels).index(bound)
    return int(np.searchsorted(np.asarray(source.seconds), _moment(bound) - 1e-3))


def _moment(text: Any) -> float:
    """Seconds since 1970 of a text."""
    try:
        moment = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", text))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError):
        pass
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}(-\d\d){0,2}(T\d\d)?", text):
        raise ValueError(f"a bound of times must be text such as 2019-03-24 or 2019-03-24T06:00; got {text!r}")
    try:
        return float(np.datetime64(text, "s").astype(np.int64))
    except ValueError as error:
        raise ValueError(f"a bound of times, {text!r}, is no date: {error}") from None


def _extent(source: Source) -> str:
    labels = source.labels
    return f"{len(labels)} times, {labels[0]} to {labels[-1]}" if len(labels) else "no times"


def _duration(seconds: float) -> str:
    for unit in ("d", "h", "min"):
        if seconds % _UNITS[unit] == 0:
            return f"{seconds / _UNITS[unit]:g} {unit}"
    return f"{seconds:g} s"
