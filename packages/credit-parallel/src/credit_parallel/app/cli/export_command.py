"""``credit-parallel export``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EPILOG = """\
Examples:
  credit-parallel export runs/first model.safetensors
  credit-parallel export runs/first/checkpoints/step-00001000 model.pt
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write the weights of a checkpoint as a state dict of the plain model",
        description="Write the weights of a checkpoint as a state dict of the plain model, for other programs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN", help="the folder of a training, of checkpoints, or one checkpoint")
    parser.add_argument("file", metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format",
        choices=("safetensors", "torch"),
        help="safetensors, or torch for torch.save (default: safetensors if FILE ends in .safetensors, else torch)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file; returns the exit status."""
    from credit_parallel.app.training.loop import CHECKPOINTS
    from credit_parallel.checkpoint import export_plain

    inner = Path(args.folder) / CHECKPOINTS
    export_plain(inner if inner.is_dir() else args.folder, args.file, format=args.format)
    print(f"wrote {args.file}", file=sys.stderr)
    return 0
