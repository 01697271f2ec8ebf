"""A forecast beside the truth, on maps in degrees, with the seams between ranks."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import numpy as np
from torch import Tensor

from credit_mesh import RowPartition
from credit_parallel.app.data.source import Channel, Grid
from credit_parallel.app.plots.figures import LINE, MOST_BANDS, TEXT, apart, new_figure, save


def plot_forecast(
    path: str | os.PathLike[str],
    truth: Tensor,
    forecast: Tensor,
    grid: Grid,
    channel: Channel,
    partition: RowPartition | None = None,
    *,
    title: str = "",
) -> Any:
    """Draw the truth, a forecast and its error on maps; lines show where the rows of two ranks meet.

    Writes a PNG, and returns the figure. Truth and forecast have one scale of colours, that of the truth; the error has
    one that is symmetric about zero.

    Args:
        truth: Field of shape (H, W), in the units of the channel. May hold NaN.
        forecast: The same of the forecast.
        grid: Latitudes and longitudes, in order.
        channel: What the field is.
        partition: Who owned which rows; None draws no seams.
        title: The title; by default the name of the channel.

    Raises:
        ValueError: If fields, grid and partition do not fit each other.
    """
    shape = (grid.height, grid.width)
    if tuple(truth.shape) != shape or tuple(forecast.shape) != shape or min(shape) < 2:
        raise ValueError(
            f"truth and forecast must be of shape (H, W) = {shape}, two or more of each, as the grid; got "
            f"{tuple(truth.shape)} and {tuple(forecast.shape)}"
        )
    if partition is not None and partition.rows != grid.height:
        raise ValueError(f"the partition must be of the {grid.height} rows of the grid; got {partition}")
    true, made = (x.detach().cpu().double().numpy() for x in (truth, forecast))
    error = made - true
    lat, lon = edges_of(grid)
    middle = math.radians(float(grid.latitudes.mean()))
    stretch = 1 / max(0.2, math.cos(middle))  # a degree of longitude is shorter than one of latitude
    ratio = abs(lat[-1] - lat[0]) * stretch / abs(lon[-1] - lon[0])
    stacked = ratio < 0.8
    if stacked:
        panel = min(420.0, max(150.0, 780 * ratio))
        figure = new_figure(1000, 3 * (panel + 62) + 40)
        panels = figure.subplots(3, 1, sharex=True)
    else:
        panel = min(900.0, 215 * ratio)
        figure = new_figure(1000, panel + 190)
        panels = figure.subplots(1, 3, sharey=True)
    figure.suptitle(title or name_of(channel), fontsize=TEXT + 3)
    low, high = _range(true)
    widest = float(np.nanmax(np.abs(error), initial=0.0)) or 1e-12
    weights = np.cos(np.radians(grid.latitudes.cpu().numpy()))[:, None] * np.isfinite(error)
    rmse = math.sqrt(float(np.nansum(weights * error**2) / max(float(weights.sum()), 1e-30)))
    written = re.sub(r"(?<=[A-Za-z])(?:\*\*|\^)?(-?\d+)", r"$^{\1}$", channel.units or "1")  # m s**-1, or m s-1
    units = f" {written}" if written != "1" else ""
    below, beyond = np.nanmin(made, initial=np.inf) < low, np.nanmax(made, initial=-np.inf) > high
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = ends[bool(below), bool(beyond)]
    # what, field, colours and their range
    drawn = (
        ("truth", true, "viridis", low, high, "neither"),
        ("forecast", made, "viridis", low, high, extend),
        (f"error (forecast − truth), RMSE {rmse:.3g}{units}", error, "RdBu_r", -widest, widest, "neither"),
    )
    for index, (what, field, colours, least, most, extended) in enumerate(drawn):
        axes = panels[index]
        mesh = axes.pcolormesh(lon, lat, field, cmap=colours, vmin=least, vmax=most, rasterized=True)
        axes.set_facecolor("0.8")  # where there are no values
        axes.set_title(what, fontsize=TEXT + 1 if stacked else TEXT)
        axes.set_aspect(stretch)
        axes.set(xlim=(lon.min(), lon.max()), ylim=(lat.min(), lat.max()))
        if stacked or index == 0:
            axes.set_ylabel("latitude (°N)", fontsize=TEXT)
        if not stacked or index == 2:
            axes.set_xlabel("longitude (°E)", fontsize=TEXT)
        _ticks(axes)
        bar = figure.colorbar(
            mesh,
            ax=axes,
            extend=extended,
            location="right" if stacked else "bottom",
            pad=0.06 if stacked else 0.02,
            shrink=0.95,
        )
        bar.set_label(f"{channel.label} ({written})", fontsize=TEXT)
        bar.ax.tick_params(labelsize=TEXT - 1)
        if not stacked:
            bar.ax.locator_params(nbins=5)
        if partition is not None and partition.ranks > 1:
            _seams(axes, lat, partition, panel, named=stacked or index == 2)
    save(figure, path)
    return figure


def name_of(channel: Channel) -> str:
    """What a title calls a field: ``U component of wind at 500 hPa``."""
    name = channel.long_name or channel.name
    return name if channel.level is None else f"{name} at {channel.level:g} {channel.level_units}".rstrip()


def edges_of(grid: Grid) -> tuple[Any, Any]:
    """Where cells meet: halfway between latitudes and between longitudes; (H + 1,) and (W + 1,) degrees."""
    lat = grid.latitudes.cpu().double().numpy()
    lon = np.unwrap(grid.longitudes.cpu().double().numpy(), period=360)
    return np.clip(_between(lat), -90, 90), _between(lon)


def _between(x: Any) -> Any:
    inner = (x[1:] + x[:-1]) / 2
    return np.concatenate([[x[0] - (inner[0] - x[0])], inner, [x[-1] + (x[-1] - inner[-1])]])


def _range(field: Any) -> tuple[float, float]:
    known = field[np.isfinite(field)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(axes: Any) -> None:
    from matplotlib.ticker import MultipleLocator

    axes.tick_params(labelsize=TEXT - 1)
    for axis, (low, high), most in ((axes.xaxis, axes.get_xlim(), 6), (axes.yaxis, axes.get_ylim(), 6)):
        step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60) if high - low <= most * s or s == 60)
        axis.set_major_locator(MultipleLocator(step))


def _seams(axes: Any, lat: Any, partition: RowPartition, height: float, named: bool) -> None:
    """A line where two ranks meet, and the numbers of the ranks at the side."""
    seams = [float(lat[row]) for row in partition.offsets[1:-1]]
    many = partition.ranks > MOST_BANDS  # thinner, to leave the field visible
    style = {"linewidths": 0.4 if many else 1.0, "linestyles": "-" if many else "--"}
    axes.hlines(seams, *axes.get_xlim(), colors="black", label="seams", **style)
    if not named:
        return
    side = axes.secondary_yaxis("right")
    middles = [
        float(lat[start] + lat[stop]) / 2
        for start, stop in zip(partition.offsets[:-1], partition.offsets[1:], strict=True)
    ]
    low, high = axes.get_ylim()
    shown = apart(middles, (high - low) * LINE / height)
    side.set_yticks([middles[rank] for rank in shown], [str(rank) for rank in shown])
    side.tick_params(length=0, labelsize=TEXT - 1)
    side.set_ylabel("rank", fontsize=TEXT)
