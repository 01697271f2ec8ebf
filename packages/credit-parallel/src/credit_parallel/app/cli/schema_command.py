"""``credit-parallel schema``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from credit_parallel.app.config import RunConfig

EPILOG = """\
Editors with a language server for YAML complete and check a configuration whose first line names the file:

  # yaml-language-server: $schema=credit-parallel.schema.json

Example:
  credit-parallel schema --out credit-parallel.schema.json
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "schema",
        help="write the JSON schema of a configuration, for editors",
        description="Write the JSON schema of a configuration: its keys, what they mean, and what they take.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", metavar="FILE", help="where to (default: the terminal)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the schema; returns the exit status."""
    text = json.dumps(RunConfig.json_schema(), indent=2)
    if args.out:
        Path(args.out).write_text(f"{text}\n")
    else:
        print(text)
    return 0
