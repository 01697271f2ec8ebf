"""Normalisations of a sharded tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call
from credit_domain.engine.ranks import Domain, domain_of, normal_dim, sizes_of
from credit_domain.ops.norms.moments import Normalization, normalize
from credit_mesh import DomainParallelManager, RowPartition


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    manager: DomainParallelManager | None = None,
    label: str = "group_norm",
) -> Tensor:
    """Group normalisation of a sharded tensor: :func:`torch.nn.functional.group_norm` of the whole.

    The sharded dim may be any after the channels, and ranks need not know who holds which rows.

    Args:
        x: This rank's rows, (B, C, ...).
        num_groups: Number of groups of channels.
        weight: Factor of each channel, the same on every rank, or None; likewise ``bias``.
        bias: Bias of each channel, or None.
        eps: Added to the variance.

    Raises:
        ValueError: On all ranks alike, if there are no dims after the channels, channels do not divide into groups,
            there is one value to normalise, or the ranks differ in dtype or the first two dims.

    Collectives:
        One all-gather of the statistics forward, one sum backward.
    """
    domain = domain_of(manager)
    if domain.size == 1:
        return F.group_norm(x, num_groups, weight, bias, eps)
    channels = _channels(x, label)
    if channels % num_groups:
        raise ValueError(f"{label}: {channels} channels cannot be divided into {num_groups} groups")
    sizes = (num_groups, channels // num_groups)
    scale, shift = (_affine(p, channels, [*sizes, *[1] * (x.ndim - 2)], label) for p in (weight, bias))
    # As in torch, which lets groups of one value pass where there are several samples.
    refuse = _SINGLE_VALUE if x.shape[0] == 1 else ""
    how = Normalization(tuple(range(2, x.ndim + 1)), eps, domain.group, label, refuse)
    out, _ = normalize(_as_autocast(x).reshape(x.shape[0], *sizes, *x.shape[2:]), scale, shift, how)
    return out.flatten(1, 2)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    manager: DomainParallelManager | None = None,
    label: str = "instance_norm",
) -> Tensor:
    """Instance normalisation of a sharded tensor: :func:`torch.nn.functional.instance_norm` of the whole.

    The sharded dim may be any after the channels, and ranks need not know who holds which rows. Running statistics are
    updated alike on every rank.

    Args:
        x: This rank's rows, (B, C, ...).
        running_mean: As in torch, of each channel; likewise ``running_var``.
        weight: Factor of each channel, the same on every rank, or None; likewise ``bias``.
        bias: Bias of each channel, or None.
        use_input_stats: Normalise by the statistics of ``x``; otherwise by the running ones.
        momentum: Weight of the statistics of ``x`` in the running ones.
        eps: Added to the variance.

    Raises:
        ValueError: As :func:`group_norm`; with one spatial position in all.

    Collectives:
        Those of :func:`group_norm`; none without ``use_input_stats``.
    """
    domain = domain_of(manager)
    if domain.size == 1 or not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    channels = _channels(x, label)
    ones = [1] * (x.ndim - 2)
    scale, shift = (_affine(p, channels, [channels, *ones], label) for p in (weight, bias))
    refuse = "Expected more than 1 spatial element when training"
    how = Normalization(tuple(range(2, x.ndim)), eps, domain.group, label, refuse)
    out, stats = normalize(x, scale, shift, how)
    if x.shape[0]:  # after the backward's tensors are kept, as in torch: it counts where a recomputation stops
        count, mean, var = stats.reshape(3, -1, channels).unbind()
        _track(running_mean, mean.mean(0), count[0], momentum, label)
        _track(running_var, (var * (count / (count - 1))).mean(0), count[0], momentum, label)
    return out


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    manager: DomainParallelManager | None = None,
    label: str = "batch_norm",
) -> Tensor:
    """Batch normalisation of a sharded tensor: :func:`torch.nn.functional.batch_norm` of the whole.

    The sharded dim may be any after the channels, and ranks need not know who holds which rows. The batch is that of
    the domain: statistics of other data-parallel ranks play no part. Running statistics are updated alike on every
    rank.

    Args:
        x: This rank's rows, (B, C, ...).
        running_mean: As in torch, of each channel; likewise ``running_var``.
        weight: Factor of each channel, the same on every rank, or None; likewise ``bias``.
        bias: Bias of each channel, or None.
        training: Normalise by the statistics of ``x``; otherwise by the running ones.
        momentum: Weight of the statistics of ``x`` in the running ones.
        eps: Added to the variance.

    Raises:
        ValueError: As :func:`group_norm`; with one value of each channel in all.

    Collectives:
        Those of :func:`group_norm`; none without ``training``.
    """
    domain = domain_of(manager)
    if domain.size == 1 or not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return batch_norm_over(domain.group, x, running_mean, running_var, weight, bias, momentum, eps, label)


def batch_norm_over(
    group: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    label: str,
) -> Tensor:
    """:func:`batch_norm` in training, by the statistics of all ranks of a group."""
    channels = _channels(x, label)
    ones = [1] * (x.ndim - 2)
    scale, shift = (_affine(p, channels, [channels, *ones], label) for p in (weight, bias))
    how = Normalization((0, *range(2, x.ndim)), eps, group, label, _SINGLE_VALUE)

    def track(stats: Tensor) -> None:  # as torch's kernel does, before it keeps anything for the backward
        count, mean, var = stats.reshape(3, channels).unbind()
        _track(running_mean, mean, count, momentum, label)
        _track(running_var, var * (count / (count - 1)), count, momentum, label)

    return normalize(x, scale, shift, how, track)[0]


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "layer_norm",
) -> Tensor:
    """Layer normalisation of a sharded tensor: :func:`torch.nn.functional.layer_norm` of the whole.

    Where the sharded dim is none of the last ones that are normalised, this is torch's own and moves nothing.

    Args:
        x: This rank's rows.
        normalized_shape: The last dims of the **whole** tensor, over which statistics are taken.
        weight: Factor of that shape, whole and the same on every rank, or None; likewise ``bias``.
        bias: Bias of that shape, or None.
        eps: Added to the variance.
        partition: Who holds which rows of ``x``; where None and it matters, the ranks ask each other at each call.

    Raises:
        ValueError: On all ranks alike, if the rows of all ranks are not as many as ``normalized_shape`` says, or the
            ranks differ in dtype or the other dims.

    Collectives:
        One all-gather of the statistics forward, one sum backward.
    """
    return layer_norm_of(x, normalized_shape, weight, bias, eps, Call(dim, partition, manager, label))


def layer_norm_of(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    call: Call,
) -> Tensor:
    """:func:`layer_norm`, also for layers."""
    domain, shape = domain_of(call.manager), tuple(normalized_shape)
    dim = normal_dim(call.dim, x.ndim, x.ndim, call.label)
    if domain.size == 1 or dim < -len(shape):
        return F.layer_norm(x, shape, weight, bias, eps)
    weight, bias = _rows_of(x, shape, (weight, bias), dim, domain, call)
    how = Normalization(tuple(range(-len(shape), 0)), eps, domain.group, call.label)
    out, _ = normalize(_as_autocast(x), weight, bias, how)
    return out


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "rms_norm",
) -> Tensor:
    """Root-mean-square normalisation of a sharded tensor: :func:`torch.nn.functional.rms_norm` of the whole.

    Args are those of :func:`layer_norm`; without ``eps`` it is that of the dtype, as in torch.

    Raises:
        ValueError: As :func:`layer_norm`.

    Collectives:
        Those of :func:`layer_norm`.
    """
    return rms_norm_of(x, normalized_shape, weight, eps, Call(dim, partition, manager, label))


def rms_norm_of(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None, call: Call
) -> Tensor:
    """:func:`rms_norm`, also for layers."""
    domain, shape = domain_of(call.manager), tuple(normalized_shape)
    dim = normal_dim(call.dim, x.ndim, x.ndim, call.label)
    if domain.size == 1 or dim < -len(shape):
        return F.rms_norm(x, list(shape), weight, eps)
    (weight,) = _rows_of(x, shape, (weight,), dim, domain, call)
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    how = Normalization(tuple(range(-len(shape), 0)), eps, domain.group, call.label, centered=False)
    out, _ = normalize(_as_autocast(x), weight, None, how)
    return out


_SINGLE_VALUE = "Expected more than 1 value per channel when training"


def _channels(x: Tensor, label: str) -> int:
    if x.ndim < 3:
        raise ValueError(
            f"{label}: expected a tensor (B, C, ...) with rows; got one of shape {tuple(x.shape)}. Where every rank "
            "holds the same, keep torch's own layer"
        )
    return x.shape[1]


def _affine(parameter: Tensor | None, channels: int, shape: list[int], label: str) -> Tensor | None:
    """A parameter of each channel, to broadcast from the second dim on."""
    if parameter is None:
        return None
    if parameter.shape != (channels,):
        raise ValueError(
            f"{label}: weight and bias must have one entry for each of {channels} channels; got shape "
            f"{tuple(parameter.shape)}"
        )
    return parameter.reshape([1, *shape])


def _track(running: Tensor | None, value: Tensor, count: Tensor, momentum: float | Tensor, label: str) -> None:
    """Update running statistics, unless they are of nothing."""
    if running is None:
        return
    if running.shape != value.shape:
        raise ValueError(
            f"{label}: running statistics must have one entry for each of {value.numel()} channels; got shape "
            f"{tuple(running.shape)}"
        )
    with torch.no_grad():
        updated = running * (1 - momentum) + value.to(running.dtype) * momentum
        running.copy_(torch.where(count > 0, updated, running))


def _as_autocast(x: Tensor) -> Tensor:
    """Convert to float32 where autocast does so before group, layer and RMS norms: on every device but the CPU."""
    kind = x.device.type
    if kind != "cpu" and torch.is_autocast_enabled(kind) and x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def _rows_of(
    x: Tensor,
    shape: tuple[int, ...],
    parameters: Sequence[Tensor | None],
    dim: int,
    domain: Domain,
    call: Call,
) -> list[Tensor | None]:
    """This rank's rows of parameters of the whole, made to have as many dims as ``x``."""
    label = call.label
    sizes = sizes_of(x, dim, domain, label, call.partition, call.layer)
    seen = (*x.shape[x.ndim - len(shape) : x.ndim + dim], sum(sizes), *x.shape[x.ndim + dim + 1 :])
    if seen != shape:
        raise ValueError(
            f"{label}: normalized_shape={shape} must be the last dims of the whole tensor; those are {seen}, with the "
            f"rows {sizes} of the ranks along dim {dim}"
        )
    first, own = sum(sizes[: domain.rank]), sizes[domain.rank]
    parts: list[Tensor | None] = []
    for parameter in parameters:
        if parameter is None:
            parts.append(None)
            continue
        if parameter.shape != shape:
            raise ValueError(f"{label}: weight and bias must have shape {shape}; got {tuple(parameter.shape)}")
        part = parameter.narrow(dim, first, own)
        parts.append(part.reshape([1] * (x.ndim - len(shape)) + list(part.shape)))
    return parts
