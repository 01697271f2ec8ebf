"""``credit-parallel demo``: the same training on several ranks and on one, side by side."""

from __future__ import annotations

import argparse
import importlib.util
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from credit_parallel.app.config import RunConfig

if TYPE_CHECKING:
    from credit_parallel.app.training.experiment import Checked

TOLERANCE = 1e-6
"""The largest relative difference of two losses of one step that is taken for rounding: in float64, in which sums are
taken in another order and each step builds on the one before."""

LINES = 12
"""Lines of the table of losses."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="a small model on 4 ranks and on one, side by side; no data and no GPU needed",
        description="Train a small model of the barotropic vorticity equation on several ranks, data x domain, with "
        "uneven latitude rows; then the same on one rank. Print both losses, draw them, a forecast, and the layout. "
        "The exit status is 1 if the losses part.",
    )
    parser.add_argument("--folder", default="demo", metavar="DIR", help="where everything goes (default: demo)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="steps of training (default: 100)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes (default: 4)")
    parser.add_argument("--domain", type=int, default=2, metavar="N", help="ranks that share a sample (default: 2)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; returns the exit status."""
    folder = Path(args.folder)
    if args.steps < 2 or args.ranks < 2:
        raise ValueError(f"--steps and --ranks must be 2 or more; got {args.steps} and {args.ranks}")
    for package, extra in (("matplotlib", "plot"), ("xarray", "data")):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the demonstration needs {package}: pip install 'credit-parallel[{extra}]'")
    config = RunConfig.from_dict(_configuration(args))
    from credit_parallel.app.training.experiment import check

    checked = check(config, args.ranks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(config.to_yaml())
    several, one = folder / f"{args.ranks}-ranks", folder / "1-rank"
    for where in (several, one):
        shutil.rmtree(where, ignore_errors=True)  # of an earlier demonstration, which would be gone on with
    train = ["train", "-c", str(folder / "config.yml"), "--folder"]
    alone = ["--ranks", "1", "--set", "trainer.parallelism={}"]
    forecast = ["--steps", "8", "--every", "4", "--field", "v", "--overwrite"]
    files = ["--out", str(folder / "forecast.nc"), "--plot", str(folder / "forecast.png")]
    parts = {
        f"training on {args.ranks} ranks": [*train, str(several), "--ranks", str(args.ranks)],
        "the same on one rank": [*train, str(one), *alone],
        f"a forecast on {args.ranks} ranks": ["forecast", str(several), *forecast, *files, "--ranks", str(args.ranks)],
    }
    for title, command in parts.items():
        print(f"\n== {title}\n   credit-parallel {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "credit_parallel", *command], check=False).returncode
        if status:
            return status
    return _compare(args, checked, folder, several, one)


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "folder": str(Path(args.folder) / f"{args.ranks}-ranks"),
        "data": {
            "options": {"height": 45, "width": 90, "trajectories": 8, "times": 24},
            "lead": 1,
            "train": [0.0, 0.875],
            "valid": [0.875, 1.0],
        },
        "model": {"name": "unet", "width": 16, "levels": 2},
        "trainer": {
            "parallelism": {"data": "ddp", "tensor": 1, "domain": args.domain},
            "steps": args.steps,
            "batch_size": max(4, args.ranks // args.domain),
            "lr": 2e-3,
            "warmup": max(1, args.steps // 10),
            "device": "cpu",
            "dtype": "float64",
        },
    }


def _compare(args: argparse.Namespace, checked: Checked, folder: Path, several: Path, one: Path) -> int:
    from credit_domain import plan_domain_parallel
    from credit_parallel.app.plots import plot_layout, plot_losses
    from credit_parallel.app.training.log import FILE, read_metrics

    a, b = (
        [line["loss"] for line in read_metrics(where / FILE) if line["event"] == "train"] for where in (several, one)
    )
    print("\n".join(_table(args.ranks, a, b)))
    differences = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    # Not a number is worse than any difference, and max() alone would pass it over.
    worst = max(differences, key=lambda difference: float("inf") if math.isnan(difference) else difference)
    apart = not worst <= TOLERANCE
    plot_losses(folder / "loss.png", {f"{args.ranks} ranks": a, "1 rank": b})
    plan = plan_domain_parallel(checked.model, (1, checked.in_channels, *_size(checked)), args.domain)
    halos = [layer.halo for layer in plan.layers if layer.rows == checked.partition.rows]
    plot_layout(
        folder / "layout.png",
        checked.layout,
        checked.partition,
        halo=(max(before for before, _ in halos), max(after for _, after in halos)),
        latitudes=checked.source.grid.latitudes,
    )
    verdict = f"more than {TOLERANCE:g}: the curves part" if apart else "rounding"
    print(
        f"\nlargest relative difference: {worst:.1e}, {verdict}\n"
        f"written to {folder}: loss.png, forecast.png, layout.png, forecast.nc, config.yml, and in {several.name} and "
        f"{one.name} checkpoints, metrics.jsonl and statistics.json"
    )
    return int(apart)


def _size(checked: Checked) -> tuple[int, int]:
    return checked.source.grid.height, checked.source.grid.width


def _table(ranks: int, several: Sequence[float], one: Sequence[float]) -> list[str]:
    """Both losses at some steps, and how far apart they are."""
    steps = sorted({round(i * (len(one) - 1) / (LINES - 1)) for i in range(LINES)})
    lines = ["", f"{'step':>6}  {f'{ranks} ranks':>14}  {'1 rank':>14}  {'difference':>10}"]
    return lines + [f"{i + 1:6}  {several[i]:14.12f}  {one[i]:14.12f}  {abs(several[i] - one[i]):10.1e}" for i in steps]
