"""Attention over all tokens of a sharded grid: keys and values gathered, passed around, or summed up."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.blocks.block import POINTWISE, Block, attend, wide
from credit_domain.blocks.ring import ring_attention
from credit_domain.engine.driver import bring, step_for
from credit_domain.engine.ranks import Domain, domain_of, normal_dim, sizes_of
from credit_domain.engine.row_op import RowOfEach
from credit_halo.extend import agree, group_by_name, has_agreed
from credit_mesh import DomainParallelManager, RowPartition


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    ring: bool = False,
    chunk: int = 1024,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "attention",
    layer: Hashable = None,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` of the tokens of all ranks.

    Gathering takes one exchange and torch's own kernel, and each rank holds all keys and values until its backward.
    With ``ring`` they pass by in turn, forward and once more backward, and a rank never holds more than those of two.

    Args:
        query: This rank's queries, (..., L, E). Queries and keys may be divided differently.
        key: This rank's keys, (..., S, E).
        value: This rank's values, (..., S, Ev).
        attn_mask: Of this rank's queries and the keys of **all** ranks, in their order, (..., L, all keys) or what
            broadcasts to it: boolean, or added to the scores and differentiable. See :func:`local_rows`.
        scale: Factor of the scores; None is ``1 / sqrt(E)``.
        ring: Pass keys and values around.
        chunk: Keys whose scores are in memory at a time, with ``ring``.

    Returns:
        This rank's tokens, (..., L, Ev).

    Raises:
        ValueError: On all ranks alike, if a mask is not one of this rank's queries and all keys, or ranks disagree on
            whether there is one or a gradient is needed; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        This rank's keys and values to each other rank, and their gradients back; with ``ring`` as many messages as
        there are ranks less one to the rank before, twice as many backward.
    """
    domain = domain_of(manager)
    if domain.size == 1:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)
    sizes = sizes_of(key, -2, domain, label, partition, layer)
    _agree(query, key, value, attn_mask, sum(sizes), domain, label)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's own does, but before anything is sent
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    pair = torch.cat((key, value), -1)
    if ring:
        return ring_attention(query, pair, attn_mask, scale, chunk, sizes, domain, label)
    pair = bring(pair, -2, step_for(RowOfEach(), sizes, domain.rank, label), domain, label)
    return attend(query, pair[..., : key.shape[-1]], pair[..., key.shape[-1] :], attn_mask, scale)


def _agree(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keys: int, domain: Domain, label: str
) -> None:
    """Make sure, at first use, that masks fit and that every rank will take part in the backward, or none."""
    problem = None
    fit = ((1, keys), (1, query.shape[-2]))  # of the last dim, and of the one before it
    if mask is not None and any(size not in sizes for size, sizes in zip(reversed(mask.shape), fit, strict=False)):
        problem = (
            f"attn_mask has the shape {tuple(mask.shape)}; expected one of the {query.shape[-2]} queries of this rank "
            f"and the {keys} keys of all ranks, (..., {query.shape[-2]}, {keys})"
        )
    if torch.compiler.is_compiling():
        if problem is not None:
            raise ValueError(f"{label}: {problem}")
        return
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, mask))
    group = group_by_name(domain.group)
    said = f"attention {'without' if mask is None else 'with'} mask, {'with' if gradient else 'without'} gradient"
    if problem is not None and has_agreed(group, (label, said)):
        raise ValueError(f"{label}: {problem}")
    agree(group, (label, said), label, lambda: said, query.device, problem)


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "linear_attention",
) -> Tensor:
    """Attention whose cost is linear in the tokens: ``softmax(q) * scale @ (softmax(k)^T @ v)``.

    Queries are normalised over their features, keys over the tokens of all ranks. What is summed over tokens is so
    small that every rank tells every other its part.

    Shapes are those of :func:`attention`; ``scale`` is a factor of the queries, and ``1 / sqrt(E)`` where None.

    Collectives:
        One message of E * (Ev + 2) numbers for each head to and from each other rank, forward and backward.
    """
    domain = domain_of(manager)
    query = query.softmax(-1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if domain.size == 1:
        return query @ (key.softmax(-2).mT @ value)
    with torch.autocast(key.device.type, enabled=False):
        k, v = key.to(wide(key.dtype)), value.to(wide(value.dtype))
        # Each rank divides by the exponential of its own maximum, which the sum over ranks puts right. A common factor
        # of numerator and denominator has no gradient.
        least = k.new_full((*k.shape[:-2], 1, k.shape[-1]), torch.finfo(k.dtype).min)
        top = torch.cat((k.detach(), least), -2).amax(-2, keepdim=True)
        weights = (k - top).exp()
        part = torch.cat((weights.mT @ v, weights.sum(-2)[..., None], top.mT), -1)
        step = step_for(RowOfEach(), (1,) * domain.size, domain.rank, label)
        parts = bring(part.unsqueeze(-3), -3, step, domain, label)
        tops = parts[..., -1:].detach()
        sums = (parts[..., :-1] * (tops - tops.amax(-3, keepdim=True)).exp()).sum(-3)
        context: Tensor = sums[..., :-1] / sums[..., -1:]
    return query @ context.to(value.dtype)


def over_tokens(qkv: Tensor, heads: int, at: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Attend over the tokens of a grid whose dim ``at`` is sharded: (B, 3 * heads * C, ...) to (B, heads * C, ...).

    ``attend`` takes and returns (B, heads, tokens, C).
    """
    qkv = qkv.movedim(at, 2)  # sharded rows first: tokens are then in their order, rank after rank
    batch, channels, grid = qkv.shape[0], qkv.shape[1] // (3 * heads), qkv.shape[2:]
    query, key, value = (part.mT for part in qkv.reshape(batch, 3, heads, channels, grid.numel()).unbind(1))
    return attend(query, key, value).mT.reshape(batch, heads * channels, *grid).movedim(2, at)


class _TokenAttention(Block):
    """Attention over the tokens of a grid, with the parameter names of diffusion UNets."""

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        head_channels: int = 32,
        *,
        spatial: int = 2,
        dim: int = -2,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(dim, manager=manager, label=label)
        self.heads, self.spatial = heads, spatial
        self.to_qkv = POINTWISE[spatial - 1](channels, 3 * heads * head_channels, 1, bias=False)
        self.to_out = POINTWISE[spatial - 1](heads * head_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens; returns this rank's rows of ``x``, (B, C, H, W).

        Errors and collectives are those of the function that this block calls; ``dim`` must be a spatial dim.
        """
        at = normal_dim(self.dim, x.ndim, self.spatial, self.label)
        result: Tensor = self.to_out(over_tokens(self.to_qkv(x), self.heads, at, self._attend))
        return result

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError


class FullAttention(_TokenAttention):
    """:func:`attention` over all tokens of a grid, on this rank's rows (B, C, H, W).

    Args:
        channels: C.
        heads: Number of heads.
        head_channels: Channels of a head.
        spatial: Number of spatial dims; 3 for (B, C, T, H, W).
        ring: Pass keys and values around in place of gathering them.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        head_channels: int = 32,
        *,
        spatial: int = 2,
        ring: bool = False,
        dim: int = -2,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(channels, heads, head_channels, spatial=spatial, dim=dim, manager=manager, label=label)
        self.ring = ring

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, ring=self.ring, **self.sharding)


class LinearAttention(_TokenAttention):
    """:func:`linear_attention` over all tokens of a grid, with the arguments of :class:`FullAttention` but ``ring``."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(query, key, value, manager=self.manager, label=self.label)
