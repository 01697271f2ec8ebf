"""Check that the linter refuses an import of an upper layer, by showing it one for every pair of layers.

    python tools/check_layers.py credit-mesh credit-halo credit-domain credit-parallel

The packages are named lowest first. The rules themselves are in each package's pyproject.toml; this makes
sure that nobody loses one unnoticed.
"""

from __future__ import annotations

import itertools
import subprocess
import sys


def refused(package: str, imported: str) -> bool:
    """Does ruff refuse that a module of `package` imports `imported`, and for that reason?"""
    module = package.replace("-", "_")
    # The file need not exist: ruff takes its settings from the name.
    path = f"packages/{package}/src/{module}/_probe.py"
    source = f'"""Probe."""\n\nimport {imported.replace("-", "_")}\n'
    ruff = subprocess.run(
        ["ruff", "check", "--select", "TID251", "--output-format", "concise", "--stdin-filename", path, "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if ruff.returncode not in (0, 1):
        raise SystemExit(f"ruff failed: {ruff.stderr}")
    return "TID251" in ruff.stdout


def main(packages: list[str]) -> int:
    """Try every pair; return the exit status."""
    wrong = 0
    for lower, upper in itertools.combinations(packages, 2):
        if not refused(lower, upper):
            print(f"the linter lets {lower} import {upper}, a layer above it", file=sys.stderr)
            wrong += 1
        if refused(upper, lower):
            print(f"the linter refuses that {upper} imports {lower}, a layer below it", file=sys.stderr)
            wrong += 1
    if not wrong:
        print(f"layers: {' < '.join(packages)}, kept by the linter")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
