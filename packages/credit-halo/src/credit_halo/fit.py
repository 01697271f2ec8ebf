"""Whether a tensor fits a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from credit_halo.plan import ExchangePlan


def misfit(shape: Sequence[int], dtype: torch.dtype, plan: ExchangePlan, dim: int) -> str | None:
    """What of a tensor does not fit a plan, if anything does not."""
    shape = tuple(shape)
    ndim = len(shape)
    if not -ndim <= dim < ndim:
        return f"dim={dim} is out of range for a tensor of shape {shape}"
    if shape[dim] != plan.in_rows:
        return (
            f"the tensor of shape {shape} has {shape[dim]} rows in dim {dim}, where {plan.partition} says "
            f"{plan.in_rows}"
        )
    if plan.edge.kind == "constant" and not _holds(dtype, plan.edge.value):
        return f"the edge value {plan.edge.value} does not fit the dtype {dtype}"
    if plan.edge.kind == "pole":
        lon_dim = plan.edge.lon_dim
        if not -ndim <= lon_dim < ndim or (lon_dim - dim) % ndim == 0:
            return f"lon_dim={lon_dim} must be a dim of a tensor of shape {shape} other than the sharded one, {dim}"
        if shape[lon_dim] % 2:
            return f"crossing a pole turns by half the longitudes: their number must be even, and is {shape[lon_dim]}"
        signs, channel_dim = plan.edge.signs, plan.edge.channel_dim
        if signs not in (1, (1,)) and dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
            return f"signs of {signs} need a dtype with negative numbers; got {dtype}"
        fits = -ndim <= channel_dim < ndim and isinstance(signs, tuple) and shape[channel_dim] == len(signs)
        fits = fits and (channel_dim - dim) % ndim != 0 and (channel_dim - lon_dim) % ndim != 0
        if isinstance(signs, tuple) and not fits:
            return f"{len(signs)} signs do not fit channel_dim={channel_dim} of a tensor of shape {shape}"
    return None


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether a dtype has a number."""
    if dtype.is_floating_point or dtype.is_complex:
        return True
    if dtype == torch.bool:
        return value in (0, 1)
    limits = torch.iinfo(dtype)
    return float(value).is_integer() and limits.min <= value <= limits.max
