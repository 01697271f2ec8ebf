import ast
import importlib.metadata
import importlib.resources
from pathlib import Path

import pytest

import credit_parallel


def test_version_is_that_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("credit-parallel")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("credit-parallel is not installed: the tests run from source")
    assert credit_parallel.__version__ == installed


def test_every_public_name_resolves():
    assert len(set(credit_parallel.__all__)) == len(credit_parallel.__all__)
    for name in credit_parallel.__all__:
        assert hasattr(credit_parallel, name), name


def test_is_marked_as_typed():
    assert importlib.resources.files(credit_parallel).joinpath("py.typed").is_file()


def imported(source):
    """The modules that a source imports, late imports too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_the_library_does_not_import_the_application():
    root = Path(credit_parallel.__file__).parent
    library = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in ("app", "__main__.py")]
    assert len(library) > 30
    wrong = [
        f"{path.relative_to(root)} imports {name}"
        for path in library
        for name in imported(path.read_text())
        if f"{name}.".startswith("credit_parallel.app.")
    ]
    assert not wrong


def test_an_import_of_the_application_is_seen():
    late = "def f():\n    from credit_parallel import app"
    assert list(imported(f"import credit_parallel.app.config\n{late}")) == [
        *("credit_parallel.app.config", "credit_parallel.app")
    ]
