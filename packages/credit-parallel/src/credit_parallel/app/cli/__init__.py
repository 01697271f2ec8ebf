"""The command line, ``credit-parallel``."""
