"""``credit-parallel plan``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from torch import nn

from credit_domain.casts import cast_module
from credit_parallel.app.config import ModelConfig, RunConfig
from credit_parallel.app.models import build_model, parse_options
from credit_parallel.layouts import LayoutPlans, plan_layouts
from credit_parallel.trainer_section import Conf

EPILOG = """\
Each line of the table is a layout: how replicas are kept in step (data), how many there are (dp), how many ranks share
the channels (tensor) and the latitude rows (domain) of a sample. Of a step of the optimizer, the rank that sends most
sends so many bytes of rows (halo, in so many messages), of gradients and parameters, and of activations that
tensor-parallel layers sum (all-reduce). The last column is an estimate of the memory that a rank needs: out of memory
where it is more than --memory. Samples go through a replica in so many micro-batches. The layout to take is marked.

Examples:
  credit-parallel plan -c config.yml --world 64 --memory 80
  credit-parallel plan --model unet --grid 721x1440 --channels 70 --option width=64 --world 64 --batch-size 16
  credit-parallel plan --model my.models:Swin --grid 181x360 --channels 20 --world 8 --amp --layers

It needs no GPU and no data, but for their shape.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="list the layouts that fit a model and a number of ranks, and which to take",
        description="List the layouts of ranks that fit a model, its grid and its batch, and say which to take.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to train: a configuration, or a model and a grid")
    what.add_argument("-c", "--config", metavar="FILE", help="configuration, in YAML; the grid is that of its data")
    what.add_argument("--model", metavar="NAME", help="unet, transformer, or package.module:factory")
    what.add_argument("--grid", metavar="HxW", help="rows x columns, such as 721x1440")
    what.add_argument("--channels", type=int, metavar="C", help="channels of the input")
    what.add_argument("--out-channels", type=int, metavar="C", help="channels of the output (default: as the input)")
    what.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the model; may be repeated"
    )
    how = parser.add_argument_group("how; what is left out is that of the configuration")
    how.add_argument("--world", type=int, required=True, metavar="N", help="number of ranks")
    how.add_argument("--batch-size", type=int, metavar="B", help="samples of a step, of all replicas (default 1)")
    how.add_argument("--memory", type=float, metavar="GIB", help="memory of a rank; what needs more is not taken")
    how.add_argument("--amp", action="store_true", help="compute in bfloat16")
    how.add_argument("--activation-checkpoint", action="store_true", help="recompute blocks in the backward")
    how.add_argument(
        "--partition",
        choices=("auto", "modules", "graph"),
        help="convert modules, partition operation by operation, or the second where modules are refused (default)",
    )
    parser.add_argument("--layers", action="store_true", help="show the exchanges of the layout to take by layer")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns the exit status: 1 if no layout fits."""
    plans = _of_config(args) if args.config else _of_model(args)
    if args.json:
        print(json.dumps(plans.to_dict()))
    else:
        print(plans)
        if args.layers and plans.chosen is not None:
            print()
            print(
                plans.chosen.domain_plan
                or "no rows are exchanged: each rank has whole samples, or its share of channels"
            )
    return 0 if plans.chosen is not None else 1


def _of_config(args: argparse.Namespace) -> LayoutPlans:
    from credit_parallel.app.data.opening import open_source
    from credit_parallel.app.training.experiment import channels_in

    given = [name for name in ("model", "grid", "channels", "out_channels") if getattr(args, name) is not None]
    if given or args.option:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in (given or ["option"]))
        raise ValueError(f"{named}: the configuration says so; give either -c, or --model, --grid and --channels")
    config = RunConfig.from_file(args.config)
    trainer, source = config.trainer, open_source(config.data)
    return _plans(
        args,
        config.model,
        channels_in(config, source),
        len(source.channels),
        (source.grid.height, source.grid.width),
        source.grid.periodic,
        batch_size=trainer.batch_size if args.batch_size is None else args.batch_size,
        amp=args.amp or trainer.amp,
        activation_checkpoint=args.activation_checkpoint or trainer.activation_checkpoint,
        accumulate=trainer.grad_accum_steps,
        rollout=trainer.rollout,
        method=args.partition or trainer.parallelism.partition,
        conf=trainer,
        dtype=trainer.dtype,
    )


def _of_model(args: argparse.Namespace) -> LayoutPlans:
    missing = [f"--{name}" for name in ("model", "grid", "channels") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"needs -c FILE, or --model, --grid and --channels; {' and '.join(missing)} missing")
    for name, value in (("--channels", args.channels), ("--out-channels", args.out_channels)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}")
    return _plans(
        args,
        ModelConfig(args.model, parse_options(args.option)),
        args.channels,
        args.channels if args.out_channels is None else args.out_channels,
        _grid(args.grid),
        True,
        batch_size=1 if args.batch_size is None else args.batch_size,
        amp=args.amp,
        activation_checkpoint=args.activation_checkpoint,
        method=args.partition or "auto",
    )


def _plans(
    args: argparse.Namespace,
    config: ModelConfig,
    channels: int,
    out_channels: int,
    grid: tuple[int, int],
    periodic: bool,
    *,
    dtype: str = "float32",
    conf: Conf = None,
    **how: Any,
) -> LayoutPlans:
    import torch

    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory must be a number of GiB above 0; got {args.memory}")
    height, width = grid
    model: nn.Module = build_model(
        config, in_channels=channels, out_channels=out_channels, height=height, width=width, periodic=periodic
    )
    cast_module(model, getattr(torch, dtype))
    memory = None if args.memory is None else round(args.memory * 2**30)
    shape = (1, channels, height, width)
    return plan_layouts(model, input_shape=shape, world=args.world, gpu_memory=memory, conf=conf, **how)


def _grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ValueError(f"--grid must be rows x columns, such as 721x1440; got {text!r}")
    return int(rows), int(columns)
