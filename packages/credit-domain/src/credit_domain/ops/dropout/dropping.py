"""Dropout of a sharded tensor.

One rank would draw one mask for the whole. Where each element is dropped for itself, every rank here draws its own
mask, other than those of its peers although their random generators may be in the same state, and all generators move
on by as much, however many rows a rank has. Where whole channels are dropped, all ranks must drop the same ones: those
that one rank would have dropped, drawn on the first.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.ranks import Domain, domain_of, normal_dim
from credit_mesh import DomainParallelManager

_SELU = 1.0507009873554805 * 1.6732632423543772  # its limit far below zero, which alpha dropout drops to


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    manager: DomainParallelManager | None = None,
) -> Tensor:
    """Drop elements of a sharded tensor: :func:`torch.nn.functional.dropout`, with another mask on each rank.

    The mask follows from the random generator of the device of ``x`` and from the rank. The generator moves on by as
    much on every rank.

    Args:
        x: This rank's rows, of any shape.
        p: Probability that an element is dropped.
        training: Drop; otherwise ``x`` is returned.
        inplace: Modify ``x``.

    Raises:
        ValueError: If ``p`` is no probability.

    Collectives:
        None.
    """
    domain = domain_of(manager)
    if _as_torch(domain, p, training):
        return F.dropout(x, p, training, inplace)
    keep = keep_mask(x, p, domain.rank)
    return (x.mul_(keep) if inplace else x * keep).mul_(1 / (1 - p))


def alpha_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    manager: DomainParallelManager | None = None,
) -> Tensor:
    """Alpha dropout of a sharded tensor: :func:`torch.nn.functional.alpha_dropout`; see :func:`dropout`."""
    domain = domain_of(manager)
    if _as_torch(domain, p, training):
        return F.alpha_dropout(x, p, training, inplace)
    return _alpha(x, keep_mask(x, p, domain.rank), p, inplace)


def dropout1d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    dim: int = -1,
    manager: DomainParallelManager | None = None,
    label: str = "dropout1d",
) -> Tensor:
    """Drop channels of a sharded tensor (B, C, L) or (C, L); see :func:`credit_domain.functional.dropout2d`."""
    return _dropout_channels(1, x, p, training, inplace, dim, manager, label)


def dropout2d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    dim: int = -2,
    manager: DomainParallelManager | None = None,
    label: str = "dropout2d",
) -> Tensor:
    """Drop channels of a sharded tensor: :func:`torch.nn.functional.dropout2d` of the whole.

    The channels are those that one rank would drop with the random generator of the first rank. All generators move on
    by as much.

    Args:
        x: This rank's rows, (B, C, H, W). Like torch's, this takes a tensor with three dims for (B, C, L).
        p: Probability that a channel is dropped.
        training: Drop; otherwise ``x`` is returned.
        inplace: Modify ``x``.

    Raises:
        ValueError: If ``p`` is no probability, or ``dim`` is no spatial dim; on all ranks alike, if they differ in the
            batch, the channels or the dtype.

    Collectives:
        One broadcast of the mask of channels, forward.
    """
    return _dropout_channels(2, x, p, training, inplace, dim, manager, label)


def dropout3d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    dim: int = -2,
    manager: DomainParallelManager | None = None,
    label: str = "dropout3d",
) -> Tensor:
    """Drop channels of a sharded tensor (B, C, T, H, W); see :func:`credit_domain.functional.dropout2d`."""
    return _dropout_channels(3, x, p, training, inplace, dim, manager, label)


def feature_alpha_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    dim: int = -2,
    manager: DomainParallelManager | None = None,
    label: str = "feature_alpha_dropout",
) -> Tensor:
    """Alpha dropout of channels of a sharded tensor (B, C, ...): :func:`torch.nn.functional.feature_alpha_dropout`.

    See :func:`credit_domain.functional.dropout2d`.
    """
    domain = domain_of(manager)
    if _as_torch(domain, p, training):
        return F.feature_alpha_dropout(x, p, training, inplace)
    factors = _channel_factors(x, 2, p, dim, domain, label)
    return _alpha(x, factors != 0, p, inplace)


def _dropout_channels(
    nd: int,
    x: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    dim: int,
    manager: DomainParallelManager | None,
    label: str,
) -> Tensor:
    domain = domain_of(manager)
    if x.ndim not in (nd + 1, nd + 2):
        raise ValueError(f"{label}: expected {nd + 1} or {nd + 2} dims; got a tensor of shape {tuple(x.shape)}")
    if _as_torch(domain, p, training):
        return (F.dropout1d, F.dropout2d, F.dropout3d)[nd - 1](x, p, training, inplace)
    factors = _channel_factors(x, 2 if nd == 2 else x.ndim - nd, p, dim, domain, label)
    return x.mul_(factors) if inplace else x * factors


def _as_torch(domain: Domain, p: float, training: bool) -> bool:
    """Whether torch's own function does the same: nothing is drawn, or by one rank, or ``p`` is refused."""
    return domain.size == 1 or not training or not 0 < p < 1


def _channel_factors(x: Tensor, first: int, p: float, dim: int, domain: Domain, label: str) -> Tensor:
    """What channels are multiplied by, 0 or ``1 / (1 - p)``, for ``first`` dims of batch and channels."""
    normal_dim(dim, x.ndim, x.ndim - first, label)
    sizes = list(x.shape[:first])
    # torch draws them for a batch and channels whatever follows.
    drawn = torch.feature_dropout(x.new_ones(sizes if first == 2 else [1, *sizes]), p, True)
    factors: Tensor = torch.ops.credit_halo.broadcast(drawn, 0, domain.group, True)  # takes the group by name
    return factors.reshape(sizes + [1] * (x.ndim - first))


def _alpha(x: Tensor, keep: Tensor, p: float, inplace: bool) -> Tensor:
    scale = ((_SELU**2 * p + 1) * (1 - p)) ** -0.5
    shift = (keep.to(x.dtype) - (1 - p)) * (_SELU * scale)
    return (x.mul_(keep) if inplace else x * keep).mul_(scale).add_(shift)


# The operator


@torch.library.custom_op("credit_domain::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def keep_mask(x: Tensor, p: float, rank: int) -> Tensor:
    """Which elements to keep, each with probability ``1 - p``: drawn by a generator of this rank's own."""
    generator = torch.Generator(x.device)
    generator.manual_seed(_seed(x.device, rank))
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generator)


@keep_mask.register_fake
def _(x: Tensor, p: float, rank: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def _seed(device: torch.device, rank: int) -> int:
    """A seed of this rank from the state of the device's generator, which moves on."""
    if device.type == "cuda":  # its state is known without waiting for the device
        state = torch.cuda.get_rng_state(device).numpy().tobytes()
        torch.rand(1, device=device)
    else:
        state = torch.randint(1 << 62, (1,), device=device).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(state + rank.to_bytes(8, "big")).digest()[:8], "big")
