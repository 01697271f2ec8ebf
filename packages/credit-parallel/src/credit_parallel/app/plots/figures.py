"""What the pictures share. Figures are objects of their own: pyplot, and its state, is left alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DPI = 100
TEXT = 9.0
"""Size of text, in points."""

LINE = TEXT * DPI / 72 * 1.25
"""Height of a line of it, in pixels."""

MOST_BANDS = 16
"""Ranks that can all be drawn; of more, some are left out."""


def new_figure(width: float, height: float) -> Any:
    """A figure of so many pixels; a ValueError says if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'credit-parallel[plot]'") from None
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a PNG, the same for the same figure; missing folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def rank_colour(rank: int) -> tuple[float, float, float]:
    """A light colour that neighbours do not share."""
    from matplotlib import colormaps

    red, green, blue = colormaps["tab10"](rank % 10)[:3]
    return (0.45 + 0.55 * red, 0.45 + 0.55 * green, 0.45 + 0.55 * blue)


def apart(places: Sequence[float], distance: float) -> list[int]:
    """Which of some places, in order, can be labelled without labels nearer to each other than a distance."""
    kept: list[int] = []
    for index, place in enumerate(places):
        if not kept or abs(place - places[kept[-1]]) >= distance:
            kept.append(index)
    return kept


def folded(count: int, most: int) -> list[int | None]:
    """Numbers from 0 up; where there are more than ``most``, the first and the last, and None between them."""
    if count <= most:
        return list(range(count))
    first = most // 2
    return [*range(first), None, *range(count - (most - first - 1), count)]
