"""Padding of a sharded tensor."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, place, with_rows
from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import domain_of, normal_dim
from credit_domain.engine.row_op import row_op
from credit_domain.ops.rearranging import padded
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition


@row_op
class Padding(NamedTuple):
    """Rows are added before the first and after the last, or cut off where negative.

    Attributes:
        before: Rows before the first.
        after: Rows after the last.
        mode: As in torch.
        value: As in torch, in digits; None for torch's own.
        dim: The sharded dim, negative.
        ndim: Dims of the tensor.
        listed: How many amounts torch is given.
    """

    before: int
    after: int
    mode: str
    value: str | None
    dim: int
    ndim: int
    listed: int

    def footprint(self, source: RowPartition) -> Footprint:
        """See :func:`credit_domain.ops.rearranging.padded`.

        Raises:
            ValueError: If torch refuses to pad rows so, or none would be left.
        """
        before, after, mode, value, dim, ndim, listed = self
        fill = None if value is None else float.fromhex(value)
        shape, whole = [1] * ndim, [0] * listed
        shape[dim] = source.rows
        whole[-2 - 2 * dim : -2 * dim] = before, after
        try:
            F.pad(torch.empty(shape, device="meta"), whole, mode, fill)  # what torch refuses
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        if mode == "circular" and min(before, after) < 0 < max(before, after):
            return _cropped_and_wrapped(source, before, after)
        edge = EdgeRule("constant", 0.0 if fill is None else fill) if mode == "constant" else EdgeRule(mode)
        return padded(source, before, after, edge)


def _cropped_and_wrapped(source: RowPartition, before: int, after: int) -> Footprint:
    """Torch wraps around what is left, where it crops at one end; all else it fills from the rows that there were."""
    crop = padded(source, min(before, 0), min(after, 0), EdgeRule())
    wrapped = padded(crop.target, max(before, 0), max(after, 0), EdgeRule("circular"))
    first, left = max(-before, 0), crop.target.rows
    rows = tuple(tuple(first + row % left for row in need) for need in wrapped.needs)
    return replace(wrapped, source=source, needs=rows, edge=EdgeRule())


def pad(
    x: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "pad",
) -> Tensor:
    """Pad a sharded tensor: :func:`torch.nn.functional.pad` of the whole.

    Along the sharded dim rows are added before the first and after the last of all ranks (or cut off there, where
    negative), and boundaries between ranks keep their row numbers: output row ``i`` comes out on the owner of input row
    ``i``, and the last rank takes what is left over. So a convolution that takes the padding off again restores the
    partition, and each rank's rows shift by the padding before the first.

    Args:
        x: This rank's rows, of any shape that torch takes.
        pad: Amounts as in torch, (before, after) from the last dim on; of the whole tensor.
        mode: As in torch: ``constant``, ``reflect``, ``replicate`` or ``circular``.
        value: As in torch.

    Raises:
        ValueError: On all ranks alike, if torch refuses to pad the rows of the whole so, or no row would be left; and
            as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where rows are not padded.
    """
    return pad_rows(x, pad, mode, value, Call(dim, partition, manager, label))


def pad_rows(x: Tensor, amounts: Sequence[int], mode: str, value: float | None, call: Call) -> Tensor:
    """:func:`pad`, also for layers."""
    domain, label = domain_of(call.manager), call.label
    amounts = [operator.index(amount) for amount in amounts]
    if domain.size == 1:
        return F.pad(x, amounts, mode, value)
    dim = normal_dim(call.dim, x.ndim, x.ndim, label)
    if len(amounts) % 2:
        raise ValueError(f"{label}: pad must list pairs (before, after); got {len(amounts)} numbers: {tuple(amounts)}")
    at = -2 - 2 * dim
    rows = amounts[at : at + 2]
    if any(rows):
        # A float of a module may be symbolic in compiled code, and its digits are not.
        fill = None if value is None else float(value).hex()
        op = Padding(rows[0], rows[1], mode, fill, dim, x.ndim, len(amounts))
        amounts[at : at + 2] = 0, 0
        x = place(op, x, call, dim, domain).bring(x, new=not any(amounts))
        if not any(amounts):
            return x
    return with_rows(x, dim, 1, lambda x: F.pad(x, amounts, mode, value))
