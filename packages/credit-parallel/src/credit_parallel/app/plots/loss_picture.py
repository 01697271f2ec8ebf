"""Losses of runs, and how far they are apart."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from credit_parallel.app.plots.figures import TEXT, new_figure, save


def plot_losses(
    path: str | os.PathLike[str],
    curves: Mapping[str, Sequence[float]],
    *,
    steps: Sequence[int] | None = None,
    title: str = "Training loss",
    tolerance: float | None = None,
) -> Any:
    """Draw losses over steps, and below their absolute differences from the first curve, to a PNG; return the figure.

    Args:
        curves: Losses by the label of a run.
        steps: The steps that losses are of; None counts them from 1.
        tolerance: The largest difference that is taken for none, drawn as a line.

    Raises:
        ValueError: If there are no losses, or more than steps.
    """
    longest = max(map(len, curves.values()), default=0)
    if not longest or (steps is not None and len(steps) < longest):
        raise ValueError(
            f"needs curves of one loss or more, and a step for each; the longest of {len(curves)} curve(s) has "
            f"{longest} losses" + ("" if steps is None else f", and there are {len(steps)} steps")
        )
    at = np.arange(1, longest + 1) if steps is None else np.asarray(steps)
    labels, values = list(curves), [np.asarray(curve, np.float64) for curve in curves.values()]
    several = len(curves) > 1
    figure = new_figure(1000, 700 if several else 480)
    grid = figure.add_gridspec(2 if several else 1, 1, height_ratios=[2, 1] if several else [1])
    above = figure.add_subplot(grid[0])
    styles = ["-", "--", ":", "-."]
    for index, (label, curve) in enumerate(zip(labels, values, strict=True)):
        # Later curves are thinner and broken, so that equal ones can all be seen.
        above.plot(
            at[: len(curve)],
            curve,
            styles[index % 4],
            color=f"C{index}",
            linewidth=max(1.5, 4 - 1.5 * index),
            marker="o" if len(curve) == 1 else None,
            label=label,
        )
    known = np.concatenate([curve[np.isfinite(curve)] for curve in values])
    if len(known) and known.min() > 0 and known.max() > 10 * known.min():
        above.set_yscale("log")
    above.set(title=title, ylabel="loss (normalised units)")
    above.legend()
    above.grid(alpha=0.3)
    lowest = above
    if several:
        lowest = figure.add_subplot(grid[1], sharex=above)
        above.tick_params(labelbottom=False)
        _differences(lowest, at, labels, values, tolerance)
    lowest.set_xlabel("step of the optimizer")
    lowest.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path)
    return figure


def _differences(axes: Any, at: Any, labels: Sequence[str], values: Sequence[Any], tolerance: float | None) -> None:
    largest = 0.0
    for index in range(1, len(values)):
        common = min(len(values[0]), len(values[index]))
        apart = np.abs(values[index][:common] - values[0][:common])
        seen = apart > 0
        label = labels[index] if len(values) > 2 else None
        axes.plot(at[:common], np.where(seen, apart, np.nan), ".-", color=f"C{index}", linewidth=1, label=label)
        equal = np.flatnonzero(apart == 0)
        if len(equal):  # a logarithm has no place for them
            axes.plot(
                at[equal],
                np.full(len(equal), 0.04),
                "|",
                color=f"C{index}",
                transform=axes.get_xaxis_transform(),
                label="equal, bit for bit",
            )
        largest = max(largest, float(np.nanmax(apart, initial=0.0)))
    if largest > 0 and math.isfinite(largest):
        axes.set_yscale("log")
    else:
        axes.set_yticks([])
    if tolerance is not None:
        axes.axhline(tolerance, color="0.4", linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
    axes.set(
        title=f"Difference from {labels[0]}: " + (f"{largest:.2g} at most" if largest else "none"),
        ylabel="absolute difference",
    )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best", ncols=3, fontsize=TEXT)
    axes.grid(alpha=0.3)
