"""Dividing another dim over the ranks: one all-to-all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo import debug
from credit_halo._torch_private import keep_order, prepare_inductor
from credit_halo.agreement import agree
from credit_halo.faults import break_group, refuse_broken
from credit_halo.groups import group_by_name
from credit_halo.recompute import ask_entry, reach, save_entry
from credit_halo.transport import as_bytes
from credit_mesh import RowPartition


def transpose_rows(
    x: Tensor,
    partition: RowPartition,
    target: RowPartition,
    *,
    dim: int = -2,
    to_dim: int = -1,
    group: ProcessGroup | None = None,
    label: str = "transpose_rows",
) -> Tensor:
    """Divide another dim over the ranks: each gets all of ``dim``, and its part of ``to_dim``.

    It is its own inverse with the two dims exchanged, and its adjoint likewise.

    Args:
        x: This rank's part along ``dim``, and all of ``to_dim``.
        partition: Who holds which part of ``dim``.
        target: Who is to hold which part of ``to_dim``.
        dim: The dim that is divided.
        to_dim: The dim that is to be divided.
        group: The ranks that take part; None means the whole world, or nobody else where torch.distributed is not
            initialised.
        label: What errors and traces call this; the same on every rank.

    Returns:
        A new contiguous tensor with all of ``dim``, and this rank's part of ``to_dim``.

    Raises:
        ValueError: If the dims are one, or the tensor does not fit the partitions; on all ranks alike, if shapes,
            dtypes or partitions differ.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One all-to-all forward, one backward.
    """
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    problem = _misfit(x, dim, partition, to_dim, target, ranks, rank)
    name = ""
    if ranks > 1:
        chosen = dist.group.WORLD if group is None else group
        assert chosen is not None
        name = chosen.group_name
    compiling = torch.compiler.is_compiling()
    if problem is not None and (compiling or not name):
        raise ValueError(f"{label}: {problem}")
    if name and not compiling:
        _agree(x, dim, partition.sizes, to_dim, target.sizes, group_by_name(name), label, problem)
        if not x.requires_grad:
            reach(x)
    dim, to_dim = dim % x.ndim, to_dim % x.ndim
    with debug.named(label):
        out: Tensor = _transpose(x, dim, list(partition.sizes), to_dim, list(target.sizes), name, label, compiling)
    return out


def _misfit(
    x: Tensor, dim: int, partition: RowPartition, to_dim: int, target: RowPartition, ranks: int, rank: int
) -> str | None:
    if not -x.ndim <= min(dim, to_dim) <= max(dim, to_dim) < x.ndim or dim % x.ndim == to_dim % x.ndim:
        return f"dim={dim} and to_dim={to_dim} must be two dims of a tensor of shape {tuple(x.shape)}"
    if (partition.ranks, target.ranks) != (ranks, ranks):
        return f"partition={partition} and target={target} must be for the {ranks} ranks of the group"
    if (x.shape[dim], x.shape[to_dim]) != (partition.sizes[rank], target.rows):
        return (
            f"a tensor of shape {tuple(x.shape)} must have {partition.sizes[rank]} of dim {dim}, as {partition} says, "
            f"and {target.rows} of dim {to_dim}, as {target} says"
        )
    return None


def _agree(
    x: Tensor,
    dim: int,
    sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    pg: ProcessGroup,
    label: str,
    problem: str | None = None,
) -> None:
    others = [size for d, size in enumerate(x.shape) if d != dim % x.ndim]
    gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    kind = f"{str(x.dtype).removeprefix('torch.')} with {x.ndim} dims, the others {others}{gradient}"
    said = f"{label!r}: from dim {dim} {list(sizes)} to dim {to_dim} {list(to_sizes)} of {kind}"
    agree(pg, said, "transpose_rows", lambda: said, x.device, problem)


@torch.library.custom_op("credit_halo::transpose", mutates_args=())
def _transpose(
    x: Tensor,
    dim: int,
    sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    group: str,
    label: str,
    compiled: bool,
) -> Tensor:
    if not group:
        return x.clone(memory_format=torch.contiguous_format)
    pg = group_by_name(group)
    refuse_broken(pg, f"transpose_rows {label!r}")
    if compiled:
        _agree(x, dim, sizes, to_dim, to_sizes, pg, label)
    debug.compare(pg, lambda: f"transpose_rows {label!r} of {x.dtype}", x.device)
    shapes = [list(x.shape) for _ in sizes]
    for shape, size in zip(shapes, sizes, strict=True):
        shape[dim], shape[to_dim] = size, to_sizes[dist.get_rank(pg)]
    sent = [as_bytes(piece.contiguous()).flatten() for piece in torch.split(x, list(to_sizes), to_dim)]
    received = [x.new_empty(shape) for shape in shapes]
    counts = [piece.numel() * piece.element_size() for piece in received]
    arrived = torch.empty(sum(counts), dtype=torch.uint8, device=x.device)
    try:
        dist.all_to_all_single(arrived, torch.cat(sent), counts, [piece.numel() for piece in sent], group=pg)
    except RuntimeError as error:
        message = f"transpose_rows {label!r} failed on rank {dist.get_rank(pg)} of {len(sizes)}: {error}"
        raise break_group(pg, message) from error
    for piece, data in zip(received, torch.split(arrived, counts), strict=True):
        as_bytes(piece).flatten().copy_(data)
    return torch.cat(received, dim)


@_transpose.register_fake
def _(
    x: Tensor,
    dim: int,
    sizes: Sequence[int],
    to_dim: int,
    to_sizes: Sequence[int],
    group: str,
    label: str,
    compiled: bool,
) -> Tensor:
    prepare_inductor()
    shape = list(x.shape)
    if group:
        shape[dim], shape[to_dim] = sum(sizes), to_sizes[dist.get_rank(group_by_name(group))]
    return x.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.sizes, ctx.to_dim, ctx.to_sizes, ctx.group, ctx.label, _ = inputs
    ctx.said = debug.said()
    save_entry(ctx, x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    with debug.backward_of(ctx.said):
        home = _transpose(grad, ctx.to_dim, ctx.to_sizes, ctx.dim, ctx.sizes, ctx.group, ctx.label, False)
    return home, *[None] * 7


_transpose.register_autograd(_backward, setup_context=_setup)
keep_order(_transpose)
