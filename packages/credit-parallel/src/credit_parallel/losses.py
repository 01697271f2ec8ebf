"""Losses of sharded fields, and the latitude weights that go with them.

The convention: gradients are averaged over the domain ranks, so each rank's loss is the number of ranks times its share
of the global mean. The mean of the ranks' losses is then the loss of one rank, and the mean of their gradients its
gradient, however unevenly the rows are divided.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from credit_domain.extend import Domain, domain_of, sizes_of, sum_over
from credit_halo.extend import agree
from credit_mesh import DomainParallelManager, RowPartition
from credit_parallel.latitudes import check_order, checked_latitudes


def domain_mean(
    values: Tensor,
    manager: DomainParallelManager | None = None,
    *,
    dim: int = -2,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    partition: RowPartition | None = None,
    label: str = "domain_mean",
) -> Tensor:
    """This rank's loss: the number of domain ranks times its share of the mean over the elements of all ranks.

    It takes the place of ``values.mean()``: ``domain_mean((prediction - target) ** 2).backward()``, and then average
    the gradients over the domain ranks. The mean is ``sum(w * values) / sum(w)`` over the elements that the mask keeps,
    so weights need no scale: it is as if their mean over all rows were 1. The loss is a scalar of the dtype of
    ``values``; float32 for 16-bit values, whose sum would overflow.

    A masked element may be NaN, but the gradient of what it came from is then NaN too (0 * NaN). Where a target has no
    value, fill it before the difference is taken, as in ``target.nan_to_num()``.

    Args:
        values: The loss of each element, not yet reduced, with this rank's rows along ``dim``; no rows will do.
        weights: Weight of each row, of shape (rows,): of this rank's rows, or of those of all ranks. Constants.
        mask: True for the elements that count; broadcasts against ``values``. Without any on all ranks the loss is NaN,
            as a mean of nothing is.
        partition: Rows of each rank, for example ``manager.partition``; where it is None, ranks ask each other.

    Raises:
        ValueError: If ``values`` is no floating-point tensor or ``dim`` none of its dims; on all ranks alike, if a rank
            has other rows than the partition says, its weights fit neither its rows nor those of all, its mask does not
            fit, or other dims or dtypes differ. With ``partition`` this is compared at its first use.

    Collectives: none with ``partition``, after its first use, unless there is a mask or weights are of this rank's
    rows: then one sum of a number. Without ``partition`` a small all-gather. None in the backward.
    """
    if not values.is_floating_point() or not -values.ndim <= dim < values.ndim:
        raise ValueError(
            f"{label}: needs the floating-point loss of each element, with rows along dim {dim}; got {values.dtype} of "
            f"shape {tuple(values.shape)} (reduction='none' keeps torch's losses from taking the mean)"
        )
    domain = domain_of(manager)
    sizes = sizes_of(values, dim, domain, label, partition)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    others = math.prod([size for d, size in enumerate(values.shape) if d != dim % values.ndim])
    total: Tensor | float = sum(sizes) * others
    if weights is not None or mask is not None:
        own, whole = own_weights(values, dim, domain, sizes, label, weights, mask)
        values = values * own.to(values.dtype)
        if mask is None and whole is not None:
            total = whole.sum() * others
        else:
            counted = own.expand_as(values)
            if mask is not None:
                values, counted = torch.where(mask, values, 0.0), torch.where(mask, counted, 0.0)
            total = counted.sum()
            if domain.size > 1:
                total = sum_over(total, domain)
        total = total.to(values.dtype)
    return values.sum() / (total / domain.size)


def domain_value(loss: Tensor, manager: DomainParallelManager | None = None) -> Tensor:
    """The loss of all rows, for a log: the mean of the ranks' :func:`domain_mean`, detached, the same on each.

    Collectives: one sum over the domain ranks; none for a single one.
    """
    domain = domain_of(manager)
    return loss.detach() if domain.size == 1 else sum_over(loss.detach() / domain.size, domain)


def own_weights(
    x: Tensor,
    dim: int,
    domain: Domain,
    sizes: tuple[int, ...],
    label: str,
    weights: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """This rank's part of weights given for its rows or for all, in float64, and those of all where it has them.

    ``x`` has this rank's rows along ``dim``; ``sizes`` are the rows of each rank of ``domain``; a mask must fit ``x``.
    The first broadcasts against ``x``; the second is None if they are not known on each rank. What does not fit is a
    ValueError on all ranks alike, as are weights of all rows on some ranks and of their own on others.

    Collectives: a small all-gather the first time.
    """
    mine, rows = sizes[domain.rank], sum(sizes)
    given = torch.ones(rows, device=x.device) if weights is None else weights.detach()
    shape = tuple(given.shape)
    problem = None
    if shape not in ((mine,), (rows,)):
        problem = f"weights must be of shape ({rows},) for all rows, or ({mine},) for this rank's; got {shape}"
    elif mask is not None and (mask.dtype is not torch.bool or not _fits(mask, x)):
        problem = (
            f"the mask must be of torch.bool and broadcast against this rank's {tuple(x.shape)}; got {mask.dtype} of "
            f"shape {tuple(mask.shape)}"
        )
    complete = shape == (rows,)
    # Where one rank holds all rows, its weights say nothing of whether others have them all too.
    ambiguous = domain.size > 1 and max(sizes) == rows
    group = None if torch.compiler.is_compiling() else domain.process_group
    if group is not None:
        kind = "weights" if ambiguous else f"weights of {'all' if complete else 'its own'} rows"
        said = f"{'a mask, ' if mask is not None else ''}{kind}, rows {','.join(map(str, sizes))}"
        agree(group, (label, said), label, lambda: said, x.device, problem)
    elif problem is not None:
        raise ValueError(f"{label}: {problem}")
    given = given.to(x.device, torch.float64)
    own = given.narrow(0, sum(sizes[: domain.rank]), mine) if complete else given
    shape = tuple(mine if d == dim % x.ndim else 1 for d in range(x.ndim))
    return own.view(shape), given if complete and not ambiguous else None


def _fits(mask: Tensor, x: Tensor) -> bool:
    return mask.ndim <= x.ndim and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(x.shape), strict=False)
    )


def cos_latitude_weights(latitudes_deg: Tensor) -> Tensor:
    """Cosine of each latitude (degrees north): the length of its circle, relative to the equator's, in float64.

    That is the area of a row where rows are evenly spaced, to second order in their spacing; see
    :func:`latitude_weights` for exact areas. Weights have no scale; what uses them divides by their sum over all rows.
    A latitude that is not within -90 to 90 is a ValueError.
    """
    return torch.cos(torch.deg2rad(checked_latitudes(latitudes_deg)))


def latitude_weights(rows: int | Tensor, kind: str = "cell", *, pole_is_row: bool | None = None) -> Tensor:
    """Weight of each row of a grid, of shape (rows,), in float64, with a mean of 1 over all rows.

    - ``"cell"``: the area of a row's cells, exactly. Between latitudes a and b a sphere of radius 1 has the area
      2 pi (sin b - sin a); rows meet halfway between their latitudes, and the outer ones reach to the poles. A row at a
      pole is half a row high, and counts.
    - ``"cos"``: the cosine of a row's latitude (:func:`cos_latitude_weights`); a row at a pole counts nothing.

    Args:
        rows: Number of rows of a grid that is regular from pole to pole, or the latitudes of any grid in degrees, all
            rows of it, from north to south or south to north.
        kind: ``"cell"`` or ``"cos"``.
        pole_is_row: Whether the first and the last row of a regular grid lie at the poles (721 rows of 0.25 degrees) or
            half a row away from them (720). To be said where ``rows`` is a number.

    Raises:
        ValueError: If ``kind`` is unknown, ``pole_is_row`` is missing or not asked for, or latitudes are not 1-D, in
            order and within -90 to 90 degrees.
    """
    if kind not in ("cell", "cos"):
        raise ValueError(f"kind must be 'cell' or 'cos'; got {kind!r}")
    if isinstance(rows, Tensor) == (pole_is_row is not None):
        raise ValueError(
            "pole_is_row must be True or False where rows is a number, and left out where rows are latitudes; got "
            f"pole_is_row={pole_is_row} with {'latitudes' if isinstance(rows, Tensor) else rows}"
        )
    latitudes = rows if isinstance(rows, Tensor) else _regular_latitudes(rows, bool(pole_is_row))
    latitudes = checked_latitudes(latitudes)
    weights = cos_latitude_weights(latitudes)
    radians = torch.deg2rad(latitudes)
    steps = radians.diff()
    check_order(latitudes)
    if kind == "cell":
        pole = math.pi / 2 if len(steps) == 0 or bool(steps[0] < 0) else -math.pi / 2
        ends = radians.new_tensor([pole, -pole])
        edges = torch.cat([ends[:1], (radians[1:] + radians[:-1]) / 2, ends[1:]])
        # sin b - sin a, without the cancellation of thin rows
        weights = 2 * torch.cos((edges[1:] + edges[:-1]) / 2) * torch.sin(edges.diff().abs() / 2)
    return weights / weights.mean()


def _regular_latitudes(rows: int, pole_is_row: bool) -> Tensor:
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 + pole_is_row:
        raise ValueError(
            f"rows must be an integer >= {1 + pole_is_row} with pole_is_row={pole_is_row}, or a tensor of latitudes; "
            f"got {rows!r}"
        )
    spacing = 180 / (rows - pole_is_row)
    first = 0.0 if pole_is_row else 0.5
    return 90 - spacing * (torch.arange(rows, dtype=torch.float64) + first)
