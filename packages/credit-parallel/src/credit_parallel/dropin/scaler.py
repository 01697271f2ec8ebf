"""Torch's gradient scaler, for programs that make their own, on a model with parameters divided over tp ranks.

It looks for what is not finite in all gradients of one dtype at once, and torch refuses such a list where some are
DTensors and others plain tensors. The plain ones are the same on all tp ranks, so they are passed as replicated
DTensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

_original: Callable[..., None] = GradScaler.unscale_


@functools.wraps(_original)
def unscale(self: GradScaler, optimizer: torch.optim.Optimizer) -> Any:
    """``GradScaler.unscale_``, of DTensors beside plain tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    meshes = {p.grad.device_mesh for p in parameters if isinstance(p.grad, DTensor)}
    if len(meshes) != 1 or all(isinstance(p.grad, DTensor) for p in parameters):
        return _original(self, optimizer)
    (mesh,) = meshes
    groups = optimizer.param_groups
    try:
        optimizer.param_groups = [{"params": [_replicated(p, mesh) for p in parameters]}]
        return _original(self, optimizer)
    finally:
        optimizer.param_groups = groups


def _replicated(parameter: Tensor, mesh: DeviceMesh) -> Tensor:
    """A stand-in for a plain parameter, whose gradient shares its memory, so that it is unscaled in place."""
    grad = parameter.grad
    if grad is None or isinstance(grad, DTensor):
        return parameter
    whole = [Replicate()] * mesh.ndim
    stand_in = DTensor.from_local(parameter.detach(), mesh, whole, run_check=False)
    stand_in.grad = DTensor.from_local(grad, mesh, whole, run_check=False)
    return stand_in
