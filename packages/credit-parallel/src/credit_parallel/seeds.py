"""Random numbers on many ranks: which ranks draw the same, and noise that does not depend on the layout."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from credit_domain.extend import domain_of, sizes_of
from credit_halo.extend import agree
from credit_mesh import Coords, DomainParallelManager, RowPartition, get_domain_parallel_manager
from credit_parallel.contract import Where, device_of, place_of


class RankSeeds(NamedTuple):
    """Seeds that one number gives a rank; independent of each other, however close the numbers are."""

    #: The same on all ranks: weights, the order of samples, noise for :func:`global_noise` that all replicas share.
    world: int
    #: Shared by the ranks that work on one sample (tp and domain peers): random augmentation, data loader workers,
    #: noise for :func:`global_noise`.
    replica: int
    rank: int  #: shared by tp peers alone, which hold the same activations: dropout, noise of this rank's rows


def rank_seeds(seed: int, at: Coords) -> RankSeeds:
    """The seeds of the rank at some coordinates; nothing is seeded."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer; got {seed!r}")
    names = ("world", f"replica {at.dp}", f"rank {at.dp}, {at.domain}")
    return RankSeeds(*(_derived(seed, name) for name in names))


def seed_ranks(seed: int, where: Where = None, *, domain_alike: bool = False) -> RankSeeds:
    """Seed python's, numpy's (if it is imported) and torch's generators, CPU and GPU, for dropout and noise.

    Tensor-parallel peers, which compute the same activations, draw the same numbers; data and domain peers draw
    others. Construct a model before this, or from ``seeds.world``: its weights must start equal on all ranks.

    What a rank draws from these generators depends on the layout, as dropout does; see :func:`global_noise` for noise
    that does not. Loaders must not draw from them where domain peers read the same sample: give them
    ``torch.Generator().manual_seed(seeds.replica)``.

    ``seed`` is one integer for the whole run, the same on every rank; of the seeds, the generators got ``rank``. With
    ``domain_alike``, domain peers draw the same numbers, as a model that is partitioned operation by operation needs:
    it takes this rank's part of what one rank would draw.
    """
    _, at = place_of(where)
    at = at._replace(domain=0) if domain_alike else at
    seeds = rank_seeds(seed, at)
    random.seed(seeds.rank)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seeds.rank % (1 << 32))
    torch.manual_seed(seeds.rank)
    return seeds


def global_noise(
    shape: Sequence[int],
    partition: RowPartition | None = None,
    *,
    generator: torch.Generator,
    dim: int = -2,
    manager: DomainParallelManager | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    label: str = "global_noise",
) -> Tensor:
    """This rank's rows of standard normal noise that is the same for every number of domain ranks.

    The noise of the whole grid is drawn on every rank, and this rank's rows are taken: N ranks do N times the work and
    hold the whole field for a moment. For a field of a model's input that is little beside the model; for noise in
    each of its layers it is not.

    Args:
        shape: Shape of the whole field, all ranks together.
        partition: Rows of each rank; None takes the declared partition of the manager.
        generator: In the same state on all ranks that share a sample, and used alike by them:
            ``torch.Generator(device).manual_seed(seeds.replica)``. Numbers are drawn on its device; CPU and GPU do not
            draw the same.
        dtype: Of the noise; None takes torch's default.
        device: Where the noise is wanted; None takes that of the generator.

    Raises:
        ValueError: On all domain ranks alike, if they have seeded the generator or ask for fields differently, or the
            partition does not fit.

    Collectives: a small all-gather the first time that a seed meets a shape.
    """
    domain = domain_of(manager)
    whole = tuple(shape)
    if not -len(whole) <= dim < len(whole):
        raise ValueError(f"{label}: dim {dim} is none of the dims of shape {whole}")
    sizes: tuple[int, ...] = (whole[dim],)
    group = domain.process_group
    if group is not None:
        partition = partition or _declared(manager)
        problem = None
        if partition is None:
            problem = "no partition is declared: pass partition=, or declare the rows on the manager"
        elif (partition.rows, partition.ranks) != (whole[dim], domain.size):
            problem = f"{partition} is not for the {whole[dim]} rows along dim {dim} of {whole} on {domain.size} ranks"
        else:
            sizes = partition.sizes
        # From the state where ranks have seeded alike, they go on alike: the seed tells.
        said = f"noise of shape {whole}, dim {dim}, {dtype}, partition {sizes}, seed {generator.initial_seed()}"
        agree(group, (label, said), label, lambda: said, device_of(group), problem)
    noise = torch.randn(whole, generator=generator, device=generator.device, dtype=dtype)
    mine = noise.narrow(dim, sum(sizes[: domain.rank]), sizes[domain.rank])
    # A copy, so that the rows of the others are freed.
    return mine.clone(memory_format=torch.contiguous_format).to(generator.device if device is None else device)


def noise_like(
    x: Tensor,
    partition: RowPartition | None = None,
    *,
    generator: torch.Generator,
    dim: int = -2,
    manager: DomainParallelManager | None = None,
    label: str = "noise_like",
) -> Tensor:
    """:func:`global_noise` of the shape, dtype and device of ``x``, this rank's rows, with the same other arguments.

    A rank that has other rows than the partition says is a ValueError too.
    """
    domain = domain_of(manager)
    sizes = sizes_of(x, dim, domain, label, partition)
    shape = [sum(sizes) if d == dim % x.ndim else size for d, size in enumerate(x.shape)]
    known = RowPartition(sizes, allow_empty=True)
    return global_noise(
        shape, known, generator=generator, dim=dim, manager=manager, dtype=x.dtype, device=x.device, label=label
    )


def _declared(manager: DomainParallelManager | None) -> RowPartition | None:
    manager = manager or get_domain_parallel_manager()
    return None if manager is None else manager.partition


def _derived(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}: {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
