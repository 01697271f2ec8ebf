"""Convolutions, pooling, resampling and norms: by the functions of :mod:`credit_domain.functional`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from credit_domain import functional as F
from credit_domain.engine.driver import Call
from credit_domain.engine.ranks import new_layer
from credit_domain.engine.row_op import footprint_for
from credit_domain.ops.conv.convolution import conv as convolve
from credit_domain.ops.conv.convolution import geometry_of
from credit_domain.ops.conv.transposed import TransposedConvolution
from credit_domain.ops.conv.transposed import conv_transpose as transposed
from credit_domain.ops.interpolation.interpolation import Resampling, numbers, resampled_partition, share_sent
from credit_domain.ops.interpolation.taps import HALF, PICKS
from credit_domain.ops.pooling.adaptive_pooling import AdaptiveWindows
from credit_domain.ops.pooling.pooling import Windows
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import Rows, in_blocks
from credit_domain.partitioner.rules.table import RULES, local, nodes, replicated, results, rule, whole
from credit_domain.partitioner.steps import named, partition
from credit_mesh import RowPartition

aten = torch.ops.aten


def _each(value: Any, nd: int) -> tuple[int, ...]:
    given = [int(v) for v in ([value] if isinstance(value, int) else value)]
    return tuple(given * nd if len(given) == 1 else given)


def _call(b: Builder, x: Value, rows: Rows) -> tuple[Call, bool]:
    """What a convolution is told, and whether another one reads the same value, so that one exchange serves both."""
    readers = sum(RULES.get(user.target) in (conv, conv_transpose) for user in b.node.args[0].users)
    call = Call(rows.dim - x.ndim, partition(rows.sizes), b.place.manager, b.label, new_layer())
    return call, readers > 1


def _where(b: Builder, x: Value, rows: Rows) -> dict[str, Any]:
    return {
        "dim": rows.dim - x.ndim,
        "partition": partition(rows.sizes),
        "manager": b.place.manager,
        "label": b.label,
    }


def _over_space(b: Builder, x: Value, nd: int) -> tuple[Any, bool]:
    """The layout to run in, and whether its rows are spatial; channels are whole."""
    layout = x.layout
    if layout is None:
        return None, False
    first = x.ndim - nd
    if layout.dim >= first:
        rows = b.spatial(x)
        assert rows is not None
        return rows, True
    if layout.dim == first - 1:
        layout = b.free(x, [first - 1], prefer=range(first, x.ndim))
        return layout, layout is not None and layout.dim >= first
    return layout, False


# Convolutions


@rule("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding")
def conv(b: Builder, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kwargs: Any) -> Any:
    """Rows from the neighbours, while this rank's own are convolved."""
    nd = weight.ndim - 2
    given: list[Any] = [*args, *(1, 0, 1, 1)[len(args) :]]
    stride, padding, dilation, groups = given
    layout, divided = _over_space(b, x, nd)
    if not divided:
        return local(b, layout, b.at(x, layout), *whole(b, (weight, bias)), *args, **kwargs)
    along = layout.dim - (x.ndim - nd)
    if not isinstance(padding, str):
        padding = _each(padding, nd)
    numbers = _each(stride, nd), padding, _each(dilation, nd), int(groups)
    geometry = geometry_of(weight.shape[2:], *numbers, "zeros")
    footprint = geometry.along(along - nd).footprint(partition(layout.sizes))
    call, shares = _call(b, x, layout)
    b.brings("halo", x, footprint)
    step = named(lambda x, weight, bias=None: convolve(x, weight, bias, geometry, call, shares), f"conv{nd}d")
    node = b.emit(step, b.at(x, layout), *whole(b, (weight, bias)))
    return b.value(node, layout._replace(sizes=footprint.target.sizes))


@rule("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def conv_transpose(b: Builder, x: Value, weight: Value, bias: Value | None = None, *args: Any) -> Any:
    """Likewise."""
    nd = weight.ndim - 2
    given: list[Any] = [*args, *(1, 0, 0, 1, 1)[len(args) :]]
    stride, padding, more, groups, dilation = given
    layout, divided = _over_space(b, x, nd)
    if not divided:
        return local(b, layout, b.at(x, layout), *whole(b, (weight, bias)), *args)
    at = layout.dim - (x.ndim - nd)
    stride, padding, more, dilation = (_each(v, nd) for v in (stride, padding, more, dilation))
    numbers = (weight.shape[2 + at], stride[at], padding[at], more[at], dilation[at])
    footprint = footprint_for(TransposedConvolution, numbers, layout.sizes)
    call, shares = _call(b, x, layout)
    b.brings("halo", x, footprint)
    how = (stride, padding, more, int(groups), dilation, call, None, shares)
    step = named(lambda x, weight, bias=None: transposed(nd, x, weight, bias, *how), f"conv_transpose{nd}d")
    node = b.emit(step, b.at(x, layout), *whole(b, (weight, bias)))
    return b.value(node, layout._replace(sizes=footprint.target.sizes))


# Pooling


def _pooled(b: Builder, x: Value, nd: int, fn: Callable[..., Any], pool: Sequence[Any], how: Any, args: Any) -> Any:
    layout, divided = _over_space(b, x, nd)
    if not divided:
        return local(b, layout, b.at(x, layout), *args)
    at = layout.dim - (x.ndim - nd)
    kernel, stride, padding, dilation, ceil = pool
    kernel, padding, dilation = _each(kernel, nd), _each(padding, nd), _each(dilation, nd)
    stride = _each(stride, nd) if stride is not None and (isinstance(stride, int) or len(stride)) else kernel
    footprint = footprint_for(Windows, (kernel[at], stride[at], padding[at], dilation[at], ceil), layout.sizes)
    where = _where(b, x, layout)
    b.brings("halo", x, footprint)
    step = named(lambda x: how(fn, x, kernel, stride, padding, dilation, ceil, where), fn.__name__)
    node = b.emit(step, b.at(x, layout))
    return results(b, node, layout._replace(sizes=footprint.target.sizes))


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d_with_indices",
)
def max_pool(
    b: Builder, x: Value, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Any:
    """The maxima of windows; indices are those of the whole."""
    name = str(b.node.target)
    nd = int(name[name.index("pool") + 4])
    fn = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[nd - 1]
    indices = "indices" in name

    def how(fn: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, where: Any) -> Any:
        return fn(x, kernel, stride, padding, dilation, ceil, indices, **where)

    args = (kernel, [] if stride is None else stride, padding, dilation, ceil)
    return _pooled(b, x, nd, fn, args, how, args)


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    b: Builder,
    x: Value,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil: bool = False,
    include: bool = True,
    divisor: Any = None,
) -> Any:
    """The means of windows."""
    name = str(b.node.target)
    nd = int(name[name.index("pool") + 4])
    fn = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[nd - 1]
    more = () if nd == 1 else (divisor,)

    def how(fn: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool, where: Any) -> Any:
        return fn(x, kernel, stride, padding, ceil, include, *more, **where)

    stride = [] if stride is None else stride
    return _pooled(
        b, x, nd, fn, (kernel, stride, padding, 1, ceil), how, (kernel, stride, padding, ceil, include, *more)
    )


@rule(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"
)
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_pool(b: Builder, x: Value, size: Any) -> Any:
    """Windows whose number is given."""
    name = str(b.node.target)
    nd = int(name[name.index("pool") + 4])
    kind = "max" if "max" in name else "avg"
    layout, divided = _over_space(b, x, nd)
    if not divided:
        return local(b, layout, b.at(x, layout), size)
    sizes = _each(size, nd)
    fn = getattr(F, f"adaptive_{kind}_pool{nd}d")
    at = layout.dim - (x.ndim - nd)
    where = _where(b, x, layout)
    more = (True,) if kind == "max" else ()
    node = b.emit(named(lambda x: fn(x, sizes, *more, **where), fn.__name__), b.at(x, layout))
    if sizes[at] == 1:
        b.sums(x.bytes // x.shape[layout.dim])
        return results(b, node, None)
    footprint = footprint_for(AdaptiveWindows, (sizes[at],), layout.sizes)
    b.brings("halo", x, footprint)
    return results(b, node, layout._replace(sizes=footprint.target.sizes))


# Resampling

_MODES = {
    "upsample_nearest": "nearest",
    "_upsample_nearest_exact": "nearest-exact",
    "upsample_linear": "linear",
    "upsample_bilinear": "bilinear",
    "upsample_bicubic": "bicubic",
    "upsample_trilinear": "trilinear",
    "_upsample_bilinear2d_aa": "bilinear",
    "_upsample_bicubic2d_aa": "bicubic",
}


@rule(*(f"{name}{n}d.vec" for name in _MODES for n in (1, 2, 3)))
@rule("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec")
def interpolate(b: Builder, x: Value, size: Any, *args: Any) -> Any:
    """Rows are weighted sums of rows."""
    name = str(b.node.target).removeprefix("aten.").removesuffix(".vec")
    nd = x.ndim - 2
    layout, divided = _over_space(b, x, nd)
    if not divided:
        return local(b, layout, b.at(x, layout), size, *args)
    antialias = name.endswith("_aa")
    mode = _MODES[name if antialias else name[:-2]]
    scale = args[-1]
    corners = None if "nearest" in mode else args[0]
    rows = int(b.meta.shape[layout.dim])
    source = partition(layout.sizes)
    declared = RowPartition(b.declared, allow_empty=True)
    target = resampled_partition(source, rows, declared if 0 not in b.declared else None)
    where = _where(b, x, layout)
    given = [int(n) for n in size] if scale is None else None
    factors = None if scale is None else [float(f) for f in scale]
    along = layout.dim - x.ndim
    spatial = tuple(0 if d == layout.dim else n for d, n in enumerate(x.shape) if d >= 2)
    asked = (numbers(given, int), numbers(factors, lambda f: f.hex()), mode, corners, None, antialias)
    computed = torch.float32 if x.dtype in HALF and mode not in PICKS else x.dtype
    op = Resampling(spatial, along, asked, computed, target=target.sizes)
    b.brings("halo", x, op.footprint(source), share_sent(op, source.rows))

    def resample(x: Tensor) -> Tensor:
        return F.interpolate(x, given, factors, mode, corners, None, antialias, target=target, **where)

    return b.value(b.emit(named(resample, "interpolate"), b.at(x, layout)), layout._replace(sizes=target.sizes))


@rule("channel_shuffle")
def channel_shuffle(b: Builder, x: Value, factor: int) -> Any:
    """Channels in another order."""
    layout = b.free(x, [x.ndim - 3])
    return local(b, layout, b.at(x, layout), factor)


@rule("pixel_shuffle", "pixel_unshuffle")
def shuffle(b: Builder, x: Value, factor: int) -> Any:
    """Channels and rows in exchange."""
    layout, divided = _over_space(b, x, 2)
    out = layout
    if divided and b.node.target is aten.pixel_shuffle.default:
        out = layout._replace(sizes=tuple(size * factor for size in layout.sizes))
    elif divided:
        layout = layout._replace(sizes=in_blocks(layout.sizes, factor))
        out = layout._replace(sizes=tuple(size // factor for size in layout.sizes))
    if layout is None or layout.sizes[b.place.rank]:
        return local(b, out, b.at(x, layout), factor)
    # Torch's own returns no rows in the shape that they came in.
    shape = list(out.shape([int(n) for n in b.meta.shape], b.place.rank))
    return b.value(b.emit(aten.reshape.default, b.at(x, layout), shape), out)


# Norms


@rule("group_norm")
def group_norm(
    b: Builder, x: Value, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Any:
    """The statistics of all ranks."""
    layout = b.free(x, [1], prefer=range(2, x.ndim))
    if layout is None or layout.dim == 0:
        return local(b, layout, b.at(x, layout), groups, *whole(b, (weight, bias)), eps, cudnn)
    where = {"manager": b.place.manager, "label": b.label}
    b.sums(3 * x.shape[0] * groups * 4 * b.place.ranks)
    step = named(lambda x, w=None, c=None: F.group_norm(x, groups, w, c, eps, **where), "group_norm")
    return b.value(b.emit(step, b.at(x, layout), *whole(b, (weight, bias))), layout)


@rule("instance_norm")
def instance_norm(
    b: Builder,
    x: Value,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Any:
    """Likewise."""
    if mean is not None or not use:
        return replicated(b, x, weight, bias, mean, var, use, momentum, eps, cudnn)
    layout = b.free(x, [1], prefer=range(2, x.ndim))
    if layout is None or layout.dim == 0:
        return local(b, layout, b.at(x, layout), *whole(b, (weight, bias)), None, None, use, momentum, eps, cudnn)
    where = {"manager": b.place.manager, "label": b.label}
    b.sums(3 * x.shape[0] * x.shape[1] * 4 * b.place.ranks)
    step = named(
        lambda x, w=None, c=None: F.instance_norm(x, None, None, w, c, True, momentum, eps, **where), "instance_norm"
    )
    return b.value(b.emit(step, b.at(x, layout), *whole(b, (weight, bias))), layout)


@rule("layer_norm")
def layer_norm(
    b: Builder,
    x: Value,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Any:
    """Of dims without the rows: local. Of all rows: the statistics of all ranks."""
    layout = x.layout
    if layout is None or layout.dim < x.ndim - len(shape):
        return local(b, layout, b.at(x, layout), list(shape), *whole(b, (weight, bias)), eps, cudnn)
    if layout.outer > 1 or len(shape) == 1:
        layout = b.free(x, range(x.ndim - len(shape), x.ndim))
        return local(b, layout, b.at(x, layout), list(shape), *whole(b, (weight, bias)), eps, cudnn)
    where = _where(b, x, layout)
    b.sums(12 * b.place.ranks)
    step = named(lambda x, w=None, c=None: F.layer_norm(x, list(shape), w, c, eps, **where), "layer_norm")
    return b.value(b.emit(step, b.at(x, layout), *whole(b, (weight, bias))), layout)


@rule("rms_norm")
def rms_norm(b: Builder, x: Value, shape: Sequence[int], weight: Any = None, eps: Any = None) -> Any:
    """See :func:`layer_norm`."""
    layout = b.free(x, range(x.ndim - len(shape), x.ndim))
    return local(b, layout, b.at(x, layout), list(shape), *whole(b, (weight,)), eps)


@rule("_native_batch_norm_legit_functional", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("native_batch_norm", "batch_norm", "_native_batch_norm_legit.no_stats")
def batch_norm(b: Builder, x: Value, weight: Any, bias: Any, *args: Any) -> Any:
    """The statistics of all ranks in training; those that were kept otherwise."""
    target = b.node.target
    name = str(target).removeprefix("aten.")
    if name.endswith("no_stats"):
        mean = var = None
        training, momentum, eps = args[:3]
    elif name.startswith("_native_batch_norm_legit_no_training"):
        mean, var, momentum, eps = args
        training = False
    else:
        mean, var, training, momentum, eps = args[:5]
    layout = b.free(x, [1], prefer=range(2, x.ndim))
    stats = whole(b, (weight, bias, mean, var))
    if layout is None or not training:
        rest = list(nodes(b, args, lambda v: None))
        if training:  # the backward keeps them, and the buffers change before it runs
            rest[:2] = [kept if kept is None else b.emit(torch.clone, kept) for kept in rest[:2]]
        made = local(b, layout, b.at(x, layout), *stats[:2], *rest)
        if isinstance(made, tuple):
            for item in made[1:]:
                if item is not None and item.layout is not None:
                    item.nodes = {None: item.nodes[layout]}
                    item.layout = None
        return made
    where = {"manager": b.place.manager, "label": b.label}
    b.sums(3 * x.shape[1] * 4 * b.place.ranks)

    def norm(x: Tensor, w: Any = None, c: Any = None, mean: Any = None, var: Any = None) -> Any:
        kept = [None if each is None else each.detach().clone() for each in (mean, var)]
        out = F.batch_norm(x, kept[0], kept[1], w, c, True, momentum, eps, **where)
        return out, *kept

    node = b.emit(named(norm, "batch_norm"), b.at(x, layout), *stats)
    likes = b.meta if isinstance(b.meta, (tuple, list)) else (b.meta,)
    out = Value(likes[0], layout, b.emit(operator.getitem, node, 0))
    if not isinstance(b.meta, (tuple, list)):
        return out
    kept = [
        Value(like, None, b.emit(operator.getitem, node, at + 1)) if at < 2 else None
        for at, like in enumerate(likes[3:])
    ]
    return (out, None, None, *kept)
