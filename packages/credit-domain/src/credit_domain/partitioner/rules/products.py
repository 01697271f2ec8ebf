"""Products: linear layers, matrix products, Einstein sums and attention.

Each is a contraction: every operand's dims have letters, and so have the result's. Rows that the result has, too, stay
where they are. Rows that are summed over are summed over ranks, or another letter of the result is divided instead.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from credit_domain.engine.ranks import domain_of, sum_over
from credit_domain.partitioner.builder import Builder, Layout, Value
from credit_domain.partitioner.row_layout import evenly
from credit_domain.partitioner.rules.pointwise import aligned
from credit_domain.partitioner.rules.random import drop
from credit_domain.partitioner.rules.table import local, replicated, rule, whole
from credit_domain.partitioner.steps import named

aten = torch.ops.aten


def contraction(
    b: Builder,
    operands: Sequence[Value],
    letters: Sequence[str],
    out: str,
    emit: Callable[..., fx.Node],
) -> tuple[fx.Node, Layout]:
    """Write a contraction.

    Args:
        b: The builder.
        operands: The values.
        letters: A letter for each dim of each. A dim of one entry that is broadcast must have a letter of its own.
        out: The letters of the result.
        emit: Writes the product of nodes.

    Returns:
        The node, and how it lies.
    """
    sizes = {c: n for v, word in zip(operands, letters, strict=True) for c, n in zip(word, v.shape, strict=True)}
    divided = [
        (v, word, word[v.layout.dim])
        for v, word in zip(operands, letters, strict=True)
        if v.layout is not None and v.fill is None
    ]
    if not divided:
        return emit(*[b.at(v, None) for v in operands]), None
    value, word, letter = max(divided, key=lambda each: math.prod(each[0].shape))
    assert value.layout is not None
    rows = value.layout
    others = {each[2] for each in divided} - {letter}
    shared = [c for c in out if all(c in w for w, v in zip(letters, operands, strict=True) if v.layout is not None)]
    summed = letter not in out
    if summed or (others and all(letter not in w for v, w, c in divided if c != letter)):
        # A letter of the result that all divided operands have: each is divided along it, and nothing is done twice.
        found = [c for c in shared if c != letter and sizes[c] >= b.place.ranks]
        small = summed and math.prod(sizes[c] for c in out) * b.place.ranks <= math.prod(value.shape)
        if found and not small:
            letter = max(found, key=lambda c: (sizes[c] % b.place.ranks == 0, c in word, sizes[c]))
            rows, summed = evenly(0, sizes[letter], b.place.ranks), False
    nodes = []
    for v, w in zip(operands, letters, strict=True):
        nodes.append(b.at(v, rows._replace(dim=w.index(letter)) if letter in w else None))
    if not summed:
        return emit(*nodes), rows._replace(dim=out.index(letter))
    b.sums(2 * math.prod(sizes[c] for c in out) * value.dtype.itemsize)
    return b.emit(sum_step(b), emit(*nodes)), None


def sum_step(b: Builder) -> Any:
    """The sum over the ranks."""
    manager = b.place.manager
    return named(lambda x: sum_over(x, domain_of(manager)), "sum_over_ranks")


def _einsum(b: Builder, letters: Sequence[str], out: str) -> Callable[..., fx.Node]:
    equation = f"{','.join(letters)}->{out}"
    return lambda *nodes: b.emit(torch.einsum, equation, *nodes)


@rule("einsum")
def einsum(b: Builder, equation: str, operands: Sequence[Value], *args: Any, **kwargs: Any) -> Any:
    """An Einstein sum as it is written."""
    text = equation.replace(" ", "")
    words, arrow, out = text.partition("->")
    letters = words.split(",")
    if "." in text or any(len(set(w)) < len(w) for w in letters) or not arrow:
        plain_text = _plain_equation(letters, out if arrow else None, operands)
        if plain_text is None:
            return replicated(b, equation, operands, *args, **kwargs)
        letters, out = plain_text
    sizes: dict[str, int] = {}
    for word, v in zip(letters, operands, strict=True):
        for c, n in zip(word, v.shape, strict=True):
            if sizes.setdefault(c, n) != n:  # one entry, broadcast
                return replicated(b, equation, operands, *args, **kwargs)
    node, layout = contraction(b, operands, letters, out, _einsum(b, letters, out))
    return b.value(node, layout)


def _plain_equation(letters: Sequence[str], out: str | None, operands: Sequence[Value]) -> Any:
    """An equation with letters for dots, and with its result; None where a letter stands twice in an operand."""
    free = [c for c in string.ascii_letters if not any(c in w for w in letters)]
    dots = max(
        (v.ndim - len(w.replace("...", "")) for w, v in zip(letters, operands, strict=True) if "..." in w), default=0
    )
    named_dots = free[:dots]
    made = []
    for w, v in zip(letters, operands, strict=True):
        count = v.ndim - len(w.replace("...", ""))
        made.append(w.replace("...", "".join(named_dots[dots - count :])) if "..." in w else w)
    if out is None:
        every = "".join(made)
        rest = sorted(c for c in set(every) if every.count(c) == 1 and c not in named_dots)
        result = "".join(named_dots) + "".join(rest)
    else:
        result = out.replace("...", "".join(named_dots))
    if any(len(set(w)) < len(w) for w in made):
        return None
    return made, result


@rule("tensordot")
def tensordot(b: Builder, x: Value, y: Value, dims: Sequence[int], others: Sequence[int]) -> Any:
    """Dims of the one over those of the other."""
    pairs = {d % x.ndim: e % y.ndim for d, e in zip(dims, others, strict=True)}
    if any(x.shape[d] != y.shape[e] for d, e in pairs.items()):  # one entry, broadcast
        return replicated(b, x, y, dims, others)
    first = string.ascii_lowercase[: x.ndim]
    back = {e: first[d] for d, e in pairs.items()}
    second = "".join(back.get(e, string.ascii_uppercase[e]) for e in range(y.ndim))
    out = "".join(c for d, c in enumerate(first) if d not in pairs) + "".join(c for c in second if c.isupper())
    node, layout = contraction(b, (x, y), (first, second), out, _einsum(b, (first, second), out))
    return b.value(node, layout)


@rule("linear")
def linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Any:
    """Over the last dim."""
    layout = x.layout
    if layout is None and weight.layout is None:
        return local(b, None, b.at(x, None), *whole(b, (weight, bias)))
    if layout is not None and layout.dim < x.ndim - 1 and weight.layout is None:
        return local(b, layout, b.at(x, layout), *whole(b, (weight, bias)))
    batch = string.ascii_lowercase[: x.ndim - 1]
    words, out = ((batch + "y", "zy"), batch + "z") if weight.ndim == 2 else ((batch + "y", "y"), batch)
    node, layout = contraction(b, (x, weight), words, out, lambda x, w: b.emit(aten.linear.default, x, w))
    if bias is not None:
        made = b.value(node, layout)
        node = b.emit(aten.add.Tensor, node, aligned(b, bias, layout, made.ndim))
    return b.value(node, layout)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(b: Builder, x: Value, y: Value) -> Any:
    """Of matrices, with batches that are broadcast."""
    if x.layout is None and y.layout is None:
        return local(b, None, b.at(x, None), b.at(y, None))
    if b.node.target is aten.vdot.default and x.dtype.is_complex:
        return replicated(b, x, y)
    batch = max(x.ndim, y.ndim) - 2
    names = string.ascii_lowercase[: max(0, batch)]
    first = names[batch - max(0, x.ndim - 2) :] if batch > 0 else ""
    second = names[batch - max(0, y.ndim - 2) :] if batch > 0 else ""
    for u, v in zip(reversed(first), reversed(second), strict=False):
        if x.shape[first.index(u)] != y.shape[second.index(v)]:
            return _broadcast_matmul(b, x, y)
    words = (first + ("xy" if x.ndim > 1 else "y"), second + ("yz" if y.ndim > 1 else "y"))
    out = names + ("x" if x.ndim > 1 else "") + ("z" if y.ndim > 1 else "")
    target = aten.matmul.default
    node, layout = contraction(b, (x, y), words, out, lambda x, y: b.emit(target, x, y))
    return b.value(node, layout)


def _broadcast_matmul(b: Builder, x: Value, y: Value) -> Any:
    """A batch dim of one entry meets one of many."""
    ndim = b.meta.ndim
    for value, other in ((x, y), (y, x)):
        layout = value.layout
        if layout is None or value.fill is not None:
            continue
        kept = layout.dim < value.ndim - 2 or (layout.dim == value.ndim - 2) == (value is x)
        shifted = layout._replace(dim=layout.dim + ndim - value.ndim)
        if not kept or other.layout is not None or layout.units * layout.outer != b.meta.shape[shifted.dim]:
            continue
        batch = layout.dim < value.ndim - 2
        rest = aligned(b, other, shifted, ndim) if batch else b.at(other, None)
        both = (b.at(x, layout), rest) if value is x else (rest, b.at(y, layout))
        return b.value(b.emit(aten.matmul.default, *both), shifted)
    return replicated(b, x, y)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(b: Builder, add: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Any:
    """A product and a sum."""
    if (beta, alpha) != (1, 1) or b.node.target is aten.addbmm.default:
        return replicated(b, add, x, y, beta=beta, alpha=alpha)
    product = matmul(b, x, y)
    return _added(b, product, add)


def _added(b: Builder, product: Value, add: Value) -> Value:
    layout = product.layout
    node = b.emit(aten.add.Tensor, b.at(product, layout), aligned(b, add, layout, product.ndim))
    return b.value(node, layout)


@rule("scaled_dot_product_attention")
def attention(
    b: Builder,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Heads or samples are divided where they can be, else queries, with all keys and values on every rank."""
    how = {"scale": scale, "enable_gqa": enable_gqa}
    ndim = b.meta.ndim
    found = [each for each in (q, k, v) if each.layout is not None and each.fill is None]
    if dropout:
        return _attention_with_dropout(b, q, k, v, mask, dropout, causal, scale, enable_gqa)
    if not found:
        return local(b, None, *whole(b, (q, k, v, mask)), dropout, causal, **how)
    batch = [d - ndim for d in range(ndim - 2)]  # negative

    def same(d: int) -> bool:
        return len({each.shape[d] for each in (q, k, v) if each.ndim >= -d}) == 1 and all(
            e.ndim >= -d for e in (q, k, v)
        )

    layout = found[0].layout
    assert layout is not None
    at = layout.dim - found[0].ndim
    rows = None
    if at < -2 and same(at):
        rows = layout._replace(dim=at + ndim)
    else:
        can = [d for d in batch if same(d) and b.meta.shape[d] >= b.place.ranks]
        if can:
            best = max(can, key=lambda d: (b.meta.shape[d] % b.place.ranks == 0, d, b.meta.shape[d]))
            rows = evenly(best + ndim, int(b.meta.shape[best]), b.place.ranks)
    if rows is not None:
        nodes = [b.at(each, rows._replace(dim=rows.dim - ndim + each.ndim)) for each in (q, k, v)]
        masked = None if mask is None else aligned(b, mask, rows, ndim)
        return local(b, rows, *nodes, masked, dropout, causal, **how)
    if q.layout is not None and q.layout.dim == q.ndim - 2 and not causal:
        rows = q.layout
        masked = None if mask is None else aligned(b, mask, rows._replace(dim=ndim - 2), ndim)
        kv = [b.at(each, None) for each in (k, v)]
        return local(b, rows._replace(dim=ndim - 2), b.at(q, rows), *kv, masked, dropout, causal, **how)
    return replicated(b, q, k, v, mask, dropout, causal, **how)


def _attention_with_dropout(
    b: Builder, q: Value, k: Value, v: Value, mask: Any, dropout: float, causal: bool, scale: Any, gqa: bool
) -> Any:
    """As torch does it where it drops weights: two products, a softmax and a dropout."""
    ndim = b.meta.ndim
    if causal or gqa or not q.ndim == k.ndim == v.ndim or len({each.shape[:-2] for each in (q, k, v)}) > 1:
        return replicated(b, q, k, v, mask, dropout, causal, scale=scale, enable_gqa=gqa)
    batch = string.ascii_lowercase[: ndim - 2]
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5

    def product(x: fx.Node, y: fx.Node) -> fx.Node:
        x, y = b.emit(aten.mul.Scalar, x, factor), b.emit(aten.mul.Scalar, y, factor)
        return b.emit(aten.matmul.default, x, b.emit(aten.transpose.int, y, -2, -1))

    node, layout = contraction(b, (q, k), (batch + "xe", batch + "ye"), batch + "xy", product)
    like = torch.empty(*q.shape[:-1], k.shape[-2], dtype=q.dtype, device="meta")
    scores = b.value(node, layout, like)
    scores.device = q.device
    if mask is not None:
        add = aten.add.Tensor
        masked = aligned(b, mask, layout, ndim)
        if mask.dtype is torch.bool:
            masked = b.emit(torch.where, masked, 0.0, float("-inf"))
        scores = _like(scores, b.emit(add, node, masked), layout)
    layout = b.free(scores, [ndim - 1])
    scores = _like(scores, b.emit(aten.softmax.int, b.at(scores, layout), -1), layout)
    kept = drop(b, scores, dropout)
    words = (batch + "xy", batch + "yz")
    node, layout = contraction(b, (kept, v), words, batch + "xz", lambda x, y: b.emit(aten.matmul.default, x, y))
    return b.value(node, layout)


def _like(value: Value, node: fx.Node, layout: Layout) -> Value:
    made = Value(torch.empty(value.shape, dtype=value.dtype, device="meta"), layout, node)
    made.device = value.device
    return made


@rule("outer", "kron", "cdist", "_weight_norm", "bilinear")
def rarely(b: Builder, *args: Any, **kwargs: Any) -> Any:
    """Of parameters, for the most part."""
    return replicated(b, *args, **kwargs)
