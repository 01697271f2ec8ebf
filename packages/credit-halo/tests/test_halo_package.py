import importlib.metadata
import importlib.resources

import pytest

import credit_halo


def test_version_is_that_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("credit-halo")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("credit-halo is not installed: the tests run from source")
    assert credit_halo.__version__ == installed


def test_every_public_name_resolves():
    assert len(set(credit_halo.__all__)) == len(credit_halo.__all__)
    for name in credit_halo.__all__:
        assert hasattr(credit_halo, name), name


def test_is_marked_as_typed():
    assert importlib.resources.files(credit_halo).joinpath("py.typed").is_file()
