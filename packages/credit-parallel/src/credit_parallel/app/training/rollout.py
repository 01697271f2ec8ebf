"""Stepping a model forward on its own output."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def rollout(
    model: Callable[[Tensor], Tensor], states: Tensor, forcings: Tensor, increments: Tensor
) -> Iterator[Tensor]:
    """The states that follow, one for each step; sharded throughout, nothing is gathered.

    The model sees the last states and the forcings of a step as channels, and returns the change to the next state in
    units of the typical change.

    Args:
        model: From (B, history * C + F, H, W) to (B, C, H, W).
        states: Normalised states of shape (B, history, C, H, W), this rank's rows, the newest last.
        forcings: Of shape (B, steps, F, H, W), those of the input's time, for each step; F may be 0.
        increments: The typical change of each channel over a step, in units of the normalised states, of shape (C,).

    Yields:
        Normalised states of shape (B, C, H, W), in the dtype of ``states``.
    """
    scale = increments.to(states).view(-1, 1, 1)
    for step in range(forcings.shape[1]):
        out = model(torch.cat([states.flatten(1, 2), forcings[:, step]], 1))
        state = states[:, -1] + out.to(states.dtype) * scale
        yield state
        states = torch.cat([states[:, 1:], state[:, None]], 1)
