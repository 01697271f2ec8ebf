"""``credit-parallel layout``."""

from __future__ import annotations

import argparse
import sys

from credit_mesh import ParallelismConfig, RowPartition
from credit_mesh.cli import main as show

EPILOG = """\
Examples:
  credit-parallel layout 8 --domain 4 --height 721 --granularity 8
  credit-parallel layout 64 --tensor 2 --domain 4 --rank 17
  credit-parallel layout 8 --domain 4 --height 41 --plot layout.png

The granularity of a model is the first thing that credit-parallel plan prints: rows in blocks of it.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "layout",
        help="show how ranks lie on the mesh, and which rows each holds",
        description="Show how ranks lie on the (dp, tp, domain) mesh, and which latitude rows each holds.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("world", type=int, metavar="WORLD", help="number of ranks")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="ranks that share the channels (default 1)")
    parser.add_argument("--domain", type=int, default=1, metavar="N", help="ranks that share the rows (default 1)")
    parser.add_argument("--height", type=int, metavar="ROWS", help="latitude rows of the model's input")
    parser.add_argument("--granularity", type=int, default=1, metavar="ROWS", help="rows in a block (default 1)")
    parser.add_argument("--rank", type=int, metavar="R", help="show this rank only")
    parser.add_argument("--all", action="store_true", help="list every rank of a large world too")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--plot", metavar="FILE", help="draw it; needs --height")
    parser.add_argument("--halo", type=int, default=1, metavar="ROWS", help="rows of neighbours to draw (default 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the layout, and draw it; returns the exit status."""
    layout = ParallelismConfig("none", args.tensor, args.domain).layout(args.world)
    partition = None if args.height is None else RowPartition.even(args.height, args.domain, args.granularity)
    if args.rank is not None:
        layout.coords(args.rank)
    if args.plot:
        if partition is None:
            raise ValueError("--plot draws rows: say how many there are, with --height")
        from credit_parallel.app.plots import plot_layout

        plot_layout(args.plot, layout, partition, halo=(args.halo, args.halo))
    arguments = [str(args.world)]
    for name in ("tensor", "domain", "height", "granularity", "rank"):
        if getattr(args, name) is not None:
            arguments += [f"--{name}", str(getattr(args, name))]
    arguments += [f"--{name}" for name in ("all", "json") if getattr(args, name)]
    status = show(arguments)
    if args.plot:
        print(f"drawn to {args.plot}", file=sys.stderr)
    return status
