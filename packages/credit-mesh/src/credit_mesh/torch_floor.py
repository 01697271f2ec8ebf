"""Refuses a torch that is too old, when it is imported.

Every package imports this first, so that an old torch is named, and not one of the names that it lacks.
"""

from __future__ import annotations

import re

import torch

__all__ = ["TORCH_FLOOR", "check_torch"]

TORCH_FLOOR = (2, 11)
"""The oldest torch on which all tests pass: major and minor version."""


def check_torch(version: str) -> None:
    """Make sure that a version of torch is not too old.

    Args:
        version: As torch gives it, such as ``"2.13.0+cpu"``.

    Raises:
        ImportError: If it is older than :data:`TORCH_FLOOR`.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise ImportError(
            f"the credit packages need torch {floor} or later, and torch {version} is installed: "
            f"pip install 'torch>={floor}'"
        )


check_torch(torch.__version__)
