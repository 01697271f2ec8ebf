"""Resampling of a sharded tensor.

Along each dim, resampling is a linear map of rows: every output row is a weighted sum of a few input rows. Which rows
and which weights, torch's own operator tells, run once along that dim alone (``taps.py``); they are then applied dim by
dim (``weighing.py``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.engine.driver import Call, place
from credit_domain.engine.footprint import Footprint, footprint_from
from credit_domain.engine.layer import DomainParallelLayer, Seen, known_layer
from credit_domain.engine.ranks import constant, domain_of, new_layer, normal_dim
from credit_domain.engine.row_op import RowOp, row_op
from credit_domain.ops.interpolation.taps import HALF, PICKS, Along, Map, map_of
from credit_domain.ops.interpolation.weighing import part_of, weigh
from credit_halo import EdgeRule, HaloExchange
from credit_mesh import DomainParallelManager, RowPartition


@row_op
class Resampling(NamedTuple):
    """Rows become weighted sums of a few rows.

    Attributes:
        spatial: Sizes of all spatial dims of the input, 0 for the sharded one; empty where they are not known.
        dim: The sharded dim, negative.
        asked: ``size``, ``scale_factor`` in digits, ``mode``, ``align_corners``, ``recompute_scale_factor`` and
            ``antialias`` of torch.
        dtype: What is computed in.
        device: Where torch's operator is read.
        declared: Key of the declared partition of the model's input; empty if there is none.
        target: Output rows of each rank, where the caller says so.
    """

    spatial: tuple[int, ...]
    dim: int
    asked: tuple[Any, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    declared: str = ""
    target: tuple[int, ...] | None = None

    @property
    def ratio(self) -> tuple[int, int]:
        """As the scale factor says; a factor above 1 that is no integer keeps no blocks of rows."""
        scale = numbers(self.asked[1], float.fromhex)
        if isinstance(scale, tuple):
            scale = scale[self.dim] if len(scale) >= -self.dim else 1.0
        if scale is None:
            return 1, 1
        if scale >= 1:
            return (1, int(scale)) if scale.is_integer() else (1, 1)
        return round(1 / scale), 1

    def footprint(self, source: RowPartition) -> Footprint:
        """Output row ``i`` reads the rows that torch's operator reads for it.

        Raises:
            ValueError: If torch refuses to resample the whole so, or ``target`` does not fit.
        """
        own = map_of(dims_of(self, source.rows)[self.dim])
        if self.target is not None:
            out = RowPartition(self.target, allow_empty=True)
            if out.rows != own.rows or out.ranks != source.ranks:
                raise ValueError(f"target={out} does not divide {own.rows} output rows over {source.ranks} ranks")
        else:
            declared = RowPartition(tuple(map(int, self.declared.split(",")))) if self.declared else None
            out = resampled_partition(source, own.rows, declared)

        def need(start: int, stop: int) -> range:
            return range(min(own.first[start:stop]), max(own.last[start:stop]) + 1)

        return footprint_from(source, out, need, EdgeRule())


@lru_cache(maxsize=4096)
def dims_of(op: Resampling, rows: int) -> tuple[Along, ...]:
    """The resampling along each dim of a tensor with so many rows.

    Raises:
        ValueError: If torch refuses to resample it.
    """
    nd, (size, scale, mode, corners, recompute, antialias) = len(op.spatial), op.asked
    whole = tuple(rows if at == nd + op.dim else n for at, n in enumerate(op.spatial))
    scale = numbers(scale, float.fromhex)
    how = (mode, corners, recompute, antialias)
    if mode not in PICKS and not op.dtype.is_floating_point:
        raise ValueError(f"mode {mode!r} averages rows, which {op.dtype} cannot hold; convert to floats first")
    try:  # what torch refuses of the whole
        out_shape = F.interpolate(torch.empty(1, 1, *whole, dtype=op.dtype, device="meta"), size, scale, *how).shape[2:]
        if 0 in out_shape:
            raise ValueError("nothing would be left")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"torch refuses to resample a tensor of shape (B, C, *{whole}): {error}") from error
    if antialias and out_shape[-1] == 1:
        raise ValueError(
            "antialias=True to a single column is refused, since torch's own result depends on the layout in memory "
            "and is wrong in the usual one; take the mean of the columns, or mode='area'"
        )
    stays = [before == after for before, after in zip(whole, out_shape, strict=True)]
    return tuple(
        Along(nd, at, n, _at(size, at), _at(scale, at), *how, op.dtype, op.device, stays[at] and not all(stays))
        for at, n in enumerate(whole)
    )


def _at(value: Any, at: int) -> Any:
    return value[at] if isinstance(value, tuple) else value


def resampled_partition(source: RowPartition, rows: int, declared: RowPartition | None) -> RowPartition:
    """Who owns the output rows of a resampling to ``rows`` rows, which no stride or factor need relate to the input.

    The first that applies:

    1. As many rows as came in stay where they are.
    2. As many rows as the model's input has, or as a stride of 2 or more leaves of them, are divided as there, so that
       what is resampled to a level of the model meets what is at that level.
    3. An upsampling or a stride of ``source`` that gives as many rows divides them.
    4. Boundaries move in proportion.
    """
    if rows == source.rows:
        return source
    if declared is not None:
        if declared.rows == rows:
            return declared
        stride = max(2, -(-declared.rows // rows))
        if -(-declared.rows // stride) == rows:
            return declared.strided(stride)
    if rows > source.rows:
        factor = -(-rows // source.rows)
        if -(-rows // factor) == source.rows:
            return source.upsampled(factor, rows)
    else:
        stride = -(-source.rows // rows)
        if -(-source.rows // stride) == rows:
            return source.strided(stride)
    ends = [-(-offset * rows // source.rows) for offset in source.offsets]
    return RowPartition(tuple(stop - start for start, stop in pairwise(ends)), allow_empty=True)


def interpolate(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    target: RowPartition | None = None,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "interpolate",
) -> Tensor:
    """Resample a sharded tensor: :func:`torch.nn.functional.interpolate` of the whole.

    Who owns the output rows is up to ``target``. Where that is None, the first of these that applies:

    1. As many rows as came in stay where they are.
    2. As many rows as the declared partition of the model's input has, or as a stride of 2 or more leaves of them, are
       divided as there. So a final resize to the grid of the input or of the target ends on the input's partition.
    3. Where upsampling by a whole number gives as many rows (up to what its last block lacks), row ``i`` goes to the
       owner of input row ``i // factor``; where a stride does, row ``j`` to the owner of input row ``j * stride``.
    4. Otherwise boundaries move in proportion, rounded up.

    Args:
        x: This rank's rows, (B, C, L), (B, C, H, W) or (B, C, T, H, W).
        size: Size of the whole output, as in torch: the **global** number of rows along the sharded dim.
        scale_factor: As in torch.
        mode: As in torch, each of its modes.
        align_corners: As in torch.
        recompute_scale_factor: As in torch.
        antialias: As in torch.
        target: Partition of the output rows.

    Raises:
        ValueError: On all ranks alike, if torch refuses to resample the whole so, ``target`` does not fit, ``dim`` is
            no spatial dim, or integers would have to be averaged; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    how = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    return resample(x, *how, target, Call(dim, partition, manager, label))


def resample(
    x: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
    target: RowPartition | None,
    call: Call,
) -> Tensor:
    """:func:`interpolate`, also for layers."""
    domain = domain_of(call.manager)
    how = (mode, align_corners, recompute_scale_factor, antialias)
    if domain.size == 1:
        return F.interpolate(x, size, scale_factor, *how)  # type: ignore[arg-type, unused-ignore]
    if x.ndim not in (3, 4, 5):
        raise ValueError(
            f"{call.label}: expected (B, C, L), (B, C, H, W) or (B, C, T, H, W); got shape {tuple(x.shape)}"
        )
    nd = x.ndim - 2
    dim = normal_dim(call.dim, x.ndim, nd, call.label)
    if torch.is_autocast_enabled(x.device.type):  # some resamplings are among those that autocast does in float32
        x = x.to(F.interpolate(x.new_zeros([1] * x.ndim), 1, None, *how).dtype)
    dtype = x.dtype
    computed = torch.float32 if dtype in HALF and mode not in PICKS else dtype
    spatial = [operator.index(n) for n in x.shape[2:]]
    spatial[dim] = 0  # ranks hold different numbers, and mean the same
    # A float of a module may be symbolic in compiled code, and its digits are not.
    asked = (numbers(size, operator.index), numbers(scale_factor, lambda scale: float(scale).hex()), *how)
    device = x.device.type if x.device.index is None else f"{x.device.type}:{x.device.index}"
    wanted = None if target is None else target.sizes
    op = Resampling(tuple(spatial), dim, asked, computed, device, domain.declared, wanted)
    placed = place(op, x, call, dim, domain)
    step = placed.step
    order = _order(tuple(op), sum(placed.sizes), (step.start, step.rows, step.first, step.out))
    for each, key in order:
        if each == dim:
            x = placed.bring(x, new=not any(key for _, key in order))
        if key:
            x = weigh(x.to(computed), each + x.ndim, key, False)
    return x.to(dtype)


def numbers(value: Any, kind: Callable[[Any], Any]) -> Any:
    """One number or a tuple of them, each made what ``kind`` makes of it."""
    if isinstance(value, (tuple, list)):
        return tuple(kind(each) for each in value)
    return None if value is None else kind(value)


@constant
def _order(op: tuple[Any, ...], rows: int, part: tuple[int, int, int, int]) -> tuple[tuple[int, str], ...]:
    """The dims in their order, with the keys of their maps; what shrinks most comes first.

    There is no key where nothing changes along a dim.
    """
    return _cached_order(op, rows, part)


@lru_cache(maxsize=4096)
def _cached_order(op: tuple[Any, ...], rows: int, part: tuple[int, int, int, int]) -> tuple[tuple[int, str], ...]:
    record = Resampling(*op)
    nd, maps = len(record.spatial), [(along, map_of(along)) for along in dims_of(record, rows)]
    own = nd + record.dim
    keys = [
        "" if each.same else part_of(along, part if at == own else (0, along.rows, 0, each.rows))
        for at, (along, each) in enumerate(maps)
    ]
    return tuple((at - nd, keys[at]) for at in _dims_in_order(maps, own))


def _dims_in_order(maps: Sequence[tuple[Along, Map]], own: int) -> list[int]:
    """What shrinks first, and rows before anything grows: the less is sent."""
    grows = [each.rows / along.rows for along, each in maps]
    return sorted(range(len(maps)), key=lambda at: min(grows[at], 1.0) if at == own else grows[at])


def share_sent(op: Resampling, rows: int) -> float:
    """How large a row is when it is sent, as a part of a row of the input: dims that shrink are resampled before."""
    maps = [(along, map_of(along)) for along in dims_of(op, rows)]
    own = len(maps) + op.dim
    order = _dims_in_order(maps, own)
    before = [maps[at] for at in order[: order.index(own)]]
    return math.prod(each.rows / along.rows for along, each in before)


@known_layer
class DomainParallelUpsample(DomainParallelLayer):
    """:class:`torch.nn.Upsample`, in each of its modes, on a sharded tensor (B, C, L), (B, C, H, W) or (B, C, T, H, W).

    ``size`` is that of the whole. Who owns the output rows is said in :func:`credit_domain.functional.interpolate`.

    See :mod:`credit_domain.layers`.
    """

    wraps = (nn.Upsample,)
    reason = "interpolates between rows"

    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp:
        """See the base class."""
        m: Any = module
        asked = (
            numbers(m.size, operator.index),
            numbers(m.scale_factor, lambda scale: float(scale).hex()),
            *(m.mode, m.align_corners, m.recompute_scale_factor, False),
        )
        if seen is None:
            return Resampling((), dim, asked)
        spatial = list(seen.input[2:])
        spatial[dim] = 0
        declared = "" if seen.declared is None else seen.declared.key
        return Resampling(tuple(spatial), dim, asked, declared=declared)

    def forward(self, x: Tensor) -> Tensor:
        """Resample the whole of which ``x`` is this rank's part: :func:`credit_domain.functional.interpolate`."""
        m = self.wrapped
        how = (m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor, False)
        return resample(x, *how, None, self.call)


class DomainParallelInterpolate(nn.Module):
    """:func:`torch.nn.functional.interpolate` of a sharded tensor, as a layer.

    Who owns the output rows is said in :func:`credit_domain.functional.interpolate`.

    Args:
        size: Size of the whole output, (H, W): the global number of rows. None where ``scale_factor`` is given.
        mode: As in torch, like all further arguments up to ``antialias``.

    Attributes:
        halo_exchange: None: which rows a rank lacks depends on the heights, and they are asked for one by one.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None,
        mode: str = "bilinear",
        shard_dim: int = -2,
        *,
        scale_factor: float | Sequence[float] | None = None,
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.mode = mode
        self.shard_dim = shard_dim
        self.scale_factor = scale_factor
        self.align_corners = align_corners
        self.recompute_scale_factor = recompute_scale_factor
        self.antialias = antialias
        self.manager = manager
        self.label = type(self).__name__ if label is None else label
        self.halo_exchange: HaloExchange | None = None
        self._layer = new_layer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layer = new_layer()  # a copy learns for itself

    def forward(self, x: Tensor) -> Tensor:
        """Resample the whole of which ``x`` is this rank's part; see :meth:`DomainParallelUpsample.forward`."""
        how = (self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor, self.antialias)
        return resample(x, *how, None, Call(self.shard_dim, None, self.manager, self.label, self._layer))

    def extra_repr(self) -> str:
        """The arguments."""
        sized = f"size={self.size}" if self.scale_factor is None else f"scale_factor={self.scale_factor}"
        return f"{sized}, mode={self.mode!r}, shard_dim={self.shard_dim}"
