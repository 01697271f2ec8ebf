"""The version of this package, kept by `hatch version`."""

__version__ = "0.1.0"
