"""Operators that reduce dims: sums, means, extremes, variances, softmax; and those that need a dim whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from credit_domain import functional as F
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.rules.table import local, replicated, results, rule
from credit_domain.partitioner.steps import named, partition

aten = torch.ops.aten


def _dims(x: Value, dims: Any) -> list[int]:
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(x.ndim))
    return sorted({d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)})


def _reduced(b: Builder, x: Value, dims: list[int], keepdim: bool) -> Any:
    """The layout of a result whose rows are not reduced."""
    layout = x.layout
    assert layout is not None
    return layout if keepdim else layout._replace(dim=layout.dim - sum(d < layout.dim for d in dims))


def _reduce(
    b: Builder,
    x: Value,
    dims: Any,
    keep: bool,
    over: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Torch's own operator of this rank's part, or ``over`` where the rows are reduced."""
    along, layout = _dims(x, dims), x.layout
    if layout is None:
        return local(b, None, b.at(x, None), *args, **kwargs)
    if layout.dim not in along:
        return local(b, _reduced(b, x, along, keep), b.at(x, layout), *args, **kwargs)
    sizes = tuple(size * layout.outer for size in layout.sizes)
    where = {"dim": layout.dim, "partition": partition(sizes), "manager": b.place.manager, "label": b.label}
    b.sums(x.bytes // x.shape[layout.dim] if x.shape[layout.dim] else 0)
    node = b.emit(named(lambda x: over(x, along, where), over.__name__), b.at(x, layout))
    return results(b, node, None)


@rule("sum", "sum.dim_IntList")
def sum_(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """A sum over rows is that of the ranks' sums."""
    given = () if b.node.target is aten.sum.default else (dims, keepdim)

    def sum_rows(x: Any, along: Any, where: Any) -> Any:
        return F.sum(x, along, keepdim, dtype=dtype, **where)

    return _reduce(b, x, dims, keepdim, sum_rows, given, {"dtype": dtype})


@rule("mean", "mean.dim")
def mean(b: Builder, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Likewise, divided by the number of all entries."""
    given = () if b.node.target is aten.mean.default else (dims, keepdim)

    def mean_rows(x: Any, along: Any, where: Any) -> Any:
        return F.mean(x, along, keepdim, dtype=dtype, **where)

    return _reduce(b, x, dims, keepdim, mean_rows, given, {"dtype": dtype})


@rule("amax", "amin")
def extreme(b: Builder, x: Value, dims: Any = (), keepdim: bool = False) -> Any:
    """The extreme of the ranks' extremes."""
    over = F.amax if b.node.target is aten.amax.default else F.amin

    def extreme_of_rows(x: Any, along: Any, where: Any) -> Any:
        return over(x, along, keepdim, **where)

    return _reduce(b, x, dims, keepdim, extreme_of_rows, (_dims(x, dims), keepdim))


@rule("var.dim", "std.dim", "var_mean.dim", "var", "std", "var_mean")
def plain_variance(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """The older forms, with ``unbiased`` for the correction."""
    names = ("dim", "unbiased", "keepdim") if "dim" in str(b.node.target) else ("unbiased",)
    given = dict(zip(names, args, strict=False)) | kwargs
    correction, keepdim = int(given.get("unbiased", True)), given.get("keepdim", False)
    return _variance(b, x, given.get("dim"), correction, keepdim, args, kwargs)


@rule("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def variance(b: Builder, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    """By the counts, means and squares about the mean of the ranks."""
    by = 1 if correction is None else correction
    return _variance(b, x, dims, by, keepdim, (dims,), {"correction": correction, "keepdim": keepdim})


def _variance(b: Builder, x: Value, dims: Any, by: Any, keepdim: bool, args: Any, kwargs: Any) -> Any:
    over = {"var": F.var, "std": F.std, "var_mean": F.var_mean}.get(b.node.target.__name__.split(".")[0])
    if over is None:
        return whole_dims(b, x, _dims(x, dims), *args, **kwargs)

    def variance_of_rows(x: Any, along: Any, where: Any) -> Any:
        return over(x, along, correction=by, keepdim=keepdim, **where)

    return _reduce(b, x, dims, keepdim, variance_of_rows, args, kwargs)


@rule("logsumexp")
def logsumexp(b: Builder, x: Value, dims: Any, keepdim: bool = False) -> Any:
    """By the extremes and sums of the ranks."""

    def logsumexp_of_rows(x: Any, along: Any, where: Any) -> Any:
        return F.logsumexp(x, along, keepdim, **where)

    return _reduce(b, x, dims, keepdim, logsumexp_of_rows, (dims, keepdim))


@rule("softmax.int", "_softmax", "_safe_softmax")
def softmax(b: Builder, x: Value, dim: int, third: Any = None, **kwargs: Any) -> Any:
    """Over rows: by the extremes and sums of the ranks; the result lies as the operand."""
    layout = x.layout
    given = (dim,) if b.node.target is not aten._softmax.default and third is None else (dim, third)
    if layout is None or layout.dim != dim % x.ndim or b.node.target is not aten.softmax.int:
        return whole_dims(b, x, [dim], *given, **kwargs)
    sizes = tuple(size * layout.outer for size in layout.sizes)
    where = {"dim": layout.dim, "partition": partition(sizes), "manager": b.place.manager, "label": b.label}
    b.sums(2 * x.bytes // x.shape[layout.dim])
    step = named(lambda x: F.softmax(x, dim, third, **where), "softmax")
    return b.value(b.emit(step, b.at(x, layout)), layout)


def whole_dims(b: Builder, x: Value, dims: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Torch's own operator, which needs some dims whole: another one is divided meanwhile.

    The result must have the dims of the operand, in their order; dims of the result that are reduced with it come from
    the names of the arguments.
    """
    layout = b.free(x, dims)
    node = b.at(x, layout)
    like = b.meta[0] if isinstance(b.meta, (tuple, list)) else b.meta
    if layout is not None and like.ndim != x.ndim:
        gone = [d % x.ndim for d in dims]
        layout = layout._replace(dim=layout.dim - sum(d < layout.dim for d in gone))
    return local(b, layout, node, *args, **kwargs)


@rule("log_softmax.int", "_log_softmax", "cumsum", "cumprod", "sort", "sort.stable", "logcumsumexp", "glu", "argsort")
@rule(
    "max.dim", "min.dim", "argmax", "argmin", "prod.dim_int", "any.dim", "all.dim", "median.dim", "any.dims", "all.dims"
)
@rule("cummax", "cummin", "mode")
def along_one(b: Builder, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Along one dim, which every rank needs whole; one of the operators without a dim needs all."""
    if dim is None and "dim" not in kwargs:
        if b.node.target in (aten.glu.default, aten.sort.default, aten.argsort.default, aten.sort.stable):
            last = -1
            return whole_dims(b, x, [last], **kwargs)
        return replicated(b, x, **kwargs)
    named_dim = kwargs["dim"] if dim is None else dim
    given = () if dim is None else (dim,)
    return whole_dims(b, x, _dims(x, named_dim), *given, *args, **kwargs)


@rule("topk")
def topk(b: Builder, x: Value, k: int, dim: int = -1, *args: Any) -> Any:
    """The largest along one dim."""
    return whole_dims(b, x, [dim], k, dim, *args)


@rule("linalg_vector_norm")
def vector_norm(b: Builder, x: Value, ord: Any = 2, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Of dims that every rank needs whole."""
    return whole_dims(b, x, _dims(x, dims), ord, dims, keepdim, **kwargs)
