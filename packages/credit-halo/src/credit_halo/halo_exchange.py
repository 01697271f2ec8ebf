"""The halo exchange layer: rows of the neighbours before and after a rank's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from credit_halo import ops
from credit_halo._torch_private import keep_order, prepare_inductor
from credit_halo.agreement import agree
from credit_halo.edges import EdgeRule
from credit_halo.exchange import exchange_rows
from credit_halo.groups import group_by_name
from credit_halo.learning import learner
from credit_halo.plan import halo_width as width_of
from credit_halo.plan import plan_halo
from credit_halo.recipe import edge_of, edge_text
from credit_halo.rows import empty_rows
from credit_mesh import DomainParallelManager, RowPartition, get_domain_parallel_manager


class HaloExchange(nn.Module):
    """Pads a sharded tensor with rows of its neighbours, and with the edge rule's rows beyond the edges.

    The padded tensors of all ranks are slices of the whole padded tensor: a convolution without padding along ``dim``
    then computes on each rank what it would have computed there on the whole. This holds on one rank too, where there
    is nothing but edges: without a manager, or with a single domain rank, the layer pads by its edge rule. It never
    returns its input unpadded, since the convolution after it would then lose rows.

    The layer learns the partition of its input from the other ranks, by a small all-gather: once for each shape
    under a declared partition (``manager.declare``, ``shard_tensor``), and at each call where none is declared.

    Args:
        halo_width: Rows on each side, or a pair ``(before, after)``.
        dim: The sharded dim; -2 is latitude in (B, C, H, W).
        edge: What lies beyond the edges: zeros unless told otherwise; see :class:`EdgeRule`.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this exchange; the same on every rank.

    Raises:
        ValueError: If a width is no integer, or negative, or the edge rule is unknown.
    """

    def __init__(
        self,
        halo_width: int | tuple[int, int],
        dim: int = -2,
        *,
        edge: EdgeRule | str = "zeros",
        manager: DomainParallelManager | None = None,
        label: str = "halo",
    ) -> None:
        super().__init__()
        self.halo_width = halo_width
        self.dim = dim
        self.edge = EdgeRule.of(edge)
        self.manager = manager
        self.label = label
        _widths(halo_width)
        self._edge = edge_text(self.edge)
        self._layer = learner.new_layer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._edge = edge_text(self.edge)
        self._layer = learner.new_layer()  # a copy learns for itself

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``x`` along ``dim``.

        Args:
            x: This rank's rows, of any shape.

        Returns:
            A tensor with ``before + after`` more rows, in the dtype and memory format of ``x``.

        Raises:
            ValueError: On all ranks alike, if ``dim`` is out of range, the edge rule does not reach as far as the
                halo, or ranks disagree on the halo, the dtype or the other dims.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward; see above for the all-gather.
        """
        group, declared = _where(self.manager)
        dim = _normal_dim(x, self.dim, group, self.label)
        before, after = _widths(self.halo_width)
        sizes = _learn(x, dim, group, self.label, self._layer, declared)
        if torch.compiler.is_compiling():
            out: Tensor = _halo_op(x, sizes, before, after, dim, self._edge, group, self.label, False, True)
            return out
        plan = plan_halo(_partition(sizes), before, after, rank=_rank(group), edge=self.edge)
        if group:
            return exchange_rows(x, plan, dim=dim, group=group_by_name(group), label=self.label)
        alone: Tensor = ops.exchange(x, dim, plan.key, "", self.label, False, True)
        return alone

    @staticmethod
    def trim(x: Tensor, halo_before: int, halo_after: int, dim: int = -2) -> Tensor:
        """Cut rows off both ends; a view.

        Args:
            x: Tensor with extra rows.
            halo_before: Rows to cut off the start.
            halo_after: Rows to cut off the end.
            dim: Dim to cut along.

        Raises:
            ValueError: If a number is negative, or there are fewer rows than that.
        """
        rows = x.shape[dim]
        if min(halo_before, halo_after) < 0 or halo_before + halo_after > rows:
            raise ValueError(
                f"cannot trim {halo_before} and {halo_after} rows off the {rows} of dim {dim} of shape {tuple(x.shape)}"
            )
        return x.narrow(dim, halo_before, rows - halo_before - halo_after)

    def extra_repr(self) -> str:
        """The arguments that tell layers apart."""
        return f"{self.halo_width}, dim={self.dim}, edge={self.edge.kind!r}"


class _HaloExchangeFunction(torch.autograd.Function):
    """The halo exchange as an autograd function, with zeros beyond the edges."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo_width: int | tuple[int, int], dim: int, manager: Any) -> Tensor:
        """Pad ``x`` with the halo of its neighbours.

        Args:
            ctx: Context of autograd.
            x: This rank's rows.
            halo_width: Rows on each side, or a pair ``(before, after)``.
            dim: The sharded dim.
            manager: Whose domain group takes part; None is the present one.
        """
        before, after = _widths(halo_width)
        group, declared = _where(manager)
        dim = _normal_dim(x, dim, group, "halo")
        sizes = _learn(x, dim, group, "halo", -1, declared)
        ctx.save_for_backward(sizes)
        ctx.args = (before, after, dim, edge_text(EdgeRule()), group, "halo")
        out: Tensor = _halo_op(x, sizes, *ctx.args, False, True)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradient of each halo row home, and add it there."""
        (sizes,) = ctx.saved_tensors
        return _halo_op(grad_outputs[0], sizes, *ctx.args, True, False), None, None, None


def _widths(halo_width: int | tuple[int, int]) -> tuple[int, int]:
    pair = halo_width if isinstance(halo_width, (tuple, list)) else (halo_width, halo_width)
    try:
        before, after = (width_of("halo_width", width) for width in pair)
    except ValueError:
        raise ValueError(
            f"halo_width must be an integer >= 0 or a pair of them (before, after); got {halo_width!r}"
        ) from None
    return before, after


def _where(manager: Any) -> tuple[str, str]:
    """The name of the domain group, empty for a single rank, and what the declared partition is called."""
    if manager is None:
        manager = get_domain_parallel_manager()
    if manager is None or manager.domain_parallel_size == 1:
        return "", ""
    partition = getattr(manager, "partition", None)  # a stand-in may have none
    return manager.domain_group.group_name, "" if partition is None else partition.key


def _normal_dim(x: Tensor, dim: int, group: str, label: str) -> int:
    if -x.ndim <= dim < x.ndim:
        return dim % x.ndim
    problem = f"dim={dim} is out of range for a tensor of shape {tuple(x.shape)}"
    if group:  # the others may have got it right, and would wait
        agree(group_by_name(group), None, f"exchange {label!r}", lambda: "a halo", x.device, problem)
    raise ValueError(f"exchange {label!r}: {problem}")


_LINEAR = " without its constant"


@torch.library.custom_op("credit_halo::learn_partition", mutates_args=())
def _learn(x: Tensor, dim: int, group: str, label: str, layer: int, declared: str) -> Tensor:
    """Rows of each rank, on the CPU; compiled code asks when it runs. A layer below 0 is none."""
    if not group:
        return torch.tensor([x.shape[dim]])
    number = layer if layer >= 0 else None
    return torch.tensor(
        learner.sizes(x, dim, group_by_name(group), f"exchange {label!r}", declared=declared, layer=number)
    )


@_learn.register_fake
def _(x: Tensor, dim: int, group: str, label: str, layer: int, declared: str) -> Tensor:
    prepare_inductor()
    return torch.empty(dist.get_world_size(group_by_name(group)) if group else 1, dtype=torch.int64)


@torch.library.custom_op("credit_halo::halo", mutates_args=())
def _halo_op(
    x: Tensor,
    sizes: Tensor,
    before: int,
    after: int,
    dim: int,
    edge: str,
    group: str,
    label: str,
    adjoint: bool,
    check: bool,
) -> Tensor:
    plan = plan_halo(_partition(sizes), before, after, rank=_rank(group), edge=edge_of(edge.removesuffix(_LINEAR)))
    key = plan.linear.key if edge.endswith(_LINEAR) else plan.key
    out: Tensor = ops.exchange(x, dim, key, group, label, adjoint, check)
    return out


def _partition(sizes: Tensor) -> RowPartition:
    return RowPartition(tuple(sizes.tolist()), allow_empty=True)


def _rank(group: str) -> int:
    pg: ProcessGroup | None = group_by_name(group) if group else None
    return dist.get_rank(pg) if pg is not None else 0


@_halo_op.register_fake
def _(
    x: Tensor,
    sizes: Tensor,
    before: int,
    after: int,
    dim: int,
    edge: str,
    group: str,
    label: str,
    adjoint: bool,
    check: bool,
) -> Tensor:
    prepare_inductor()
    more = before + after
    return empty_rows(x, dim, x.shape[dim] + (-more if adjoint else more))


def _halo_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, sizes, *args, ctx.adjoint, _ = inputs
    ctx.save_for_backward(sizes)
    ctx.args = args


def _halo_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, after, dim, edge, group, label = ctx.args
    if ctx.adjoint:  # a constant beyond the edge is no part of the derivative
        edge = edge.removesuffix(_LINEAR) + _LINEAR
    (sizes,) = ctx.saved_tensors
    return _halo_op(grad, sizes, before, after, dim, edge, group, label, not ctx.adjoint, False), *[None] * 9


_halo_op.register_autograd(_halo_backward, setup_context=_halo_setup)

for _op in (_learn, _halo_op):
    keep_order(_op)
