"""Check one installed wheel from within the clean environment that holds it.

    python -I tools/check_wheel.py credit-halo 0.1.0 credit-mesh

It imports every module, and runs every command for its help. Arguments: the package, the version that
`hatch version` gives, and the layers below it. Standard library only, since nothing else is installed there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class Recorder(MetaPathFinder):
    """Notes every top-level `credit_*` module that is asked for, also where the import then fails."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Note the name, and leave it to the other finders."""
        if fullname.startswith("credit_"):
            self.asked.add(fullname.partition(".")[0])
        return None


def problems(package: str, version: str, below: list[str]) -> list[str]:
    """What is wrong with the installed package, in words."""
    found = []
    distribution = importlib.metadata.distribution(package)
    module_name = package.replace("-", "_")

    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    siblings = {name for name in names if name.startswith("credit-")}
    if siblings != {package, *below}:
        found.append(f"installed are {sorted(siblings)}, expected {sorted({package, *below})}")

    files = {str(file) for file in distribution.files or ()}
    if f"{module_name}/py.typed" not in files:
        found.append("py.typed is missing")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in files):
        found.append("LICENSE is missing")
    scripts = {entry.name for entry in distribution.entry_points if entry.group == "console_scripts"}
    own = {file for file in files if file.rpartition("/")[2].removesuffix(".exe") in scripts}
    if strangers := {f for f in files - own if not f.startswith((f"{module_name}/", f"{module_name}-"))}:
        found.append(f"files outside of the package: {sorted(strangers)}")

    recorder = Recorder()
    sys.meta_path.insert(0, recorder)
    module = importlib.import_module(module_name)
    for info in pkgutil.walk_packages(module.__path__, prefix=f"{module_name}."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    if upper := recorder.asked - {name.replace("-", "_") for name in (package, *below)}:
        found.append(f"imports {sorted(upper)}, which is not a layer below it")

    for name in sorted(scripts):
        command = Path(sys.executable).parent / name
        done = subprocess.run([str(command), "--help"], capture_output=True, text=True, check=False)
        if done.returncode or "usage" not in done.stdout.lower():
            found.append(f"`{name} --help` ends with status {done.returncode}: {done.stderr.strip()[-500:]}")

    for source, has in (("metadata", distribution.version), ("__version__", module.__version__)):
        if has != version:
            found.append(f"{source} says version {has}, hatch says {version}")
    found += [f"{name} is in __all__ and not there" for name in module.__all__ if not hasattr(module, name)]
    return found


def main(package: str, version: str, *below: str) -> int:
    """Print the result; return the exit status."""
    found = problems(package, version, list(below))
    for problem in found:
        print(f"{package}: {problem}", file=sys.stderr)
    if not found:
        print(f"{package} {version}: installs with {', '.join(below) or 'no sibling'} alone, imports, runs, is typed")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
