"""Who takes part in an operation, and who holds which rows.

Ranks cannot guess a partition from their own rows, and learn it once: see :func:`sizes_of`. Everything that follows
from it is integers, worked out by functions marked :func:`constant`, which torch.compile runs once while it traces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo import all_sum
from credit_halo.extend import (
    agree,
    group_by_name,
    has_agreed,
    learn_while_tracing,
    learner,
)
from credit_mesh import DomainParallelManager, RowPartition, get_domain_parallel_manager

_F = TypeVar("_F", bound=Callable[..., Any])


class Domain(NamedTuple):
    """The ranks that share the rows.

    Attributes:
        group: Name of their process group; empty for a single rank.
        rank: This rank.
        size: Number of ranks.
        declared: Key of the declared partition of the model's input; empty if there is none.
        planned: Whether it was decided before anything runs how rows that meet lie.
    """

    group: str
    rank: int
    size: int
    declared: str
    planned: bool = False

    @property
    def process_group(self) -> ProcessGroup | None:
        """The process group; None for a single rank."""
        return group_by_name(self.group) if self.group else None


ALONE = Domain("", 0, 1, "")


def domain_of(manager: DomainParallelManager | None) -> Domain:
    """The domain of a manager, or of the present one; of a single rank where there is none."""
    if manager is None:
        manager = get_domain_parallel_manager()
    if manager is None or manager.domain_parallel_size == 1:
        return ALONE
    partition = manager.partition
    declared = "" if partition is None else partition.key
    group, planned = manager.domain_group.group_name, getattr(manager, "rows_are_planned", False)
    return Domain(group, manager.domain_rank, manager.domain_parallel_size, declared, planned)


def constant(fn: _F) -> _F:
    """Mark a function of integers and strings that torch.compile runs while it traces."""
    marked: _F = torch.compiler.assume_constant_result(fn)  # type: ignore[no-untyped-call, unused-ignore]
    return marked


def normal_dim(dim: int, ndim: int, spatial: int, what: str) -> int:
    """A sharded dim counted from the last one.

    Raises:
        ValueError: If it is none of the last ``spatial`` dims.
    """
    last = dim - ndim if dim >= 0 else dim
    if not -spatial <= last < 0:
        raise ValueError(
            f"{what}: the sharded dim must be one of the last {spatial} of a tensor with {ndim} dims; got {dim}"
        )
    return last


# Who holds which rows

new_layer = learner.new_layer
"""A number for a layer to remember what it learned by."""


def known_sizes(shape: torch.Size, dim: int, domain: Domain, layer: Hashable) -> tuple[int, ...] | None:
    """What :func:`sizes_of` says where a layer has learned it; None where it would ask the other ranks."""
    if layer is None or not domain.declared or torch.compiler.is_compiling():
        return None
    return learner.known(shape, dim, group_by_name(domain.group), domain.declared, layer)


def sizes_of(
    x: Tensor,
    dim: int,
    domain: Domain,
    label: str,
    partition: RowPartition | None = None,
    layer: Hashable = None,
) -> tuple[int, ...]:
    """Rows of each rank.

    They are those of ``partition`` where the caller knows it. Otherwise ranks tell each other: once for each layer,
    shape and declared partition, or at each call where nothing is declared or the caller is no layer. In compiled code
    they do so while it is traced.

    Raises:
        ValueError: On all ranks alike, if a rank holds other rows than the partition says, or dtypes or other dims
            differ; in compiled code, if no partition is known.

    Collectives:
        A small all-gather; none once learned.
    """
    if domain.size == 1:
        return (operator.index(x.shape[dim]),)
    if partition is not None:
        if not domain.planned:
            _check_partition(x, dim, domain, label, partition)
        return partition.sizes
    if torch.compiler.is_compiling():
        if not domain.declared:
            raise ValueError(
                f"{label}: compiled code cannot ask the other ranks for their rows at each call; declare the "
                "partition of the model's input first (shard_tensor, or manager.declare), or pass partition="
            )
        rows = operator.index(x.shape[dim])
        sizes: tuple[int, ...] = learn_while_tracing(domain.group, domain.declared, label, dim, rows)
        return sizes
    return learner.sizes(x, dim, group_by_name(domain.group), label, declared=domain.declared, layer=layer)


def _check_partition(x: Tensor, dim: int, domain: Domain, label: str, partition: RowPartition) -> None:
    problem = None
    if partition.ranks != domain.size:
        problem = f"partition={partition} is for {partition.ranks} ranks; the domain group has {domain.size}"
    elif partition.sizes[domain.rank] != x.shape[dim]:
        problem = (
            f"the tensor of shape {tuple(x.shape)} has {x.shape[dim]} rows along dim {dim}; partition={partition} says "
            f"{partition.sizes[domain.rank]}"
        )
    if torch.compiler.is_compiling():
        if problem is not None:
            raise ValueError(f"{label}: {problem}")
        return
    key = (label, partition.key, dim)
    if problem is not None and has_agreed(group_by_name(domain.group), key):
        raise ValueError(f"{label}: on rank {domain.rank} {problem}")  # the others do not ask again
    agree(group_by_name(domain.group), key, label, lambda: f"partition {partition.key}", x.device, problem)


def sum_over(x: Tensor, domain: Domain) -> Tensor:
    """The sum of ``x`` over the ranks, on every rank; differentiable, see :func:`credit_halo.all_sum`.

    Collectives:
        One sum forward, one backward.
    """
    if torch.compiler.is_compiling():  # dynamo warns where a group is looked up by its name
        total: Tensor = torch.ops.credit_halo.sum(x, domain.group, True)
        return total
    return all_sum(x, domain.process_group)
