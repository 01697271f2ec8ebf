"""Operators on entries alone, constants, and what they need: operands that lie in one way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

import credit_domain.partitioner.recomputing  # noqa: F401 - makes its operator known
from credit_domain.partitioner.builder import Builder, Layout, Value
from credit_domain.partitioner.rules.table import RULES, local, replicated, rule
from credit_domain.partitioner.steps import named


def common(b: Builder, values: Sequence[Value], ndim: int) -> Layout:
    """The layout of a result of operands that are broadcast to ``ndim`` dims: that of the largest divided one."""
    best: Layout = None
    most = -1
    for value in values:
        if value.layout is None or value.fill is not None:
            continue
        shifted = value.layout._replace(dim=value.layout.dim + ndim - value.ndim)
        size = math.prod(value.shape)
        if size > most:
            best, most = shifted, size
    return best


def aligned(b: Builder, value: Value, layout: Layout, ndim: int) -> fx.Node:
    """An operand for a result with this layout."""
    if layout is None:
        return b.at(value, None)
    dim = layout.dim - (ndim - value.ndim)
    if dim < 0 or value.shape[dim] != layout.units * layout.outer:
        return b.at(value, None)  # it has no such dim, or one entry of it
    return b.at(value, layout._replace(dim=dim))


def pointwise(b: Builder, *args: Any, **kwargs: Any) -> Any:
    """Operands of one layout; the result has it too."""
    found: list[Value] = []
    _values((args, kwargs), found)
    like = b.meta[0] if isinstance(b.meta, (tuple, list)) else b.meta
    ndim = like.ndim
    layout = common(b, found, ndim)
    if layout is not None and int(like.shape[layout.dim]) != layout.units * layout.outer:  # one row, broadcast
        layout = None

    def made(value: Any) -> Any:
        if isinstance(value, Value):
            return aligned(b, value, layout, ndim)
        if isinstance(value, (tuple, list)):
            return type(value)(made(item) for item in value)
        return value

    return local(b, layout, *made(args), **{key: made(value) for key, value in kwargs.items()})


def _values(given: Any, found: list[Value]) -> None:
    if isinstance(given, Value):
        found.append(given)
    elif isinstance(given, (tuple, list)):
        for item in given:
            _values(item, found)
    elif isinstance(given, dict):
        _values(list(given.values()), found)


for _name in ("clone", "_to_copy", "alias", "detach", "contiguous", "lift_fresh_copy", "view_of", "fill.Scalar"):
    rule(_name)(pointwise)
for _name in (
    "complex",
    "polar",
    "to.dtype",
    "to.device",
    "type_as",
    "nan_to_num",
    "where.self",
    "masked_fill.Scalar",
    "masked_fill.Tensor",
):
    rule(_name)(pointwise)


for _name in ("hardswish", "hardsigmoid", "hardtanh", "mish", "silu", "elu", "selu", "celu", "softplus", "leaky_relu"):
    rule(_name)(pointwise)
for _name in (
    "threshold",
    "relu6",
    "log_sigmoid",
    "gelu",
    "softshrink",
    "hardshrink",
    "logit",
    "nan_to_num",
    "lerp.Scalar",
):
    rule(_name)(pointwise)


def is_pointwise(target: Any) -> bool:
    """Whether torch says that an operator works on entries alone."""
    return torch.Tag.pointwise in getattr(target, "tags", ()) and target not in RULES


def checkpoint_edge(b: Builder, x: Value, number: int, begins: bool) -> Value:
    """The beginning or the end of what is recomputed."""
    b.checkpoint = (number, len(b.node.meta.get("nn_module_stack", {}))) if begins else None
    return x


RULES[torch.ops.credit_domain.checkpoint_edge.default] = checkpoint_edge


@rule("_assert_tensor_metadata", "_assert_async.msg", "_assert_scalar", "sym_constrain_range_for_size")
def checked(b: Builder, *args: Any, **kwargs: Any) -> None:
    """A check of the trace, which has passed."""


@rule("zeros_like", "new_zeros", "zeros", "empty_like", "new_empty", "empty.memory_format", "new_empty_strided")
def zeros(b: Builder, *args: Any, **kwargs: Any) -> Value:
    """Zeros, made where and as they are needed."""
    return Value(b.meta, None, None, fill=0)


@rule("ones_like", "new_ones", "ones")
def ones(b: Builder, *args: Any, **kwargs: Any) -> Value:
    """Ones, made where and as they are needed."""
    return Value(b.meta, None, None, fill=1)


@rule("full_like", "new_full", "full")
def full(b: Builder, like: Any, *args: Any, **kwargs: Any) -> Value:
    """One number, made where and as it is needed."""
    fill = args[-1] if args else kwargs["fill_value"]
    if not isinstance(fill, (bool, int, float, complex)):
        made: Value = replicated(b, like, *args, **kwargs)
        return made
    return Value(b.meta, None, None, fill=fill)


@rule("copy")
def copy(b: Builder, x: Value, source: Value, *args: Any) -> Value:
    """The second operand, in the shape and dtype of the first; torch has no gradient for the operator itself."""
    ndim, dtype = x.ndim, x.dtype
    layout = common(b, [source], ndim) or (None if x.fill is not None else x.layout)
    if layout is not None and x.shape[layout.dim] != layout.units * layout.outer:
        layout = None
    shape = list(x.shape if layout is None else layout.shape(x.shape, b.place.rank))

    def copy_of(source: Tensor) -> Tensor:
        return source.to(dtype, copy=True).expand(shape)

    return b.value(b.emit(named(copy_of, "copy"), aligned(b, source, layout, ndim)), layout)
