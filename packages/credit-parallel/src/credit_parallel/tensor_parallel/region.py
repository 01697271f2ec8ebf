"""Into and out of the region of a block where each tp rank has its own channels.

Every rank of the group computes the same loss, and it counts once. In that convention, which is not the one of
:mod:`credit_halo.collectives`, what enters the region is a copy whose gradient is summed, and what leaves it is a sum
whose gradient is copied:

================  ==============================  ==============================
function          forward, on rank r              backward, on rank r
================  ==============================  ==============================
copy_to_region    y_r = x                         sum over q of g_q
sum_from_region   y = sum over q of x_q           g
================  ==============================  ==============================
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_domain.extend import each_entry, version_of
from credit_halo.extend import agree, break_group, group_by_name, keep_order, prepare_inductor, refuse_broken


def copy_to_region(x: Tensor, group: str, label: str) -> Tensor:
    """``x``, which is the same on every rank, for use on this rank's channels; ``group`` is the name of the tp group.

    Shape, dtype and the need for a gradient are compared once for each.

    Collectives: one sum, in the backward.
    """
    if not torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        _agree(x, group_by_name(group), f"{label} (input)")
    out: Tensor = _Copy.apply(x, group, label)  # type: ignore[no-untyped-call]
    return out


def sum_from_region(x: Tensor, group: str, label: str) -> Tensor:
    """The sum of the ranks' ``x``, the same on every rank: one sum in the forward; errors as :func:`copy_to_region`."""
    compiling = torch.compiler.is_compiling()
    if torch.compiler.is_exporting():
        return _TracedSum.apply(x, group, label)  # type: ignore[no-any-return, no-untyped-call]
    if not compiling:
        _agree(x, group_by_name(group), f"{label} (output)")
    out: Tensor = _sum(x, group, label, compiling)
    return out


class Region:
    """What enters the region of one block: layers that read the same tensor share one sum of its gradient.

    Tensors are remembered while the block's ``forward`` runs, and no longer. In compiled code each layer has a sum of
    its own.
    """

    def __init__(self) -> None:
        self._entered: list[tuple[Tensor, int, Tensor]] | None = None

    def open(self, *_: Any) -> None:
        """Forward pre-hook of the block."""
        self._entered = []

    def close(self, *_: Any) -> None:
        """Forward hook of the block."""
        self._entered = None

    def enter(self, x: Tensor, group: str, label: str) -> Tensor:
        """:func:`copy_to_region`, the same copy for the same tensor."""
        if self._entered is None or torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
            return copy_to_region(x, group, label)
        for seen, version, copy in self._entered:
            if seen is x and version == version_of(x):
                return copy
        copy = copy_to_region(x, group, label)
        self._entered.append((x, version_of(x), copy))
        return copy


class _Copy(torch.autograd.Function):
    """A view: an operator could not return its input, and a copy would be kept for the backward of what reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, label: str) -> Tensor:
        ctx.group, ctx.label = group, label
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, ctx.group, ctx.label, False), None, None


@torch.library.custom_op("credit_parallel::sum_from_region", mutates_args=())
def _sum(x: Tensor, group: str, label: str, compiled: bool) -> Tensor:
    pg = group_by_name(group)
    refuse_broken(pg, label)
    if compiled:
        _agree(x, pg, f"{label} (output)")
    out = x.clone(memory_format=torch.contiguous_format)
    try:
        dist.all_reduce(out, group=pg)
    except RuntimeError as error:
        message = f"{label}: its sum failed on rank {dist.get_rank(pg)} of {dist.get_world_size(pg)}: {error}"
        raise break_group(pg, message) from error
    return out


@_sum.register_fake
def _(x: Tensor, group: str, label: str, compiled: bool) -> Tensor:
    prepare_inductor()
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.label, _ = inputs


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _Copy.apply(grad, ctx.group, ctx.label), None, None, None  # type: ignore[no-untyped-call]


_sum.register_autograd(_sum_backward, setup_context=_sum_setup)
keep_order(_sum)


class _TracedSum(torch.autograd.Function):
    """:func:`sum_from_region` in the trace of a model that is partitioned: no operator whose order is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, label: str) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("a trace has no backward")  # a program calls sum_from_region


each_entry(_Copy, copy_to_region)
each_entry(_TracedSum, sum_from_region)


def _agree(x: Tensor, group: ProcessGroup, what: str) -> None:
    gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    said = f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}{gradient}"
    agree(group, f"{what}: {said}", what, lambda: said, x.device)
