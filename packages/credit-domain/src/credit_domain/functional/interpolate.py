"""Resampling of a sharded tensor.

Along each dim, resampling is a linear map of rows: every output row is a weighted sum of a few input rows. Which rows
and which weights, torch's own operator tells, run once along that dim alone; they are then applied dim by dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Step, bring, constant, domain_of, normal_dim, sizes_of, step_of
from credit_halo.extend import empty_rows, memory_format
from credit_mesh import DomainParallelManager, RowPartition

_PICKS = ("nearest", "nearest-exact")
_HALF = (torch.float16, torch.bfloat16)


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
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if torch refuses to resample the whole so, ``target`` does not fit, ``dim`` is
            no spatial dim, or integers would have to be averaged; and as :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    how = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    return resample(x, *how, target, dim, partition, manager, label)


def resample(
    x: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
    target: RowPartition | None,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Tensor:
    """:func:`interpolate`, with the number that a layer remembers its partition by."""
    domain = domain_of(manager)
    how = (mode, align_corners, recompute_scale_factor, antialias)
    if domain.size == 1:
        return F.interpolate(x, size, scale_factor, *how)  # type: ignore[arg-type, unused-ignore]
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"{label}: expected (B, C, L), (B, C, H, W) or (B, C, T, H, W); got shape {tuple(x.shape)}")
    nd = x.ndim - 2
    dim = normal_dim(dim, x.ndim, nd, label)
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    if torch.is_autocast_enabled(x.device.type):  # some resamplings are among those that autocast does in float32
        x = x.to(F.interpolate(x.new_zeros([1] * x.ndim), 1, None, *how).dtype)
    dtype = x.dtype
    computed = torch.float32 if dtype in _HALF and mode not in _PICKS else dtype
    spatial = tuple(operator.index(n) for n in x.shape[2:])
    wanted = None if target is None else target.sizes
    # A float of a module may be symbolic in compiled code, and its digits are not.
    asked = (_numbers(size, operator.index), _numbers(scale_factor, lambda scale: float(scale).hex()), *how)
    step, order = _resize(
        *(sizes, domain.rank, domain.declared, wanted, spatial, dim, asked, computed, x.device.type, x.device.index),
        label,
    )
    for each, key in order:
        if each == dim:
            x = bring(x, dim, step, domain, label, new=not any(key for _, key in order))
        if key:
            x = _weigh(x.to(computed), each + x.ndim, key, False)
    return x.to(dtype)


def _numbers(value: Any, kind: Callable[[Any], Any]) -> Any:
    """One number or a tuple of them, each made what ``kind`` makes of it."""
    if isinstance(value, (tuple, list)):
        return tuple(kind(each) for each in value)
    return None if value is None else kind(value)


# What torch does along one dim


class Along(NamedTuple):
    """A resampling along one of ``nd`` spatial dims, counted from the first, of ``rows`` rows.

    Torch copies a tensor of which all sizes stay, though a factor be other than 1 (9 rows times 1.1). So what it does
    along a dim that keeps its size depends on ``moved``: whether the size of another dim changes.
    """

    nd: int
    at: int
    rows: int
    size: int | None
    scale: float | None
    mode: str
    align_corners: bool | None
    recompute: bool | None
    antialias: bool
    dtype: torch.dtype
    device: str
    moved: bool


class _Taps(NamedTuple):
    """Entries of a matrix: output row, input row and weight, by output row; no weights where all are 1."""

    out: Tensor
    row: Tensor
    weight: Tensor | None


class _Map(NamedTuple):
    """The linear map of a resampling along one dim.

    Attributes:
        rows: Number of output rows.
        taps: Its entries.
        back: The entries that torch's backward uses. They differ by rounding, and where it picks other rows for the
            gradients of float64 (which it does in float32) than it picked forward.
        first: First input row of each output row.
        last: Last input row of each output row.
        same: Whether nothing changes.
    """

    rows: int
    taps: _Taps
    back: _Taps
    first: tuple[int, ...]
    last: tuple[int, ...]
    same: bool


@lru_cache(maxsize=256)
def map_of(along: Along) -> _Map:
    """What torch does along one dim."""
    device = torch.device(along.device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        taps, back = _picks(along) if along.mode in _PICKS else _weights(along)
    rows = int(taps.out[-1]) + 1
    first = torch.full([rows], along.rows)
    last = torch.full([rows], -1)
    for out, row, _ in (taps, back):
        first.scatter_reduce_(0, out, row, "amin")
        last.scatter_reduce_(0, out, row, "amax")
    own = torch.arange(along.rows)
    same = all(torch.equal(each.row, own) and torch.equal(each.out, own) for each in (taps, back))
    same = same and (taps.weight is None or bool((taps.weight == 1).all()))
    return _Map(rows, taps, back, tuple(first.tolist()), tuple(last.tolist()), same)


def _run(along: Along, x: Tensor) -> Tensor:
    """Torch's operator on (channels, rows), along the rows alone: (channels, output rows)."""
    # Torch is wrong where one column comes out of antialiasing, which is why there are two.
    others = 2 if along.antialias else 1
    factor = 1 if not along.moved else 2 if along.antialias and along.align_corners else 3
    read = int(along.moved)  # this one lies on the first that goes in, with a weight of exactly 1
    size, scale, shape = [others * factor] * along.nd, [float(factor)] * along.nd, [others] * along.nd
    if along.size is not None:
        size[along.at] = along.size
    if along.scale is not None:
        scale[along.at] = along.scale
    shape[along.at] = x.shape[1]
    ones = [n if at == along.at else 1 for at, n in enumerate(shape)]
    out = F.interpolate(
        x.reshape(-1, *ones).expand(-1, *shape)[None].contiguous(),
        None if along.size is None else size,
        None if along.scale is None else scale,  # type: ignore[arg-type, unused-ignore]
        *(along.mode, along.align_corners, along.recompute, along.antialias),
    )
    out = out[0].movedim(along.at + 1, 1)
    while out.ndim > 2:
        out = out[:, :, read]
    return out


def _picks(along: Along) -> tuple[_Taps, _Taps]:
    """Each output row is one input row, found from its number in digits that every dtype can hold."""
    rows = torch.arange(along.rows)
    digits = torch.stack([rows // 128**place % 128 for place in range(4)]).to(along.device, along.dtype)
    picked = _run(along, digits).to("cpu", torch.int64)
    row = sum(picked[place] * 128**place for place in range(4))
    assert isinstance(row, Tensor)
    out = torch.arange(len(row))
    taps = _Taps(out, row, None)
    if not along.dtype.is_floating_point:
        return taps, taps
    ones = torch.ones(2, len(row), dtype=torch.float32 if along.dtype in _HALF else along.dtype, device=along.device)
    times = _pull(along, ones)[0].to("cpu", torch.int64)
    returned = torch.repeat_interleave(rows, times)  # in order, since rows are picked in order
    return taps, taps if torch.equal(row, returned) else _Taps(out, returned, None)


def _weights(along: Along) -> tuple[_Taps, _Taps]:
    """What each input row contributes to each output row, and what each output row's gradient does to the input's."""
    forward = _entries(along, along.rows, lambda x: _run(along, x))
    taps = _Taps(*forward)
    row, out, weight = _entries(along, int(taps.out[-1]) + 1, lambda grad: _pull(along, grad))
    by_out = out.argsort(stable=True)
    back = (out[by_out], row[by_out], weight[by_out])
    return taps, taps if all(map(torch.equal, forward, back)) else _Taps(*back)


def _pull(along: Along, grad: Tensor) -> Tensor:
    """The gradient of the rows, (channels, rows), from that of the output rows."""
    # Where algorithms must be deterministic, torch has no backward of some modes on a GPU.
    device = "cpu" if torch.are_deterministic_algorithms_enabled() else along.device
    with torch.enable_grad():
        x = torch.zeros(len(grad), along.rows, dtype=grad.dtype, device=device, requires_grad=True)
        return torch.autograd.grad(_run(along, x), x, grad.to(device))[0]


_CHUNK = 256


def _entries(along: Along, count: int, linear: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix of a linear function of ``count`` entries, as (into, from, weight), by what they go into.

    A NaN shows what reads an entry, be it with a weight of 0.
    """
    into, source, weight = [], [], []
    for start in range(0, count, _CHUNK):
        some = range(start, min(start + _CHUNK, count))
        one = torch.zeros(len(some), count, dtype=along.dtype, device=along.device)
        one[range(len(some)), some] = 1
        read = linear(torch.where(one == 1, torch.nan, one)).isnan().cpu()
        entry = read.nonzero()
        source.append(entry[:, 0] + start)
        into.append(entry[:, 1])
        weight.append(linear(one).cpu()[read])
    order = torch.cat(into).argsort(stable=True)
    return torch.cat(into)[order], torch.cat(source)[order], torch.cat(weight)[order]


# The plan of a resampling


@constant
def _resize(
    sizes: tuple[int, ...],
    rank: int,
    declared: str,
    target: tuple[int, ...] | None,
    spatial: tuple[int, ...],
    dim: int,
    asked: tuple[Any, ...],
    dtype: torch.dtype,
    device: str,
    index: int | None,
    label: str,
) -> tuple[Step, tuple[tuple[int, str], ...]]:
    """The rows to bring, and the dims in their order, with the keys of their maps; what shrinks most comes first.

    There is no key where nothing changes along a dim.
    """
    name = device if index is None else f"{device}:{index}"
    return _cached_resize(sizes, rank, declared, target, spatial, dim, asked, dtype, name, label)


@lru_cache(maxsize=4096)
def _cached_resize(
    sizes: tuple[int, ...],
    rank: int,
    declared: str,
    target: tuple[int, ...] | None,
    spatial: tuple[int, ...],
    dim: int,
    asked: tuple[Any, ...],
    dtype: torch.dtype,
    device: str,
    label: str,
) -> tuple[Step, tuple[tuple[int, str], ...]]:
    source = RowPartition(sizes, allow_empty=True)
    nd = len(spatial)
    whole = tuple(source.rows if at == nd + dim else n for at, n in enumerate(spatial))
    size, scale, mode, corners, recompute, antialias = asked
    scale = _numbers(scale, float.fromhex)
    how = (mode, corners, recompute, antialias)
    if mode not in _PICKS and not dtype.is_floating_point:
        raise ValueError(f"{label}: mode {mode!r} averages rows, which {dtype} cannot hold; convert to floats first")
    try:  # what torch refuses of the whole
        out_shape = F.interpolate(torch.empty(1, 1, *whole, dtype=dtype, device="meta"), size, scale, *how).shape[2:]
        if 0 in out_shape:
            raise ValueError("nothing would be left")
        stays = [before == after for before, after in zip(whole, out_shape, strict=True)]
        along = [
            Along(nd, at, n, _at(size, at), _at(scale, at), *how, dtype, device, stays[at] and not all(stays))
            for at, n in enumerate(whole)
        ]
        maps = [map_of(each) for each in along]
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{label}: torch refuses to resample a tensor of shape (B, C, *{whole}): {error}") from error
    if antialias and maps[-1].rows == 1:
        raise ValueError(
            f"{label}: antialias=True to a single column is refused, since torch's own result depends on the layout in "
            "memory and is wrong in the usual one; take the mean of the columns, or mode='area'"
        )
    own = maps[dim]
    if target is not None:
        out = RowPartition(target, allow_empty=True)
        if out.rows != own.rows or out.ranks != source.ranks:
            raise ValueError(f"{label}: target={out} does not divide {own.rows} output rows over {source.ranks} ranks")
    else:
        model = RowPartition(tuple(map(int, declared.split(",")))) if declared else None
        out = footprint.resampled_partition(source, own.rows, model)
    step = step_of(footprint.resampling(source, out, own.first, own.last), rank)
    keys = []
    for at, each in enumerate(maps):
        part = (step.start, step.rows, step.first, step.out) if at == nd + dim else (0, whole[at], 0, each.rows)
        keys.append("" if each.same else _part_of(along[at], part))
    # What shrinks first, and rows before anything grows: the less is sent.
    grows = [maps[at].rows / whole[at] for at in range(nd)]
    order = sorted(range(nd), key=lambda at: min(grows[at], 1.0) if at == nd + dim else grows[at])
    return step, tuple((at - nd, keys[at]) for at in order)


def _at(value: Any, at: int) -> Any:
    return value[at] if isinstance(value, tuple) else value


# Applying a map


class _Pass(NamedTuple):
    """Add weighted input rows to output rows: to all, in order, to those of ``into``, or all to the one of ``into``."""

    into: Tensor | None
    rows: Tensor
    weight: Tensor | None


class _Part(NamedTuple):
    """A rank's part of a map, and of its adjoint, as passes over the output.

    Each output row takes one input row in a pass; where output rows are fewer than the input rows of one of them, each
    is summed at once instead.
    """

    rows: tuple[int, int]
    passes: tuple[tuple[_Pass, ...], tuple[_Pass, ...]]


_parts: dict[str, _Part] = {}
"""Parts by key: operators that torch.compile traces can carry a string."""


def _part_of(along: Along, part: tuple[int, int, int, int]) -> str:
    """The key of a map of ``rows`` input rows from ``start`` on to ``out`` output rows from ``first`` on."""
    key = f"{tuple(along)} {part}"
    if key not in _parts:
        start, rows, first, out = part
        the_map = map_of(along)

        def own(taps: _Taps) -> tuple[Tensor, Tensor, Tensor | None]:
            mine = (taps.out >= first) & (taps.out < first + out)
            return taps.out[mine] - first, taps.row[mine] - start, None if taps.weight is None else taps.weight[mine]

        into, row, weight = own(the_map.taps)
        back_from, back_into, back_weight = own(the_map.back)
        _parts[key] = _Part(
            (out, rows),
            (
                _passes(into, row, weight, out, along.device),
                _passes(back_into, back_from, back_weight, rows, along.device),
            ),
        )
    return key


def _passes(out: Tensor, row: Tensor, weight: Tensor | None, rows_out: int, device: str) -> tuple[_Pass, ...]:
    by_out = out.argsort(stable=True)
    out, row, weight = out[by_out], row[by_out], None if weight is None else weight[by_out]
    counts = torch.bincount(out, minlength=rows_out)
    number = torch.arange(len(out)) - (counts.cumsum(0) - counts)[out]  # of a tap among those of its output row
    many = int(counts.max()) if rows_out else 0
    by_row = many > rows_out
    passes = []
    for each in range(rows_out if by_row else many):
        chosen = (out == each) if by_row else (number == each)
        into = torch.tensor([each]) if by_row else out[chosen]
        every = not by_row and len(into) == rows_out
        part = None if weight is None else weight[chosen].to(device)
        passes.append(_Pass(None if every else into.to(device), row[chosen].to(device), part))
    return tuple(passes)


@torch.library.custom_op("credit_domain::weigh_rows", mutates_args=())
def _weigh(x: Tensor, dim: int, key: str, adjoint: bool) -> Tensor:
    part = _parts[key]
    rows, passes = part.rows[adjoint], part.passes[adjoint]
    last = memory_format(x) != torch.contiguous_format
    y = x.movedim(1, -1) if last else x
    at = dim - 1 if last else dim
    wide = torch.float32 if x.dtype in _HALF and len(passes) > 1 else x.dtype
    before, after = y.shape[:at], y.shape[at + 1 :]
    y = y.reshape(before.numel(), y.shape[at], after.numel()).to(wide)
    out = _sum_rows(y.squeeze(2) if after.numel() == 1 else y, rows, passes)
    out = out.to(x.dtype).reshape(*before, rows, *after)
    return out.movedim(-1, 1) if last else out


def _sum_rows(x: Tensor, rows: int, passes: tuple[_Pass, ...]) -> Tensor:
    """The rows of a tensor (before, rows, after) or (before, rows)."""
    out = None
    if not passes or passes[0].into is not None:
        out = x.new_zeros(x.shape[0], rows, *x.shape[2:])
    for into, row, by in passes:
        weight = by if by is None or x.ndim == 2 else by[:, None]
        # To gather is many times faster than to select along the last dim.
        part = x.index_select(1, row) if x.ndim == 3 else x.gather(1, row.expand(x.shape[0], -1))
        if out is None:
            out = part if weight is None else part.mul_(weight)
        elif into is None:
            out = out.add_(part) if weight is None else out.addcmul_(part, weight)
        else:
            part = part if weight is None else part.mul_(weight)
            out.index_add_(1, into, part if len(into) == len(row) else part.sum(1, keepdim=True))
    assert out is not None
    return out


@_weigh.register_fake
def _(x: Tensor, dim: int, key: str, adjoint: bool) -> Tensor:
    return empty_rows(x, dim, _parts[key].rows[adjoint])


def _weigh_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, ctx.key, ctx.adjoint = inputs


def _weigh_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _weigh(grad, ctx.dim, ctx.key, not ctx.adjoint), None, None, None


_weigh.register_autograd(_weigh_backward, setup_context=_weigh_setup)
