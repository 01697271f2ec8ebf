"""Differentiable collectives.

One convention for all of them: the inner product of two values is the sum, over the ranks, of their inner products
there. A value that is the same on every rank counts once for each rank. The loss that is differentiated is then the sum
of the ranks' losses, of which each rank holds its share, and every collective here is followed by its exact adjoint:

=============  ==============================  =============================================
function       forward, on rank r              backward, on rank r
=============  ==============================  =============================================
all_sum        y_r = sum over q of x_q         sum over q of the gradients g_q
all_mean       y_r = mean over q of x_q        mean over q of the gradients g_q
broadcast      y_r = x_src                     sum over q of g_q on src, zeros elsewhere
gather_rows    y_r = the rows of all ranks     sum over q of g_q, this rank's rows of it
scatter_rows   y_r = this rank's rows of src   the gradient of all rows on src, none elsewhere
=============  ==============================  =============================================

Where every rank computes the *same* loss from a replicated value, and it is meant to count once, divide it by the
number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo import debug, tagged
from credit_halo._torch_private import keep_order, prepare_inductor
from credit_halo.agreement import agree
from credit_halo.exchange import repartition_rows, take_rows
from credit_halo.faults import break_group, refuse_broken
from credit_halo.groups import group_by_name
from credit_halo.recompute import ask_entry, reach, save_entry
from credit_halo.transport import as_bytes
from credit_mesh import RowPartition


def all_sum(x: Tensor, group: ProcessGroup | None = None, *, label: str = "all_sum") -> Tensor:
    """Sum of ``x`` over the ranks, on every rank.

    Args:
        x: A tensor of the same shape and dtype on every rank.
        group: The ranks that take part; None means the whole world, or nobody else where torch.distributed is not
            initialised.
        label: What errors call this; the same on every rank. A sum carries no label: see ``CREDIT_HALO_DEBUG``.

    Raises:
        ValueError: On all ranks alike, if shapes, dtypes or labels differ (compared the first time that each is used).
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One sum forward, one backward.
    """
    if x.dtype not in _SUMMABLE:
        raise ValueError(f"{label} of {x.dtype} is not offered by every backend: convert it first")
    name, compiled = _agreed(x, group, "all_sum", label)
    if compiled:
        out: Tensor = _sum(x, name, compiled)
        return out
    with debug.named(label):
        out = _sum(x, name, compiled)
    return out


def all_mean(x: Tensor, group: ProcessGroup | None = None, *, label: str = "all_mean") -> Tensor:
    """Mean of ``x`` over the ranks, on every rank; each rank counts the same, however many rows it holds.

    Args:
        x: A floating-point or complex tensor of the same shape and dtype on every rank.
        group: The ranks that take part; see :func:`all_sum`.
        label: As for :func:`all_sum`.

    Raises:
        ValueError: If the dtype has no mean, or as :func:`all_sum`.
        ExchangeError: As :func:`all_sum`.

    Collectives:
        One sum forward, one backward.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"{label} needs a floating-point or complex tensor; got {x.dtype}: convert it, or use all_sum")
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    return all_sum(x / ranks, group, label=label)  # no overflow on the way


def broadcast(x: Tensor, src: int = 0, group: ProcessGroup | None = None, *, label: str = "broadcast") -> Tensor:
    """The value of rank ``src`` on every rank.

    Args:
        x: A tensor of the same shape and dtype on every rank; its values matter on ``src`` alone. It must require a
            gradient on every rank or on none, since every rank takes part in the backward.
        src: Rank within the group.
        group: The ranks that take part; see :func:`all_sum`.
        label: As for :func:`all_sum`.

    Raises:
        ValueError: If ``src`` is no rank of the group, or as :func:`all_sum`.
        ExchangeError: As :func:`all_sum`.

    Collectives:
        One broadcast forward, one sum backward.
    """
    src = _checked_src(src, group)
    name, compiled = _agreed(x, group, f"broadcast from rank {src}", label)
    if compiled:
        out: Tensor = _broadcast(x, src, name, compiled)
        return out
    with debug.named(label):
        out = _broadcast(x, src, name, compiled)
    return out


def gather_rows(
    x: Tensor,
    partition: RowPartition,
    *,
    dim: int = -2,
    group: ProcessGroup | None = None,
    dst: int | None = None,
    label: str = "gather_rows",
) -> Tensor:
    """The rows of all ranks, in order, on every rank or on one.

    Args:
        x: This rank's rows.
        partition: Who owns which rows.
        dim: The sharded dim.
        group: The ranks that take part; see :func:`all_sum`.
        dst: Gather on this rank of the group alone; the others get a tensor without rows.
        label: What errors and traces call this; the same on every rank. Where messages have tags, rows of one label are
            never taken for those of another.

    Raises:
        ValueError: If ``dst`` is no rank of the group, or as :func:`exchange_rows`.
        ExchangeError: As :func:`exchange_rows`.

    Collectives:
        Those of :func:`exchange_rows`: each rank's rows to each rank that gathers.
    """
    if dst is not None:
        _checked_src(dst, group, "dst")
    needs = [range(partition.rows if dst in (None, rank) else 0) for rank in range(partition.ranks)]
    return take_rows(x, needs, partition=partition, dim=dim, group=group, label=label)


def scatter_rows(
    x: Tensor,
    partition: RowPartition,
    *,
    src: int = 0,
    dim: int = -2,
    group: ProcessGroup | None = None,
    label: str = "scatter_rows",
) -> Tensor:
    """Each rank's rows of the tensor on rank ``src``.

    Args:
        x: On ``src`` the whole tensor. On other ranks one of the same dtype and other dims, of which no row is read;
            ``x.new_empty(...)`` with 0 rows will do. It must require a gradient on every rank or on none, since every
            rank takes part in the backward.
        partition: Who is to own which rows.
        src: Rank within the group.
        dim: The sharded dim.
        group: The ranks that take part; see :func:`all_sum`.
        label: As for :func:`gather_rows`.

    Raises:
        ValueError: If ``src`` is no rank of the group, or as :func:`exchange_rows`.
        ExchangeError: As :func:`exchange_rows`.

    Collectives:
        One message from ``src`` to each other rank that owns rows.
    """
    src, rank = _checked_src(src, group), _rank(group)
    whole = RowPartition(tuple(partition.rows * (r == src) for r in range(partition.ranks)), allow_empty=True)
    if rank != src and -x.ndim <= dim < x.ndim:
        x = x.narrow(dim, 0, 0)
    return repartition_rows(x, whole, partition, dim=dim, group=group, label=label)


_SUMMABLE = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int8, torch.uint8),
    )
)

# The operators


@torch.library.custom_op("credit_halo::sum", mutates_args=())
def _sum(x: Tensor, group: str, compiled: bool) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if group:
        pg = _ready(x, group, "all_sum", compiled)
        _run("all_sum", pg, lambda: _reduce(out, pg, "all_sum"))
    return out


@_sum.register_fake
def _(x: Tensor, group: str, compiled: bool) -> Tensor:
    prepare_inductor()
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("credit_halo::broadcast", mutates_args=())
def _broadcast(x: Tensor, src: int, group: str, compiled: bool) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    if group:
        pg = _ready(x, group, f"broadcast from rank {src}", compiled)
        _run("broadcast", pg, lambda: _spread(out, src, pg))
    return out


@torch.library.custom_op("credit_halo::sum_to", mutates_args=())
def _sum_to(x: Tensor, src: int, group: str, compiled: bool) -> Tensor:
    """Adjoint of a broadcast: the sum on one rank, zeros on the others."""
    out = x.clone(memory_format=torch.contiguous_format)
    if group:
        pg = group_by_name(group)
        _compare(x, pg, f"adjoint of a broadcast from rank {src}")
        _run("broadcast (backward)", pg, lambda: _reduce(out, pg, f"adjoint of a broadcast from {src}"))
        if dist.get_rank(pg) != src:
            out.zero_()
    return out


for _op in (_broadcast, _sum_to):

    @_op.register_fake
    def _(x: Tensor, src: int, group: str, compiled: bool) -> Tensor:
        prepare_inductor()
        return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group, ctx.said = inputs[1], debug.said()
    save_entry(ctx, inputs[0])


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    with debug.backward_of(ctx.said):
        return _sum(grad, ctx.group, False), None, None


def _rooted_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.src, ctx.group, _ = inputs
    ctx.said = debug.said()
    save_entry(ctx, x)


def _broadcast_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    with debug.backward_of(ctx.said):
        return _sum_to(grad, ctx.src, ctx.group, False), None, None, None


def _sum_to_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    with debug.backward_of(ctx.said):
        return _broadcast(grad, ctx.src, ctx.group, False), None, None, None


_sum.register_autograd(_sum_backward, setup_context=_sum_setup)
_broadcast.register_autograd(_broadcast_backward, setup_context=_rooted_setup)
_sum_to.register_autograd(_sum_to_backward, setup_context=_rooted_setup)


for _op in (_sum, _broadcast, _sum_to):
    keep_order(_op)


def _agreed(x: Tensor, group: ProcessGroup | None, what: str, label: str) -> tuple[str, bool]:
    """The name of the group, once its ranks agree on what they are about to do; compiled code agrees when it runs."""
    name, compiling = _name(group), torch.compiler.is_compiling()
    if name and not compiling:
        _agree(x, group_by_name(name), what, label)
        if not x.requires_grad:
            reach(x)
    return name, compiling


def _agree(x: Tensor, pg: ProcessGroup, what: str, label: str) -> None:
    gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    named = "" if label == what.split(maxsplit=1)[0] else f"{label!r}: "
    said = f"{named}{what} of {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}{gradient}"
    agree(pg, said, what.split(maxsplit=1)[0], lambda: said, x.device)


def _compare(x: Tensor, pg: ProcessGroup, what: str) -> None:
    debug.compare(pg, lambda: f"{what} of {x.dtype}, shape {tuple(x.shape)}", x.device)


def _ready(x: Tensor, group: str, what: str, compiled: bool) -> ProcessGroup:
    pg = group_by_name(group)
    refuse_broken(pg, what)
    if compiled:
        _agree(x, pg, what, what.split(maxsplit=1)[0])
    _compare(x, pg, what)
    return pg


def _run(what: str, group: ProcessGroup, collective: Any) -> None:
    try:
        collective()
    except RuntimeError as error:
        message = f"{what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}: {error}"
        raise break_group(group, message) from error


def _reduce(out: Tensor, group: ProcessGroup, what: str) -> None:
    """Sum over the ranks in place, in the order of the ranks where tensors are small: the same bits on each."""
    if not tagged.is_tagged(group, out):
        dist.all_reduce(out, group=group)
        return
    first, *others = tagged.gather(out.clone(), group, what)
    out.copy_(first)
    for other in others:
        out.add_(other)


def _spread(out: Tensor, src: int, group: ProcessGroup) -> None:
    if tagged.is_tagged(group, out):
        tagged.spread(out, src, group, "broadcast")
    else:
        dist.broadcast(as_bytes(out), dist.get_global_rank(group, src), group=group)


def _name(group: ProcessGroup | None) -> str:
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return ""
    chosen = dist.group.WORLD if group is None else group
    assert chosen is not None
    return chosen.group_name


def _rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _checked_src(rank: int, group: ProcessGroup | None, name: str = "src") -> int:
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < size:
        raise ValueError(f"{name} must be a rank of the group, 0..{size - 1}; got {rank!r}")
    return rank
