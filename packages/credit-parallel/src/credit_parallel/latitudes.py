"""Latitudes as files have them: off by the rounding of float32, or wrong."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-4
"""Degrees by which a latitude or a longitude that was radians or degrees in float32 may be off, and some more."""


def checked_latitudes(latitudes: Tensor) -> Tensor:
    """Latitudes, degrees north, in float64; one within rounding of a pole, such as 90.0000025, is the pole.

    A ValueError refuses what is farther beyond a pole, or not a number.
    """
    found = torch.as_tensor(latitudes).to(torch.float64)
    wrong = ~(found.abs() <= 90 + ROUNDING)
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        raise ValueError(f"latitudes must be within -90 to 90 degrees; got {_number(found, at)} at index {at}")
    near = (found.abs() - 90).abs() <= ROUNDING
    return torch.where(near, torch.sign(found) * 90, found)


def check_order(latitudes: Tensor) -> None:
    """Raise a ValueError unless latitudes are 1-D and increase, or decrease, from each to the next."""
    if latitudes.ndim != 1 or not len(latitudes):
        raise ValueError(f"latitudes must be 1-D and in order, one or more of them; got shape {tuple(latitudes.shape)}")
    steps = latitudes.diff()
    southward = bool(len(steps)) and float(latitudes[0]) > float(latitudes[-1])
    wrong = ~(steps < 0 if southward else steps > 0)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            "latitudes must be 1-D and in order, north to south or south to north; they go from "
            f"{_number(latitudes, 0)} to {_number(latitudes, -1)}, and {_number(latitudes, at)} at index {at} is "
            f"followed by {_number(latitudes, at + 1)}"
        )


def _number(values: Tensor, at: int) -> str:
    """With the digits that a check looks at."""
    return f"{float(values.flatten()[at]):.10g}"
