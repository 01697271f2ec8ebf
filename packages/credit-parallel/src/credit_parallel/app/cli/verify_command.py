"""``credit-parallel verify``."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from credit_domain import VerificationReport, verify_domain_parallel
from credit_domain.casts import cast_module
from credit_domain.extend import plain_copy
from credit_parallel.app.config import ModelConfig
from credit_parallel.app.models import build_model, parse_options

EPILOG = """\
The model runs whole, and once more with its latitude rows divided over ranks (threads of this process: no GPU, no
launcher), in float64. Outputs and the gradients of the input and of every parameter must agree to rounding. A model
whose modules cannot be converted exactly is partitioned operation by operation, and a note says which module it was. If
that fails too, the first module whose result differs is named. Parameters that are zero throughout get small random
values first, since what they multiply would not be seen.

MODEL is unet, transformer, or package.module:factory, also of a module in the working directory. The factory gets those
of in_channels, out_channels, height, width and periodic that it takes (height and width only both), from the first
shape. A height of a few windows or total strides for each rank shows all that a large one would.

Examples:
  credit-parallel verify unet --shape 1,3,41,64
  credit-parallel verify my.models:Swin --shape 1,8,33,64 --ranks 2 3 --option depth=2
  credit-parallel verify my.models:Forced --shape 1,8,33,64 --shape 1,2,33,64
  credit-parallel verify my.models:Swin --shape 1,8,33,64 --partition modules

The exit status is 0 if the model is exact on each number of ranks, 1 if it is not, or is refused, 2 for other mistakes.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "verify",
        help="prove that a model gives the numbers of one rank when its rows are sharded",
        description="Prove that a model gives the numbers of one rank when its rows are sharded, or say where not.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="unet, transformer, or package.module:factory")
    parser.add_argument(
        "--shape", action="append", required=True, metavar="B,C,H,W", help="shape of the input; once for each input"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], metavar="N", help="(default: 2 3 4)")
    parser.add_argument("--out-channels", type=int, metavar="C", help="for the factory (default: as the input)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the model; may be repeated"
    )
    parser.add_argument(
        "--partition",
        choices=("auto", "modules", "graph"),
        default="auto",
        help="convert modules, partition operation by operation, or the second where the first is not exact (default)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a report for each number of ranks; returns the exit status."""
    shapes = [_shape(text) for text in args.shape]
    if min(args.ranks) < 1:
        raise ValueError(f"--ranks must be 1 or more; got {min(args.ranks)}")
    first = shapes[0]
    model: nn.Module = build_model(
        ModelConfig(args.model, parse_options(args.option)),
        in_channels=first[1],
        out_channels=first[1] if args.out_channels is None else args.out_channels,
        height=first[-2],
        width=first[-1],
        periodic=True,
    )
    cast_module(model, torch.float64)
    filled = _fill_zeros(model)
    _run_whole(model, shapes)
    verdicts: list[dict[str, Any]] = []
    for ranks in args.ranks:
        try:
            report = verify_domain_parallel(model, tuple(shapes), ranks, method=args.partition)
        except ValueError as error:
            again = any(verdict.get("refused") == str(error) for verdict in verdicts)
            verdicts.append({"ranks": ranks, "ok": False, "refused": str(error)})
            if not args.json:
                print(f"refused on {ranks} ranks: {'as before' if again else error}")
            continue
        verdicts.append(_to_dict(report))
        if not args.json:
            print(report)
    ok = all(verdict["ok"] for verdict in verdicts)
    if args.json:
        print(json.dumps({"model": args.model, "ok": ok, "zeros_filled": filled, "reports": verdicts}, allow_nan=False))
    elif filled:
        named = ", ".join([*filled[:4], *(["..."] if len(filled) > 4 else [])])
        print(f"note: {len(filled)} parameter(s), zero throughout, were given random values: {named}")
    return 0 if ok else 1


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").split(",")
    if len(sizes) < 3 or not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--shape must be positive numbers, such as 1,3,41,64 for (B, C, H, W); got {text!r}")
    return tuple(map(int, sizes))


def _fill_zeros(model: nn.Module) -> list[str]:
    """Give parameters that are zero throughout random values: behind a layer of zeros every error is zero."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, p in model.named_parameters() if p.numel() and not p.is_meta and not p.any()]
    for name in names:
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1)
    return names


def _run_whole(model: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    """See that a copy of the model runs at all."""
    try:
        with torch.no_grad():
            plain_copy(model)(*(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        listed = " and ".join(map(str, shapes))
        raise ValueError(f"the model cannot be run on one rank with {listed}: {told}") from error


def _to_dict(report: VerificationReport) -> dict[str, Any]:
    partition = report.partition
    plain = {**vars(report), "partition": None if partition is None else list(partition.sizes)}
    plain["difference"] = None if report.difference is None else asdict(report.difference)
    finite: dict[str, Any] = _finite(plain)
    return finite


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
