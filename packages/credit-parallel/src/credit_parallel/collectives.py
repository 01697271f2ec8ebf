"""Averages and norms of gradients: in few, large messages, and exact whatever the parameters are sharded over."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from credit_halo import naming_missing_ranks
from credit_halo.extend import agree, as_bytes
from credit_parallel._torch_private import copy_all, norms_of, scale_all
from credit_parallel.contract import device_of, gather_numbers

BUCKET_BYTES = 1 << 26
"""Gradients travel in buckets of at most this size; larger ones travel alone, without a copy."""


# Averages


@naming_missing_ranks("averaging over ranks")
@torch.no_grad()
def all_reduce_avg(t: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Average a tensor over ranks, in place, on any backend; no gradient flows through it.

    Args:
        t: A floating-point or complex tensor of the same shape and dtype on every rank; it is returned.

    Raises:
        ValueError: If ``t`` has no mean, or this rank is none of the group.

    Collectives: one sum.
    """
    if isinstance(t, DTensor) or not (t.is_floating_point() or t.is_complex()):
        kind = "a DTensor" if isinstance(t, DTensor) else t.dtype
        raise ValueError(f"all_reduce_avg needs a plain floating-point or complex tensor; got {kind}")
    ranks = _ranks_in(group, "all_reduce_avg")
    if ranks > 1:
        flat = t.detach().contiguous()
        _average(flat, ranks, group)
        if flat.data_ptr() != t.data_ptr():
            t.copy_(flat)
    return t


@naming_missing_ranks("averaging gradients")
@torch.no_grad()
def allreduce_grads_avg(grads: Iterable[Tensor | None], group: ProcessGroup | None = None) -> None:
    """Average gradients over ranks, in place.

    Gradients of one dtype and device travel together. Of a DTensor each rank's shard is averaged with the same shard on
    the other ranks.

    Args:
        grads: Gradients of the same parameters, in the same order, on every rank. None is left out, so it must be None
            on every rank; :func:`credit_parallel.domain.sync_domain_gradients` agrees on that first.

    Raises:
        ValueError: On all ranks alike, if any has a gradient that is sparse, no floating-point tensor, or sharded over
            ranks of the group, or has other gradients than the rest. Ranks compare once for each list of shapes.

    Collectives: one sum for each bucket (:data:`BUCKET_BYTES`); a small all-gather the first time.
    """
    present = [grad for grad in grads if grad is not None]
    ranks = _ranks_in(group, "allreduce_grads_avg")
    if ranks > 1:
        _agree("allreduce_grads_avg", present, group, _no_average_of(present, group))
        _in_buckets(map(local_of, present), lambda flat: _average(flat, ranks, group))


@naming_missing_ranks("giving every rank the same weights")
@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> None:
    """Give every rank the values of the group's first rank, in place.

    ``tensors`` are the same ones, in the same order, on every rank: of any dtype; of a DTensor this rank's shard. Those
    without data (on the meta device) are left out. Other shapes or dtypes are a ValueError on all ranks alike.

    Collectives: one broadcast for each bucket; a small all-gather the first time.
    """
    present = [tensor for tensor in tensors if not tensor.is_meta]
    if _ranks_in(group, "broadcast_tensors") > 1:
        _agree("broadcast_tensors", present, group, None)
        source = dist.get_global_rank(_member(group), 0)
        send = lambda flat: dist.broadcast(as_bytes(flat), source, group=group)  # noqa: E731
        _in_buckets(map(local_of, present), send, device_of(group))


def start_equal(
    model: nn.Module, groups: Iterable[ProcessGroup], buffers: Iterable[ProcessGroup] | None = None
) -> None:
    """Give the model of every rank the weights of the first one, by a broadcast over each group in turn.

    ``buffers`` are the groups of the axes that buffers are the same along, where these are fewer: domain ranks may hold
    buffers of their own rows.
    """
    groups = list(groups)
    for group in groups:
        broadcast_tensors(model.parameters(), group)
    for group in groups if buffers is None else buffers:
        broadcast_tensors(model.buffers(), group)


def local_of(t: Tensor) -> Tensor:
    """The memory of a tensor on this rank: of a DTensor its shard."""
    return t.to_local() if isinstance(t, DTensor) else t


def _average(flat: Tensor, ranks: int, group: ProcessGroup | None) -> None:
    half = flat.dtype is torch.float16  # whose sum may overflow where the mean does not
    if half:
        flat.div_(ranks)
    dist.all_reduce(flat, group=group)
    if not half:
        flat.div_(ranks)


def _in_buckets(tensors: Iterable[Tensor], act: Callable[[Tensor], None], device: torch.device | None = None) -> None:
    """Have ``act`` change the entries of tensors in place, in flat buckets of one dtype, on a kind of device."""
    for bucket in _buckets(tensors):
        there = bucket[0].device if device is None or device.type == bucket[0].device.type else device
        if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].device == there:
            act(bucket[0].view(-1))
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(there)
        act(flat)
        parts = torch.split(flat.to(bucket[0].device), [tensor.numel() for tensor in bucket])
        copy_all(bucket, [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)])


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that have elements, those of one dtype and device together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    return list(kinds.values())


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    for kind in _by_kind(tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in kind:
            nbytes = tensor.numel() * tensor.element_size()
            if bucket and size + nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += nbytes
        yield bucket


def _no_average_of(grads: Sequence[Tensor], group: ProcessGroup | None) -> str | None:
    """What cannot be averaged, if anything; the index is that among the gradients that are there."""
    ranks = set(dist.get_process_group_ranks(_member(group)))
    fine: set[Hashable] = set()
    for i, grad in enumerate(grads):
        if grad.layout is not torch.strided:
            return f"gradient {i} is sparse ({grad.layout}): use dense gradients (sparse=False)"
        if not (grad.is_floating_point() or grad.is_complex()):
            return f"gradient {i} is of {grad.dtype}, which has no mean"
        if not isinstance(grad, DTensor) or (spec := (grad.device_mesh, grad.placements)) in fine:
            continue
        if any(len(ranks & set(dist.get_process_group_ranks(shards))) > 1 for shards in _groups_of(grad)):
            return (
                f"gradient {i} is sharded over ranks of the group that it is to be averaged over ({grad.placements} on "
                f"{grad.device_mesh}): fully_shard has averaged it there already"
            )
        fine.add(spec)
    return None


def _agree(what: str, tensors: Sequence[Tensor], group: ProcessGroup | None, problem: str | None) -> None:
    kinds = tuple((tensor.dtype, tuple(local_of(tensor).shape)) for tensor in tensors)

    def describe() -> str:
        return ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for dtype, shape in kinds)

    agree(_member(group), (what, kinds), what, describe, device_of(group), problem)


def _member(group: ProcessGroup | None) -> ProcessGroup:
    chosen = dist.group.WORLD if group is None else group
    assert chosen is not None
    return chosen


def _ranks_in(group: ProcessGroup | None, what: str) -> int:
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    if ranks < 1:
        raise ValueError(f"{what}: rank {dist.get_rank()} is not in the group")
    return ranks


# Norms


@naming_missing_ranks("norm of the gradients")
@torch.no_grad()
def total_grad_norm(
    grads: Iterable[Tensor | None], norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Norm of all gradients as one vector: that of the unsharded ones, whatever each is sharded over.

    Returns a plain scalar, in float64 if a gradient is and else in float32. It is the same on every rank, if the
    gradients that ranks hold copies of are.

    Args:
        grads: Gradients of the same parameters, in the same order, on every rank: DTensors on any meshes and plain
            tensors, mixed. A plain tensor is taken to be the same on every rank, and counts once. None is left out, so
            a gradient that is sharded must be None on all of its ranks or on none.
        norm_type: The p of the p-norm: positive, or infinity.
        error_if_nonfinite: Raise on all ranks of the world together where the norm is infinite or NaN on any.

    Raises:
        ValueError: If ``norm_type`` is not positive, or a gradient is sparse.
        RuntimeError: On all ranks of the world alike, naming those whose gradients are not finite.

    Collectives: one sum of a few numbers over each axis that gradients are sharded along; with ``error_if_nonfinite``
    an all-gather of one over the world, which every rank must take part in.
    """
    return _total_norm([(grad, grad) for grad in grads if grad is not None], norm_type, error_if_nonfinite)


@naming_missing_ranks("norm of the gradients")
@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scale gradients, in place, so that their norm is at most ``max_norm``; returns the norm before that.

    Does what :func:`torch.nn.utils.clip_grad_norm_` does for unsharded parameters, also for those that it does not take
    together: sharded over dp x domain, over tp, over both in any order, and not at all. ``params`` are the same, in the
    same order, on every rank. The other arguments, errors and collectives are those of :func:`total_grad_norm`; where
    it raises, the gradients stay as they are.
    """
    params = [params] if isinstance(params, Tensor) else list(params)
    total = _total_norm([(p.grad, p) for p in params], norm_type, error_if_nonfinite)
    scale = (float(max_norm) / (total + 1e-6)).clamp(max=1.0)
    for local in _by_kind(local_of(p.grad) for p in params if p.grad is not None):
        scale_all(local, scale.to(local[0].device))
    return total


def _total_norm(pairs: Sequence[tuple[Tensor | None, Tensor]], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Norm of gradients, each with a tensor that is sharded as it is: the parameter tells where there is none."""
    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"norm_type must be positive, or infinity; got {norm_type!r}")
    # Gradients by what they are sharded over. Every rank has the same ones in the same order, also of parameters
    # without a gradient, so that all take part in the same sums.
    kinds: dict[tuple[str, ...], list[Tensor]] = {}
    groups: dict[str, ProcessGroup] = {}
    dtype, home, there = torch.float32, torch.device("cpu"), torch.device("cpu")
    for i, (grad, like) in enumerate(pairs):
        if grad is not None and grad.layout is not torch.strided:
            raise ValueError(f"gradient {i} is sparse ({grad.layout}), and has no norm here: use dense gradients")
        over = _groups_of(like if grad is None else grad)
        groups.update({group.group_name: group for group in over})
        kind = kinds.setdefault(tuple(group.group_name for group in over), [])
        home = local_of(like).device if i == 0 else home
        if grad is not None:
            kind.append(local_of(_summed(grad)))
            dtype = torch.promote_types(dtype, kind[-1].abs().dtype if grad.is_complex() else grad.dtype)
    there = device_of(next(iter(groups.values()))) if groups else home
    exact = torch.float32 if there.type == "mps" else torch.float64
    norms = [_local_norm(kind, p, there, exact) for kind in kinds.values()]
    total = torch.stack(norms) if norms else torch.zeros(1, dtype=exact, device=there)
    if p < math.inf:
        total = total**p
    own = torch.isfinite(total).all()
    for name, group in groups.items():
        at = [i for i, kind in enumerate(kinds) if name in kind]
        total[at] = _reduced(total[at], p, group)
    total = total.max() if p == math.inf else total.sum() ** (1 / p)
    if error_if_nonfinite:
        _refuse_nonfinite(own, total, p)
    return total.to(home, dtype)


def _groups_of(t: Tensor) -> tuple[ProcessGroup, ...]:
    """Process groups of the axes that a tensor is sharded along."""
    if not isinstance(t, DTensor):
        return ()
    mesh = t.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(t.placements)
        if mesh.size(axis) > 1 and not (placement.is_replicate() or placement.is_partial())
    )


def _summed(grad: Tensor) -> Tensor:
    """A gradient of which no axis has the sum still to come."""
    if not isinstance(grad, DTensor) or not any(placement.is_partial() for placement in grad.placements):
        return grad
    placements = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
    summed: Tensor = grad.redistribute(placements=placements)
    return summed


def _local_norm(local: Sequence[Tensor], p: float, device: torch.device, exact: torch.dtype) -> Tensor:
    """Norm of this rank's entries: each tensor's in float32 at least, and that of those in double precision."""
    parts = []
    for tensors in _by_kind(local):
        norms = norms_of(tensors, p, torch.promote_types(tensors[0].dtype, torch.float32))
        parts.append(torch.stack(norms).abs().to(device, exact))
    if not parts:
        return torch.zeros((), dtype=exact, device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.cat(parts), p)
    return norm


def _reduced(values: Tensor, p: float, group: ProcessGroup) -> Tensor:
    """The sum over a group, or the maximum; NaN stays NaN, which a backend's maximum may lose."""
    if p < math.inf:
        dist.all_reduce(values, group=group)
        return values
    both = torch.stack([values.nan_to_num(0.0, posinf=math.inf), values.isnan().to(values)])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return both[0].where(both[1] == 0, math.nan)


def _refuse_nonfinite(own: Tensor, total: Tensor, p: float) -> None:
    """Raise on every rank of the world where any has gradients without a finite norm."""
    # 1: the norm is not finite here; 2: because of this rank's own gradients.
    bad = (~torch.isfinite(total)).long() * (1 + (~own).long())
    listed = [state for (state,) in gather_numbers([int(bad)])]
    if any(listed):
        ranks = [rank for rank, state in enumerate(listed) if state == max(listed)]
        raise RuntimeError(
            f"the gradients have no finite norm (p = {p:g}): those of rank {', '.join(map(str, ranks))} are infinite, "
            "NaN or too large; no gradient was changed"
        )
