"""``credit-parallel train``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from credit_parallel.app.cli.launch import is_rank, run_ranks
from credit_parallel.app.config import RunConfig

if TYPE_CHECKING:
    from credit_parallel.app.training.experiment import Checked

EPILOG = """\
A configuration is YAML with three blocks, all of whose keys have defaults but trainer.steps (or trainer.epochs):

  folder: runs/first             # checkpoints, metrics.jsonl and statistics.json; the same command goes on from there
  data:
    source: era5.nc              # NetCDF, Zarr or GRIB; left out: Rossby-Haurwitz waves, which need no file
    variables: [t2m]
    lead: 6h
  model: {name: unet, width: 32} # or transformer, or my.models:Factory
  trainer:
    parallelism: {data: ddp, tensor: 1, domain: 2}
    steps: 1000
    batch_size: 8                # of all replicas together

Examples:
  credit-parallel train -c config.yml                                    one rank
  credit-parallel train -c config.yml --ranks 4                          four ranks on this machine
  torchrun --nproc-per-node 4 -m credit_parallel train -c config.yml     the same, or on many machines
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="train a model, or go on with a training that was interrupted",
        description="Train a model, or go on where the last checkpoint in the folder of the run was saved.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_configuration(parser)
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to start on this machine")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--check", action="store_true", help="only say what is wrong with the configuration")
    parser.set_defaults(run=run)


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`configuration` reads."""
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="the configuration, in YAML")
    parser.add_argument("--folder", metavar="DIR", help="the folder of the run, in place of the configuration's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a value in place of the file's: trainer.lr=0.1"
    )


def configuration(args: argparse.Namespace, tell: bool) -> RunConfig:
    """The configuration that arguments name; ``tell`` as for :meth:`RunConfig.from_file`."""
    config = RunConfig.from_file(args.config, args.set, tell=tell)
    return dataclasses.replace(config, folder=args.folder) if args.folder else config


def run(args: argparse.Namespace) -> int:
    """Check the configuration, and start the ranks, or be one of them; returns the exit status."""
    from credit_parallel.app.training.distributed import RENDEZVOUS, device_named, joined, place

    at = place()
    first = at.rank == 0 and RENDEZVOUS not in os.environ  # of which the process that started us has told already
    config, ranks, quiet = configuration(args, tell=first), args.ranks, args.quiet
    if ranks < 1:
        raise ValueError(f"--ranks must be 1 or more; got {ranks}")
    checked = _checked(config, at.world_size if is_rank() else ranks, tell=first and not quiet)
    if args.check:
        return 0
    if not is_rank() and ranks > 1:
        return run_ranks(args.arguments, ranks)
    device = device_named(config.trainer.device, at.local_rank)
    with joined(device, config.trainer.first_timeout):
        from credit_parallel.app.cli.progress import Bar
        from credit_parallel.app.training.loop import Reporter, train

        train(checked, device, Reporter() if quiet else Bar())
    return 0


def _checked(config: RunConfig, world_size: int, tell: bool) -> Checked:
    from credit_parallel.app.data.files import chunking_warning
    from credit_parallel.app.training.experiment import check

    checked = check(config, world_size)
    show: Callable[[str], None] = (
        (lambda text: print(f"note: {text}", file=sys.stderr)) if tell else (lambda text: None)
    )
    for note in checked.notes:
        show(note)
    warning = chunking_warning(checked.source, checked.partition)
    if warning:
        show(warning)
    return checked
