"""Checks of arguments, and what their errors have in common."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence

from credit_parallel.app.data.source import Source


def closest(name: str, names: Iterable[str]) -> str:
    """A hint at the name that was meant, if one is near."""
    near = difflib.get_close_matches(str(name), list(names), 1)
    return f". Did you mean {near[0]!r}?" if near else ""


def some(items: Iterable[object], most: int = 12) -> str:
    """Items in a line, the first few of them where there are many."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:most]}{'...' if len(text) > most else ''}"


def checked_number(key: str, value: object, least: int = 1) -> None:
    """Refuse with a ValueError what is no whole number of so much or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number, {least} or more; got {value!r}")


def checked_rows(source: Source, rows: range) -> range:
    """Rows of a source; a ValueError refuses what are not consecutive rows of its grid."""
    if (
        not isinstance(rows, range)
        or rows.step != 1
        or (len(rows) and not 0 <= rows.start < rows.stop <= source.grid.height)
    ):
        raise ValueError(f"{source.name}: rows must be a range within 0 to {source.grid.height}; got {rows!r}")
    return rows


def checked_times(source: Source, times: Iterable[int]) -> Sequence[int]:
    """Indices of times of a source, as integers; a ValueError refuses one that is none."""
    indices = [operator.index(time) for time in times]
    for index in indices:
        if not 0 <= index < len(source.labels):
            raise ValueError(f"{source.name}: times are 0 to {len(source.labels) - 1}; got {index}")
    return indices
