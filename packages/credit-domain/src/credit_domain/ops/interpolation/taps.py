"""What torch's interpolation does along one dim: which rows with which weights, read off torch's own operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PICKS = ("nearest", "nearest-exact")
HALF = (torch.float16, torch.bfloat16)


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


class Taps(NamedTuple):
    """Entries of a matrix: output row, input row and weight, by output row; no weights where all are 1."""

    out: Tensor
    row: Tensor
    weight: Tensor | None


class Map(NamedTuple):
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
    taps: Taps
    back: Taps
    first: tuple[int, ...]
    last: tuple[int, ...]
    same: bool


@lru_cache(maxsize=256)
def map_of(along: Along) -> Map:
    """What torch does along one dim."""
    device = torch.device(along.device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        taps, back = _picks(along) if along.mode in PICKS else _weights(along)
    rows = int(taps.out[-1]) + 1
    first = torch.full([rows], along.rows)
    last = torch.full([rows], -1)
    for out, row, _ in (taps, back):
        first.scatter_reduce_(0, out, row, "amin")
        last.scatter_reduce_(0, out, row, "amax")
    own = torch.arange(along.rows)
    same = all(torch.equal(each.row, own) and torch.equal(each.out, own) for each in (taps, back))
    same = same and (taps.weight is None or bool((taps.weight == 1).all()))
    return Map(rows, taps, back, tuple(first.tolist()), tuple(last.tolist()), same)


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


def _picks(along: Along) -> tuple[Taps, Taps]:
    """Each output row is one input row, found from its number in digits that every dtype can hold."""
    rows = torch.arange(along.rows)
    digits = torch.stack([rows // 128**place % 128 for place in range(4)]).to(along.device, along.dtype)
    picked = _run(along, digits).to("cpu", torch.int64)
    row = sum(picked[place] * 128**place for place in range(4))
    assert isinstance(row, Tensor)
    out = torch.arange(len(row))
    taps = Taps(out, row, None)
    if not along.dtype.is_floating_point:
        return taps, taps
    ones = torch.ones(2, len(row), dtype=torch.float32 if along.dtype in HALF else along.dtype, device=along.device)
    times = _pull(along, ones)[0].to("cpu", torch.int64)
    returned = torch.repeat_interleave(rows, times)  # in order, since rows are picked in order
    return taps, taps if torch.equal(row, returned) else Taps(out, returned, None)


def _weights(along: Along) -> tuple[Taps, Taps]:
    """What each input row contributes to each output row, and what each output row's gradient does to the input's."""
    forward = _entries(along, along.rows, lambda x: _run(along, x))
    taps = Taps(*forward)
    row, out, weight = _entries(along, int(taps.out[-1]) + 1, lambda grad: _pull(along, grad))
    by_out = out.argsort(stable=True)
    back = (out[by_out], row[by_out], weight[by_out])
    return taps, taps if all(map(torch.equal, forward, back)) else Taps(*back)


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
