"""Check that a tag such as `credit-mesh-v0.1.0` names a package of this repository at its present version.

    python tools/check_release_tag.py credit-mesh-v0.1.0

Prints `package=...` and `version=...` (the release workflow reads these lines), or says what does not fit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def hatch_version(package_dir: Path) -> str:
    """The version that hatch would build."""
    command = [sys.executable, "-m", "hatch", "version"]
    return subprocess.run(command, cwd=package_dir, check=True, capture_output=True, text=True).stdout.strip()


def check(tag: str, root: Path = ROOT, version_of: Callable[[Path], str] = hatch_version) -> tuple[str, str]:
    """The package and the version that a tag names.

    Raises:
        ValueError: If the tag, the package's version and its changelog do not agree.
    """
    match = re.fullmatch(r"(?P<package>credit-[a-z]+)-v(?P<version>\d[\w.]*)", tag)
    if match is None:
        raise ValueError(f"{tag!r} is not of the form credit-<package>-v<version>, e.g. credit-mesh-v0.1.0")
    package, version = match["package"], match["version"]
    package_dir = root / "packages" / package
    if not (package_dir / "pyproject.toml").is_file():
        raise ValueError(f"{tag!r} names {package}, and there is no packages/{package}")
    present = version_of(package_dir)
    if present != version:
        raise ValueError(f"{tag!r} names version {version}, and {package} is at {present} (`hatch version`)")
    changelog = (package_dir / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\s*$", changelog, re.MULTILINE):
        raise ValueError(f"packages/{package}/CHANGELOG.md has no heading `## [{version}] - YYYY-MM-DD`")
    return package, version


def main(tag: str) -> int:
    """Print what the tag names, or why it is refused; return the exit status."""
    try:
        package, version = check(tag)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"package={package}\nversion={version}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
