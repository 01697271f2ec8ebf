"""Partition models of other packages, and write what came of it into the table of docs/zoo.md.

    python tools/zoo.py
    python tools/zoo.py --only Unet FPN

Each model runs in a process of its own, in float64, on 2, 3 and 4 ranks with uneven rows. Outputs, input gradients, the
gradient of every parameter and all buffers are compared with those of one rank.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import warnings
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "zoo.md"
BEGIN, END = "<!-- written by tools/zoo.py -->", "<!-- end -->"
HEAD = ("model", "package", "result", "operators", "messages on 4 ranks", "gathered", "done on every rank")
SECONDS = 600
CUTS = {2: (0.47,), 3: (0.41, 0.66), 4: (0.22, 0.53, 0.78)}
TOLERANCE = 1e-6
"""Of the largest entry: deep models with norms amplify what is rounded in float64; what is wrong differs by tenths."""
SINGLE = 1e-4
"""Likewise for models that compute in float32 by themselves."""


def run_one(name: str) -> dict[str, Any]:
    """What came of a model."""
    import torch
    from torch import nn

    sys.path[:0] = [str(ROOT / "packages" / "credit-domain" / "tests"), str(Path(__file__).parent)]
    from domain_partitioned import check_partitioned
    from zoo_models import ZOO, prepare

    warnings.filterwarnings("ignore")
    prepare()
    entry = ZOO[name]
    torch.manual_seed(0)
    dtype, tolerance, result = torch.float64, TOLERANCE, "exact"
    if entry.single:
        dtype, tolerance, result = torch.float32, SINGLE, "exact in float32"
    model = entry.make() if entry.single else entry.make().double()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # ranks are threads here, which share a generator
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_complex() and not entry.single:
                setattr(module, key, nn.Parameter(parameter.detach().to(torch.complex128)))
    inputs = [torch.randn(*shape, dtype=dtype) for shape in entry.shapes]
    rows = entry.shapes[0][-2]
    report: Any = None
    for cuts in CUTS.values():
        ends = [0, *(round(cut * rows) for cut in cuts), rows]
        report = check_partitioned(model, inputs, tuple(b - a for a, b in pairwise(ends)), rtol=tolerance)
    return {
        "result": result,
        "operators": report.operators,
        "messages": len(report.moves),
        "gathered": sorted({f"{move.operation} ({move.bytes // 1024} KiB)" for move in report.gathered}),
        "repeated": sorted({each.operation for each in report.repeated}),
    }


def result_of(name: str) -> dict[str, Any]:
    """Likewise, from a process that may fail or hang."""
    command = [sys.executable, __file__, "--one", name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"result": f"HANGS: more than {SECONDS} s"}
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    last = [line for line in ended.stderr.splitlines() if line.strip()][-1:]
    kind = "WRONG" if "differs by" in ended.stderr else "fails"
    return {"result": f"{kind}: {' '.join(last)[:160]}"}


def row(name: str, package: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    version = f"{package} {importlib.metadata.version(package)}" if package else "as its paper describes it"
    listed = [", ".join(found.get(key, ())) for key in ("gathered", "repeated")]
    cells = (name, version, found["result"], found.get("operators", ""), found.get("messages", ""), *listed)
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models; the table is not written then")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one)))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from zoo_models import ZOO

    rows = []
    for name, entry in ZOO.items():
        if args.only and name not in args.only:
            continue
        rows.append(row(name, entry.package, result_of(name)))
        print(rows[-1], flush=True)
    if not args.only:
        on = datetime.now(timezone.utc).date()
        said = f"torch {torch.__version__.partition('+')[0]}, {on}."
        lines = [BEGIN, "", said, "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD), *rows, "", END]
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + "\n".join(lines) + rest.partition(END)[2])
    if not all("| exact" in line for line in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
