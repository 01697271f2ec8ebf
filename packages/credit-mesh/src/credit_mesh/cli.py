"""``python -m credit_mesh WORLD``: show how ranks and rows are laid out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from credit_mesh.layout import AXES, RankLayout
from credit_mesh.parallelism import ParallelismConfig
from credit_mesh.partition import RowPartition

__all__ = ["main"]

MOST_COLUMNS = 16
"""Columns of the drawing, one for each (dp, tp); wider worlds show their first ones."""

MOST_RANKS = 64
"""Lines of the table, unless all are asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the layout of a world; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        layout = ParallelismConfig("none", args.tensor, args.domain).layout(args.world_size)
        rows = None if args.height is None else RowPartition.even(args.height, args.domain, args.granularity)
        shown = range(layout.world_size) if args.rank is None else [args.rank]
        lines = _json(layout, rows, shown) if args.json else _text(layout, rows, shown, everything=args.all)
        for line in lines:
            print(line.rstrip())
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:  # a reader such as `head` has seen enough; what is left must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m credit_mesh",
        description="Show how ranks lie on the (dp, tp, domain) mesh, and which latitude rows each holds.",
    )
    parser.add_argument("world_size", type=int, help="number of ranks")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor-parallel degree (default 1)")
    parser.add_argument("--domain", type=int, default=1, metavar="N", help="ranks that share a sample (default 1)")
    parser.add_argument("--height", type=int, metavar="ROWS", help="latitude rows of the model's input")
    parser.add_argument(
        "--granularity", type=int, default=1, metavar="ROWS", help="rows in a block: the model's total stride"
    )
    parser.add_argument("--rank", type=int, metavar="R", help="show this rank only")
    parser.add_argument("--all", action="store_true", help=f"list every rank, also above {MOST_RANKS}")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def _record(layout: RankLayout, rows: RowPartition | None, rank: int) -> dict[str, Any]:
    coords = layout.coords(rank)
    north, south = layout.neighbors(rank)
    record: dict[str, Any] = {"rank": rank, **coords._asdict(), "north": north, "south": south}
    if rows is not None:
        own = rows.interval(coords.domain)
        record["rows"] = [own.start, own.stop]
    return record


def _json(layout: RankLayout, rows: RowPartition | None, shown: Sequence[int]) -> Iterator[str]:
    head: dict[str, Any] = {"world_size": layout.world_size, **{axis: layout.size(axis) for axis in AXES}}
    if rows is not None:
        head |= {
            "height": rows.rows,
            "granularity": rows.granularity,
            "rows_per_domain_rank": list(rows.sizes),
        }
    yield json.dumps(head | {"ranks": [_record(layout, rows, rank) for rank in shown]})


def _text(layout: RankLayout, rows: RowPartition | None, shown: Sequence[int], *, everything: bool) -> Iterator[str]:
    height = "" if rows is None else f", {rows.rows} rows in blocks of {rows.granularity}"
    yield (
        f"{layout.world_size} ranks = {layout.dp} data-parallel (dp) x {layout.tp} tensor-parallel (tp) "
        f"x {layout.domain} domain{height}"
    )
    if len(shown) > 1:
        yield ""
        yield from _drawing(layout, rows)
    yield ""
    yield from _table(layout, rows, shown, everything=everything)


def _drawing(layout: RankLayout, rows: RowPartition | None) -> Iterator[str]:
    """A globe for each (dp, tp): its bands of latitude, north on top, and the rank that holds each band."""
    columns = [(dp, tp) for dp in range(min(layout.dp, MOST_COLUMNS)) for tp in range(layout.tp)][:MOST_COLUMNS]
    bands = range(min(layout.domain, MOST_COLUMNS))
    labels = ["north" if band == 0 else "" for band in bands]
    if rows is not None:
        labels = [f"rows {own.start}..{own.stop - 1}" for own in map(rows.interval, bands)]
    heads = [f"dp {dp} tp {tp}" if layout.tp > 1 else f"dp {dp}" for dp, tp in columns]
    width = max(map(len, [*heads, f"rank {layout.world_size - 1}"])) + 2
    margin = max(map(len, labels))
    more = len(columns) < layout.dp * layout.tp
    rule = " " * margin + "  +" + "+".join("-" * width for _ in columns) + "+"
    yield " " * margin + "   " + " ".join(head.center(width) for head in heads) + ("  ..." if more else "")
    yield rule
    for band, label in zip(bands, labels, strict=True):
        cells = (f"rank {layout.rank(dp, tp, band)}".center(width) for dp, tp in columns)
        yield label.rjust(margin) + "  |" + "|".join(cells) + "|"
        yield rule
    if len(bands) < layout.domain:
        yield " " * margin + f"   ... and {layout.domain - len(bands)} more bands to the south"


def _table(layout: RankLayout, rows: RowPartition | None, shown: Sequence[int], *, everything: bool) -> Iterator[str]:
    # Each column is as wide as its name or its widest entry, known without visiting every rank.
    widest = {"rank": layout.world_size - 1, **{axis: layout.size(axis) - 1 for axis in AXES}}
    columns = {name: max(len(name), len(str(number))) for name, number in widest.items()}
    if rows is not None:
        columns |= {"rows": len(f"{rows.rows}..{rows.rows}"), "count": 5}
    columns |= dict.fromkeys(("north", "south"), max(5, columns["rank"]))

    yield "  ".join(name.rjust(width) for name, width in columns.items())
    listed = shown if everything else shown[:MOST_RANKS]
    for rank in listed:
        record = _record(layout, rows, rank)
        record |= {at: "pole" for at in ("north", "south") if record[at] is None}
        if rows is not None:
            start, stop = record["rows"]
            record |= {"rows": f"{start}..{stop - 1}", "count": stop - start}
        yield "  ".join(str(record[name]).rjust(width) for name, width in columns.items())
    if len(listed) < len(shown):
        yield f"... and {len(shown) - len(listed)} more ranks: --all lists them, --rank R shows one"
