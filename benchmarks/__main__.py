"""Run the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks import checkpoint, exchange


def main(arguments: list[str] | None = None) -> int:
    """Run them, print a table, and return 1 if a count is not what it must be; no time is ever judged."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="processes (default: 2 4)")
    parser.add_argument("--quick", action="store_true", help="small tensors, few repetitions: a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2:
        parser.error("--ranks must each be 2 or more")

    print(f"torch {torch.__version__}, gloo, {os.cpu_count()} cores, threads per rank: {exchange.THREADS}", flush=True)
    results = exchange.run(options.ranks, quick=options.quick)
    checkpoints = checkpoint.run(options.ranks, quick=options.quick)
    if options.json:
        about = {"torch": torch.__version__, "backend": "gloo", "cores": os.cpu_count(), "threads": exchange.THREADS}
        options.json.write_text(json.dumps({**about, "exchange": results, "checkpoint": checkpoints}, indent=2) + "\n")

    differences = [f"{r['case']}, {r['ranks']} ranks, {text}" for r in results for text in r["differences"]]
    for difference in differences:
        print(f"not the minimum: {difference}", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
