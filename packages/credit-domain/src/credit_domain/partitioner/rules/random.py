"""Random numbers: every rank draws those of the whole, as one rank would, and keeps its part.

So noise and dropout do not depend on the layout, where the generators of all ranks are in the same state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.rules.table import local, rule
from credit_domain.partitioner.steps import named

aten = torch.ops.aten


@rule(
    "rand_like", "randn_like", "randint_like", "randint_like.low_dtype", "bernoulli.p", "uniform", "normal_functional"
)
def like(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Random numbers in the shape of an operand, whose entries are not read."""
    b.draws = True
    empty = b.emit(torch.empty_strided, list(x.shape), list(x.stride), dtype=x.dtype, device=x.device)
    return b.value(b.emit(b.node.target, empty, *args, **kwargs), None)


@rule("native_dropout", "dropout")
def dropout(b: Builder, x: Value, p: float, training: bool | None = True) -> Any:
    """The mask of the whole, of which a rank keeps its part."""
    layout = None if x.fill is not None else x.layout
    if not training or p == 0:
        return local(b, layout, b.at(x, layout), p, training)
    out = drop(b, x, p)
    if isinstance(b.meta, Tensor):
        return out
    factors = out.node_of_factors
    return out, b.value(b.emit(aten.ne.Scalar, factors, 0), out.layout, b.meta[1])


def drop(b: Builder, x: Value, p: float) -> Value:
    """Dropout of a value; see :func:`dropout`."""
    b.draws = True
    shape, stride, dtype, device = list(x.shape), list(x.stride), x.dtype, x.device

    def factors_of_dropout() -> Tensor:
        ones = torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1)
        return F.dropout(ones, p, True)

    like = torch.empty(shape, dtype=dtype, device="meta")
    factors = Value(like, None, b.emit(named(factors_of_dropout, "factors_of_dropout")))
    layout = None if x.fill is not None else x.layout
    own = b.at(factors, layout)
    if layout is not None:
        own = b.emit(torch.clone, own)  # a part of the whole would keep the whole for the backward
    out = Value(like, layout, b.emit(aten.mul.Tensor, b.at(x, layout), own))
    out.device, out.node_of_factors = device, own
    return out
