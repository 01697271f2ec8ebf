"""Run the benchmarks: what each measures is at the top of its file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkpoint, compiled, exchange, gpu, nets, planning, scaling, simulate


def run_nets(worlds: list[int], quick: bool) -> list[dict]:
    print("\nnets beside the same on local rows alone: ms of a step, limit/net, memory kept, messages", flush=True)
    sizes = [(64, 64)] if quick else list(nets.SIZES)
    return nets.run(worlds[:1] if quick else worlds, list(nets.NETS), sizes, 3 if quick else 21)


PARTS: dict[str, Callable[[list[int], bool], Any]] = {
    "exchange": lambda worlds, quick: exchange.run(worlds, quick=quick),
    "nets": run_nets,
    "scaling": lambda worlds, quick: scaling.run(worlds, quick=quick),
    "compiled": lambda worlds, quick: compiled.run(quick=quick),
    "planning": lambda worlds, quick: planning.run(quick=quick),
    "checkpoint": lambda worlds, quick: checkpoint.run(worlds, quick=quick),
    "simulate": lambda worlds, quick: simulate.run(quick=quick),
    "gpu": lambda worlds, quick: gpu.run(quick=quick),
}
"""Every part, from the numbers of processes and whether to be quick."""

# Worked out by hand: what a rank with one neighbour sends in a step, and receives. The chain has 9 convolutions, each
# with a message forward and one backward. The UNet has 6, and the rows that the strided one lacks go one way only. The
# three kernels of the embedding that reach beyond their patch read the same tensor, and share one exchange. The
# transformer has stem and head, two strided convolutions, whose rows go one way only, and two blocks with shifted
# windows, whose rows go one way before and back after.
MESSAGES = {"chain": 18, "unet": 11, "embedding": 2, "transformer": 10}
# A norm gathers, then sums; on gloo a small sum is a message to each rank.
NORMS = {"chain": 0, "unet": 4, "embedding": 0, "transformer": 0}


def mistakes(results: dict[str, Any]) -> list[str]:
    """Counts that are not the least possible, and compiled code that computes something else; no time is judged."""
    found = [
        f"exchange: {r['case']}, {r['ranks']} ranks, {text}"
        for r in results.get("exchange", ())
        for text in r["differences"]
    ]
    for r in results.get("nets", ()):
        norms = NORMS[r["net"]]
        least = MESSAGES[r["net"]] * min(2, r["ranks"] - 1) + norms * (r["ranks"] - 1)
        expected = {"sent": least, "received": least, "others": {"allgather": norms} if norms else {}}
        for kind in ("messages", "messages_graph"):
            if r[kind] != expected:
                found.append(f"nets: {r['net']}, {r['ranks']} ranks, {kind}: {r[kind]}; least {expected}")
    for r in results.get("compiled", ()):
        if not r["difference"] <= compiled.TOLERANCE:
            found.append(f"compiled: {r['model']}, {r['layout']}: differs from eager by {r['difference']:.1e}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run them, print a table for each, and return 1 if there are mistakes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="processes (default: 2 4)")
    parser.add_argument("--quick", action="store_true", help="small tensors, few repetitions: a minute in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2:
        parser.error("--ranks must each be 2 or more")

    about = {"torch": torch.__version__, "backend": "gloo", "cores": os.cpu_count(), "threads": exchange.THREADS}
    print("torch {torch}, {backend}, {cores} cores, threads per rank: {threads}".format(**about), flush=True)
    results = {name: part(options.ranks, options.quick) for name, part in PARTS.items() if name in options.only}
    if options.json:
        options.json.write_text(json.dumps({**about, **results}, indent=2) + "\n")
    found = mistakes(results)
    for mistake in found:
        print(f"mistake: {mistake}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
