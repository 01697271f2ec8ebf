import importlib.metadata
import importlib.resources

import pytest

import credit_domain


def test_version_is_that_of_the_installed_distribution():
    try:
        installed = importlib.metadata.version("credit-domain")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("credit-domain is not installed: the tests run from source")
    assert credit_domain.__version__ == installed


def test_every_public_name_resolves():
    assert len(set(credit_domain.__all__)) == len(credit_domain.__all__)
    for name in credit_domain.__all__:
        assert hasattr(credit_domain, name), name


def test_is_marked_as_typed():
    assert importlib.resources.files(credit_domain).joinpath("py.typed").is_file()
