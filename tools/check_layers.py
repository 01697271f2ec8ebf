"""Check that each package imports only from the layers below it, and only from their faces.

    python tools/check_layers.py credit-mesh credit-halo credit-domain credit-parallel

The packages are named lowest first. That nothing imports an upper layer is a rule of the linter, in each package's
pyproject.toml; this makes sure that nobody loses one unnoticed, by showing the linter such an import for every pair.
That upper layers import from faces alone is checked here. Tests may reach through a face (to count what it sends, say),
but not around it.
"""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FACES = {
    "credit_mesh": ["credit_mesh", "credit_mesh.cli", "credit_mesh.extend", "credit_mesh.torch_floor"],
    "credit_halo": ["credit_halo", "credit_halo.extend", "credit_halo.testing"],
    "credit_domain": [
        "credit_domain",
        "credit_domain.adapters",
        "credit_domain.blocks",
        "credit_domain.casts",
        "credit_domain.convert",
        "credit_domain.extend",
        "credit_domain.functional",
        "credit_domain.halo_exchange",
        "credit_domain.layers",
        "credit_domain.manager",
        "credit_domain.sharding",
        "credit_domain.verification",
    ],
    "credit_parallel": [],
}
"""What upper layers may import of a package: these modules, and of each what its ``__all__`` lists."""


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


def behind_faces(source: str, root: Path, lower: list[str], *, through: bool = False) -> Iterator[tuple[int, str]]:
    """What a module takes from behind the faces of lower layers.

    Args:
        source: The text of the module.
        root: The root of the repository.
        lower: The import names of the layers below.
        through: Whether it may use more of a face than its ``__all__`` lists, by attributes.

    Yields:
        The line, and what is wrong there.
    """
    tree = ast.parse(source)
    modules: dict[str, str] = {}  # what a name in this file stands for, where that is a module of a lower layer
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _top(node.module or "") in lower:
            for alias in node.names:
                problem, module = _imported(root, node.module or "", alias.name)
                if problem:
                    yield node.lineno, problem
                elif module:
                    modules[alias.asname or alias.name] = module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _top(alias.name) in lower:
                    if not _is_face(alias.name):
                        yield node.lineno, f"{alias.name} is no face of {_top(alias.name)}"
                    modules[alias.asname or _top(alias.name)] = alias.name if alias.asname else _top(alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str) and _top(name) in lower and not _is_face(name):
                yield node.lineno, f"{name} is no face of {_top(name)}"
    if through:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            module = _module_of(root, node.value, modules)
            if module:
                problem, _ = _taken(root, module, node.attr)
                if problem:
                    yield node.lineno, problem


def _top(module: str) -> str:
    return module.partition(".")[0]


def _is_face(module: str) -> bool:
    return module in FACES[_top(module)]


def _imported(root: Path, module: str, name: str) -> tuple[str, str]:
    """As :func:`_taken`, for ``from module import name``."""
    if not _is_face(module):
        return f"{module} is no face of {_top(module)}", ""
    return _taken(root, module, name)


def _taken(root: Path, module: str, name: str) -> tuple[str, str]:
    """What is wrong with taking a name from a module, if anything; and which module the name is, if it is one."""
    if _is_face(f"{module}.{name}"):
        return "", f"{module}.{name}"
    if (name.startswith("_") and not name.endswith("__")) or name not in _names(root, module):
        return f"{name} is not in __all__ of {module}", ""
    return "", _names(root, module)[name]


def _module_of(root: Path, node: ast.expr, modules: dict[str, str]) -> str:
    """The module of a lower layer that an expression stands for; empty if it is none."""
    if isinstance(node, ast.Name):
        return modules.get(node.id, "")
    if isinstance(node, ast.Attribute) and (module := _module_of(root, node.value, modules)):
        return _taken(root, module, node.attr)[1]
    return ""


@cache
def _names(root: Path, module: str) -> dict[str, str]:
    """The names in ``__all__`` of a module, each with the module that it is, or with nothing."""
    tree = ast.parse(_file(root, module).read_text())
    listed: list[str] = []
    origins: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            listed = ast.literal_eval(node.value)
        elif isinstance(node, ast.ImportFrom):
            origins.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    if not listed:
        raise SystemExit(f"{module} is a face, and has no __all__ that is written out")
    modules = {name for name, origin in origins.items() if _top(origin) == _top(module) and _exists(root, origin)}
    return {name: origins[name] if name in modules else "" for name in listed}


def _exists(root: Path, module: str) -> bool:
    base = _base(root, module)
    return base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()


def _file(root: Path, module: str) -> Path:
    base = _base(root, module)
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _base(root: Path, module: str) -> Path:
    return root.joinpath("packages", _top(module).replace("_", "-"), "src", *module.split("."))


def check_faces(root: Path, packages: list[str]) -> list[str]:
    """Each place of the packages that reaches behind a face, as a line."""
    found = []
    names = [package.replace("-", "_") for package in packages]
    for package, name in zip(packages, names, strict=True):
        lower = names[: names.index(name)]
        for part in ("src", "tests"):
            for path in sorted((root / "packages" / package / part).rglob("*.py")):
                for line, problem in behind_faces(path.read_text(), root, lower, through=part == "tests"):
                    found.append(f"{path.relative_to(root)}:{line}: {problem}")
    return found


def main(packages: list[str]) -> int:
    """Try every pair, and read every module; return the exit status."""
    problems = check_faces(Path(), packages)
    for lower, upper in itertools.combinations(packages, 2):
        if not refused(lower, upper):
            problems.append(f"the linter lets {lower} import {upper}, a layer above it")
        if refused(upper, lower):
            problems.append(f"the linter refuses that {upper} imports {lower}, a layer below it")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"layers: {' < '.join(packages)}, kept by the linter; upper ones import from faces alone")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
