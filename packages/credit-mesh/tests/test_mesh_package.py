"""The package as users meet it: names, version, and what importing it costs."""

import importlib.metadata
import importlib.resources
import subprocess
import sys

import pytest

import credit_mesh


def test_version_is_that_of_the_installed_distribution() -> None:
    try:
        installed = importlib.metadata.version("credit-mesh")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("credit-mesh runs from source, not installed")
    assert credit_mesh.__version__ == installed


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in credit_mesh.__all__:
        assert getattr(credit_mesh, name) is not None
    assert set(credit_mesh.__all__) <= set(dir(credit_mesh))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        credit_mesh.nothing  # noqa: B018


def test_it_is_typed() -> None:
    assert importlib.resources.files("credit_mesh").joinpath("py.typed").is_file()


def test_arithmetic_does_not_import_torch() -> None:
    code = "import sys, credit_mesh.cli; credit_mesh.RowPartition.even(241, 4); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
