import importlib.metadata
import importlib.resources

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
