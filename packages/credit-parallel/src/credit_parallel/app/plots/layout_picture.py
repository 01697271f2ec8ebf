"""Who owns which rows, who needs copies of them, and where the ranks are on the mesh."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from credit_mesh import RankLayout, RowPartition
from credit_parallel.app.plots.figures import LINE, MOST_BANDS, TEXT, apart, folded, new_figure, rank_colour, save

MOST_COLUMNS = 8
BODY = 470.0
"""Height of the drawing of the rows, in pixels."""


def plot_layout(
    path: str | os.PathLike[str],
    layout: RankLayout,
    partition: RowPartition,
    *,
    halo: tuple[int, int] = (0, 0),
    latitudes: Tensor | None = None,
    title: str = "",
) -> Any:
    """Draw the rows of each domain rank, the halos that it needs of its neighbours, and the mesh of all ranks.

    Writes a PNG, and returns the figure. There is a column for each domain rank: filled where its own rows are, hatched
    where it needs copies of others' rows. Thin halos are drawn a few pixels high, so that they can be seen.

    Args:
        partition: Rows of each domain rank.
        halo: How many rows beyond its first and its last one a rank needs.
        latitudes: Degrees north of all rows, of shape (H,), for a second axis.
        title: The title; by default the sizes of the axes.

    Raises:
        ValueError: If the partition is of other ranks, or there are other latitudes than rows.
    """
    if partition.ranks != layout.domain:
        raise ValueError(f"the partition must be of the {layout.domain} domain ranks of the layout; got {partition}")
    if latitudes is not None and tuple(latitudes.shape) != (partition.rows,):
        raise ValueError(f"latitudes must be those of all {partition.rows} rows; got {tuple(latitudes.shape)}")
    if min(halo) < 0:
        raise ValueError(f"halo must be two numbers of rows, 0 or more; got {halo}")
    figure = new_figure(1000, BODY + 190)
    grid = figure.add_gridspec(1, 2, width_ratios=[3, 2])
    figure.suptitle(
        title or f"{layout.world_size} ranks: dp {layout.dp} × tp {layout.tp} × domain {layout.domain}",
        fontsize=TEXT + 3,
    )
    _rows(figure.add_subplot(grid[0]), partition, halo, latitudes)
    _mesh(figure.add_subplot(grid[1]), layout)
    save(figure, path)
    return figure


def _rows(axes: Any, partition: RowPartition, halo: tuple[int, int], latitudes: Tensor | None) -> None:
    from matplotlib.patches import Patch, Rectangle

    rows, ranks = partition.rows, partition.ranks
    fine = ranks <= 2 * MOST_BANDS  # beyond that lines and hatches would cover all
    thinnest = rows * 6 / BODY * fine
    copied: dict[str, Any] = {"facecolor": "none" if fine else "0.6", "edgecolor": "0.25", "linewidth": 0.5 * fine}
    copied["hatch"] = "/////" if fine else None
    for rank in range(ranks):
        start, stop = partition.offsets[rank : rank + 2]
        colour = rank_colour(rank)
        own: dict[str, Any] = {"facecolor": colour, "edgecolor": "black", "linewidth": 1.0 * fine}
        axes.add_patch(Rectangle((0, start), ranks, stop - start, facecolor=colour, alpha=0.25, linewidth=0))
        axes.add_patch(Rectangle((rank, start), 1, stop - start, gid=f"rows of {rank}", **own))
        for count, edge, direction in ((min(halo[0], start), start, -1), (min(halo[1], rows - stop), stop, 1)):
            if count:
                height = direction * max(count, thinnest)
                axes.add_patch(Rectangle((rank, edge), 1, height, gid=f"halo of {rank}", **copied))
    if fine:
        axes.hlines(partition.offsets[1:-1], 0, ranks, colors="black", linewidths=0.6)
    axes.set(xlim=(0, ranks), ylim=(rows, 0), xlabel="domain rank", ylabel="row")
    axes.set_title("Rows of one sample", fontsize=TEXT + 1)
    columns = apart([rank + 0.5 for rank in range(ranks)], ranks * 26 / 400)
    axes.set_xticks([rank + 0.5 for rank in columns], [str(rank) for rank in columns], fontsize=TEXT)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([partition.offsets[at] for at in apart(partition.offsets[:-1], rows * LINE / BODY)])
    axes.tick_params(axis="y", labelsize=TEXT - 1)
    if latitudes is not None:
        _latitudes(axes, latitudes)
    parts = [Patch(facecolor=rank_colour(0), edgecolor="black", label="rows that a rank owns")]
    if ranks > 1 and max(halo):
        label = f"halo: copies of others' rows, {halo[0]} before and {halo[1]} after"
        parts.append(Patch(label=label, **copied))
    axes.legend(handles=parts, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=TEXT, frameon=False)
    _names(axes, partition)


def _names(axes: Any, partition: RowPartition) -> None:
    """Who has which rows, at that end of a band which is further from the rank's own column."""
    rows, ranks = partition.rows, partition.ranks
    middles = [partition.offsets[rank] + size / 2 for rank, size in enumerate(partition.sizes)]
    for rank in apart(middles, rows * LINE * 1.15 / BODY):
        start, stop = partition.offsets[rank : rank + 2]
        which = f"row {start}" if stop - start == 1 else f"rows {start}–{stop - 1} ({stop - start})"
        north = rank < ranks / 2
        axes.text(
            0.98 if north else 0.02,
            middles[rank],
            f"rank {rank}: {which}",
            transform=axes.get_yaxis_transform(),
            ha="right" if north else "left",
            va="center",
            fontsize=TEXT - 1,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0},
        )


def _latitudes(axes: Any, latitudes: Tensor) -> None:
    degrees = latitudes.cpu().double()
    rows = len(degrees)
    side = axes.secondary_yaxis("right")
    at = sorted({round(i * (rows - 1) / 6) for i in range(7)})
    side.set_yticks([row + 0.5 for row in at], [f"{float(degrees[row]):.3g}°" for row in at], fontsize=TEXT - 1)
    side.set_ylabel("latitude (°N)")


def _mesh(axes: Any, layout: RankLayout) -> None:
    """A cell for each rank: replicas and tensor-parallel peers side by side, domain ranks from north to south."""
    from matplotlib.patches import Rectangle

    shown = folded(layout.dp * layout.tp, MOST_COLUMNS)
    bands = folded(layout.domain, MOST_BANDS)
    for x, column in enumerate(shown):
        for y, domain in enumerate(bands):
            if column is None or domain is None:
                axes.text(x + 0.5, y + 0.5, "…" if column is None else "⋮", ha="center", va="center", fontsize=TEXT)
                continue
            rank = layout.rank(column // layout.tp, column % layout.tp, domain)
            axes.add_patch(
                Rectangle(
                    (x + 0.04, y + 0.06), 0.92, 0.88, facecolor=rank_colour(domain), edgecolor="0.3", linewidth=0.8
                )
            )
            axes.text(x + 0.5, y + 0.5, str(rank), ha="center", va="center", fontsize=TEXT)
    axes.set(xlim=(0, len(shown)), ylim=(len(bands), 0))
    axes.set_title("Global ranks on the mesh", fontsize=TEXT + 1)
    named = [
        "…" if c is None else f"dp {c // layout.tp}" + (f"\ntp {c % layout.tp}" if layout.tp > 1 else "") for c in shown
    ]
    axes.set_xticks([x + 0.5 for x in range(len(shown))], named, fontsize=TEXT - 1)
    axes.set_yticks(
        [y + 0.5 for y in range(len(bands))], ["⋮" if d is None else str(d) for d in bands], fontsize=TEXT - 1
    )
    axes.tick_params(length=0)
    axes.set_xlabel("replica (dp)" + (" and tensor-parallel rank (tp)" if layout.tp > 1 else ""))
    axes.set_ylabel("domain rank")
    for spine in axes.spines.values():
        spine.set_visible(False)
