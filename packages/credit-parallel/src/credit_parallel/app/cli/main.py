"""``credit-parallel``: what users type."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from credit_parallel._version import __version__

COMMANDS = ("demo", "train", "forecast", "export", "plan", "verify", "layout", "schema")

DESCRIPTION = """\
Train weather and climate models whose samples are shared by several ranks: each holds some latitude rows, and the
numbers are those of one rank.

  credit-parallel demo                          a small model on 4 ranks and on one, side by side
  credit-parallel train -c config.yml --ranks 4 train on this machine
  torchrun ... -m credit_parallel train -c ...  train on a cluster, with the same configuration
  credit-parallel plan -c config.yml --world 64 which layouts of 64 ranks fit, and which to take
  credit-parallel verify my.models:UNet --shape 1,3,41,64
                                                prove that a model of yours is right when it is sharded
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for a user's mistake, 1 if a rank is gone, each mistake in a line."""
    parser = _parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format=f"[rank {rank}] %(message)s")
    args.arguments = arguments
    from credit_halo import ExchangeError
    from credit_parallel.app.config_errors import ConfigError
    from credit_parallel.checkpoint import CheckpointError

    try:
        status: int = args.run(args)
    except (ValueError, CheckpointError, OSError) as error:
        if args.verbose:
            raise
        where = f"[rank {rank}] " if rank else ""
        for mistake in error.mistakes if isinstance(error, ConfigError) else [str(error)]:
            print(f"{where}{parser.prog} {args.command}: {' '.join(mistake.split())}", file=sys.stderr)
        return 2
    except ExchangeError as error:
        if args.verbose:
            raise
        print(f"[rank {rank}] {parser.prog} {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # a reader such as `head` has seen enough; what is left must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="credit-parallel", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what is done, and show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"credit_parallel.app.cli.{name}_command").add_parser(commands)
    return parser
