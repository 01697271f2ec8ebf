"""Comparing what ranks hold with what one rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Comparison:
    """How the shards of a tensor compare with the whole.

    Attributes:
        dim: The dim that they are shards along; None where every rank holds all of it.
        error: Largest absolute difference, relative to the largest absolute value of the whole.
        rows: Rows along that dim (the sharded dim of the model for whole tensors) where the error is too large.
        sizes: Rows of each rank.
    """

    dim: int | None
    error: float
    rows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def is_number(x: Tensor) -> bool:
    """Whether a tensor has a gradient to compare: floating-point or complex."""
    return x.is_floating_point() or x.is_complex()


def has_rows(x: Tensor, rows: int, dim: int) -> bool:
    """Whether a tensor of three or more dims has so many rows."""
    return x.ndim >= 3 and x.shape[dim] == rows


def sharded_dim(whole: Sequence[int], shards: Sequence[Sequence[int]], preferred: int) -> int | None:
    """The dim along which shapes add up to the whole, counted from the last; the preferred one where several do.

    Returns:
        None where every rank has the shape of the whole.

    Raises:
        LookupError: If there is none, and the ranks do not all hold the whole either.
    """
    if all(tuple(shard) == tuple(whole) for shard in shards):
        return None
    ndim = len(whole)
    if all(len(shard) == ndim for shard in shards):
        for dim in sorted(range(-ndim, 0), key=lambda d: (d != preferred, d)):
            fits = all(_but(shard, dim) == _but(whole, dim) for shard in shards)
            if fits and sum(shard[dim] for shard in shards) == whole[dim]:
                return dim
    raise LookupError(f"the shapes {', '.join(str(tuple(s)) for s in shards)} are no shards of {tuple(whole)}")


def part_of(whole: Tensor, shards: Sequence[Sequence[int]], rank: int, preferred: int) -> tuple[Tensor, int | None]:
    """What a rank holds of a whole, by the shapes that the ranks hold; and the dim as :func:`sharded_dim` finds it."""
    dim = sharded_dim(whole.shape, shards, preferred)
    if dim is None:
        return whole, None
    return whole.narrow(dim, sum(shard[dim] for shard in shards[:rank]), shards[rank][dim]), dim


def own_factors(
    factors: Mapping[str, Tensor], shapes: Sequence[Mapping[str, tuple[int, ...]]], rank: int, preferred: int
) -> dict[str, Tensor]:
    """A rank's part of the weights of a loss; of an output that all ranks hold, its share.

    Raises:
        LookupError: If the outputs of the ranks, of these shapes, are no shards of the whole.
    """
    mine = {}
    for path, factor in factors.items():
        part, dim = part_of(factor, [told.get(path, ()) for told in shapes], rank, preferred)
        mine[path] = part / len(shapes) if dim is None else part
    return mine


def compare(whole: Tensor, shards: Sequence[Tensor], preferred: int, tolerance: float) -> Comparison:
    """Compare shards with the whole; where only the number of rows does not add up, the error is infinite.

    Raises:
        LookupError: If they cannot be shards of it.
    """
    shapes = [shard.shape for shard in shards]
    try:
        dim = sharded_dim(whole.shape, shapes, preferred)
    except LookupError:
        if whole.ndim < -preferred or any(_but(shape, preferred) != _but(whole.shape, preferred) for shape in shapes):
            raise
        return Comparison(preferred, float("inf"), (), tuple(shape[preferred] for shape in shapes))
    if dim is None:
        worst = max((compare_whole(whole, shard) for shard in shards), default=0.0)
        return Comparison(None, worst)
    whole = _numbers(whole)
    difference = (_numbers(torch.cat(list(shards), dim)) - whole).abs()
    scale = _scale(whole)
    others = [d for d in range(-whole.ndim, 0) if d != dim]
    by_row = difference.amax(others) if others and difference.numel() else difference.reshape(-1)
    bad = ~(by_row <= tolerance * scale)
    error = float(difference.max()) / scale if difference.numel() else 0.0
    return Comparison(dim, error, tuple(bad.nonzero().flatten().tolist()), tuple(shape[dim] for shape in shapes))


def compare_whole(whole: Tensor, other: Tensor, least: float = 0.0) -> float:
    """Largest absolute difference of two tensors of one shape, relative to the largest absolute value of the first.

    ``least`` is the smallest value to be relative to: a gradient that is zero but for rounding has no scale of its own.
    """
    if not whole.numel():
        return 0.0
    whole, other = _numbers(whole), _numbers(other)
    return float((whole - other).abs().max()) / max(_scale(whole), least)


def near(expected: Tensor, found: Tensor, tolerance: float, whole: Tensor, dim: int | None) -> bool:
    """Whether a part of a whole is as expected, in each channel, since channels may be in other units.

    Errors are relative to the largest value of a channel of ``whole``, which is sharded along ``dim``.
    """
    if expected.shape != found.shape:
        return False
    scales = size = whole.detach().abs()
    if size.numel():
        scales = largest = size.max()
        if whole.ndim >= 3 and dim != 1 - whole.ndim:
            others = [d for d in range(whole.ndim) if d != 1]
            scales = size.amax(others, keepdim=True).clamp(min=1e-6 * float(largest))
    return bool(((expected - found).detach().abs() <= tolerance * scales).all())


def _but(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    return tuple(size for d, size in enumerate(shape) if d != dim + len(shape))


def _numbers(x: Tensor) -> Tensor:
    return x if is_number(x) else x.double()


def _scale(whole: Tensor) -> float:
    return float(whole.abs().max()) or 1.0 if whole.numel() else 1.0


def unlike_buffers(whole: nn.Module, shard: nn.Module, tolerance: float) -> list[str]:
    """Names of the buffers whose numbers differ after a forward. Buffers of another shape are not compared."""
    found = dict(shard.named_buffers())
    return [
        name
        for name, buffer in whole.named_buffers()
        if is_number(buffer)
        and name in found
        and found[name].shape == buffer.shape
        and not near(buffer, found[name], tolerance, buffer, None)
    ]
