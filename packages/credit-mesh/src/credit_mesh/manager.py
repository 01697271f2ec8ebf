"""The domain-parallel side of one rank: its coordinates, its process groups, the partition of the input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

import credit_mesh.torch_floor  # noqa: F401 - an old torch is refused before anything else is imported
from credit_mesh._check import integer
from credit_mesh.layout import AXES, RankLayout
from credit_mesh.partition import RowPartition


class DomainParallelManager:
    """Process groups and coordinates of this rank, and the declared partition of the model's input.

    Ranks lie row-major over (dp, tp, domain) with domain innermost, as in :class:`RankLayout`: domain groups are
    consecutive ranks. The data-parallel group of a rank holds the ranks that share its tp and domain coordinates.

    Args:
        world_size: Number of ranks; must be that of torch.distributed.
        domain_parallel_size: Number of ranks that share the rows of one sample.
        shard_dim: Tensor dim that is sharded; -2 is latitude in (B, C, H, W).
        tensor_parallel_size: Tensor-parallel degree.
        timeout: Timeout of the groups; None takes torch's default for the backend, which is not that of the world.

    Attributes:
        world_size: Number of ranks.
        domain_parallel_size: Number of ranks that share the rows of one sample.
        tensor_parallel_size: Tensor-parallel degree.
        data_parallel_size: Number of data-parallel replicas.
        shard_dim: Tensor dim that is sharded.

    Raises:
        ValueError: If torch.distributed is not initialised, its world has another size, or the sizes do not divide.

    Collectives:
        Creates every domain group and every data-parallel group of the world, so every rank of it must construct its
        manager. In large worlds :meth:`from_mesh`, which creates none, is quicker.
    """

    _domain_group: ProcessGroup | None
    _dp_group: ProcessGroup | None

    def __init__(
        self,
        world_size: int,
        domain_parallel_size: int,
        shard_dim: int = -2,
        *,
        tensor_parallel_size: int = 1,
        timeout: timedelta | None = None,
    ) -> None:
        _require_distributed("DomainParallelManager")
        layout = RankLayout.from_world(world_size, tensor=tensor_parallel_size, domain=domain_parallel_size)
        if layout.world_size != dist.get_world_size():
            raise ValueError(
                f"world_size={layout.world_size}, but torch.distributed has {dist.get_world_size()} ranks; pass "
                "torch.distributed.get_world_size()"
            )
        rank = dist.get_rank()
        self._setup(layout, layout.coords(rank), shard_dim)
        # Every rank makes every group, in the same order: torch names a group after how many there were before, and
        # ranks that count differently would wait for each other under different names.
        self._domain_group = self._own_group_of(layout.groups("domain"), rank, timeout)
        self._dp_group = self._own_group_of(layout.groups("dp"), rank, timeout)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, shard_dim: int = -2) -> DomainParallelManager:
        """Build the manager from a DeviceMesh, using the mesh's own process groups.

        Args:
            mesh: A mesh whose axes are some of dp, tp and domain, in this order; an axis that is missing has one rank.
                Pass the whole mesh: from a 1-D ``mesh["domain"]`` the data axis cannot be seen.
            shard_dim: Tensor dim that is sharded; -2 is latitude in (B, C, H, W).

        Raises:
            ValueError: If torch.distributed is not initialised, the axes have other names or another order, or this
                rank is not on the mesh.
        """
        _require_distributed("DomainParallelManager.from_mesh")
        names = mesh.mesh_dim_names or ()
        if not names or tuple(axis for axis in AXES if axis in names) != tuple(names):
            raise ValueError(
                f"the axes of the mesh must be some of {', '.join(AXES)}, in this order; got {names or 'no names'}"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"rank {dist.get_rank()} is not on the mesh {mesh}")
        sizes = {axis: mesh.size(names.index(axis)) for axis in names}
        layout = RankLayout(**sizes)
        at = layout.coords(layout.rank(**{axis: mesh.get_local_rank(axis) for axis in names}))
        self = cls.__new__(cls)
        self._setup(layout, at, shard_dim)
        self._domain_group = mesh.get_group("domain") if "domain" in names else None
        self._dp_group = mesh.get_group("dp") if "dp" in names else None
        return self

    def _setup(self, layout: RankLayout, coords: tuple[int, int, int], shard_dim: int) -> None:
        self.layout = layout
        self.world_size = layout.world_size
        self.domain_parallel_size = layout.domain
        self.tensor_parallel_size = layout.tp
        self.data_parallel_size = layout.dp
        self.shard_dim = integer("shard_dim", shard_dim)
        self._dp_rank, self._tp_rank, self._domain_rank = coords
        self._domain_group_idx = self._dp_rank * layout.tp + self._tp_rank
        self._domain_group = None
        self._dp_group = None
        self._owned_groups: list[ProcessGroup] = []
        self._world = ref(_world())
        self._granularity = 1
        self._partition: RowPartition | None = None

    # Groups and coordinates

    @property
    def domain_group(self) -> ProcessGroup:
        """Process group of the ranks that share a sample's rows: halo exchange, reductions."""
        if self._domain_group is None:  # a mesh without this axis; never None, which torch would take for the world
            self._domain_group = self._alone()
        return self._domain_group

    @property
    def data_parallel_group(self) -> ProcessGroup:
        """Process group of the ranks with other samples and the same tp and domain coordinates: gradient averages."""
        if self._dp_group is None:
            self._dp_group = self._alone()
        return self._dp_group

    @property
    def domain_rank(self) -> int:
        """Rank within the domain group; 0 is the northernmost."""
        return self._domain_rank

    @property
    def domain_world_size(self) -> int:
        """Number of ranks in the domain group."""
        return self.domain_parallel_size

    @property
    def dp_rank(self) -> int:
        """Rank within the data-parallel group."""
        return self._dp_rank

    @property
    def dp_world_size(self) -> int:
        """Number of ranks in the data-parallel group."""
        return self.data_parallel_size

    @property
    def tp_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self._tp_rank

    @property
    def is_first_domain_rank(self) -> bool:
        """True for the rank at the northern edge."""
        return self._domain_rank == 0

    @property
    def is_last_domain_rank(self) -> bool:
        """True for the rank at the southern edge."""
        return self._domain_rank == self.domain_parallel_size - 1

    def neighbor_ranks(self) -> tuple[int | None, int | None]:
        """Global ranks that hold the rows just north and just south of this rank's; None beyond an edge."""
        ranks = dist.get_process_group_ranks(self.domain_group)
        before = None if self.is_first_domain_rank else ranks[self._domain_rank - 1]
        after = None if self.is_last_domain_rank else ranks[self._domain_rank + 1]
        return before, after

    # The declared partition of the model's input

    @property
    def partition(self) -> RowPartition | None:
        """Partition of the rows of the model's input, or None before one is declared."""
        return self._partition

    @property
    def granularity(self) -> int:
        """Rows in a block of a declared partition: a multiple of the model's total stride and windows."""
        return self._granularity

    @granularity.setter
    def granularity(self, value: int) -> None:
        value = integer("granularity", value, least=1)
        if self._partition is not None:
            _check_boundaries(self._partition, value)
        self._granularity = value

    def declare(self, rows: int | RowPartition) -> RowPartition:
        """Declare how the rows of the model's input are divided over the domain ranks.

        Every domain rank must declare the same.

        Args:
            rows: The global number of rows, spread evenly in blocks of :attr:`granularity`; or a partition, for a
                reader that loads its own rows.

        Returns:
            The declared partition, which :attr:`partition` returns from now on.

        Raises:
            ValueError: If a rank would hold no rows, or a partition has another number of ranks or boundaries that
                are not multiples of :attr:`granularity`.
        """
        if not isinstance(rows, RowPartition):
            partition = RowPartition.even(rows, self.domain_parallel_size, self._granularity)
        elif rows.ranks != self.domain_parallel_size:
            raise ValueError(f"{rows} is for {rows.ranks} ranks; the domain group has {self.domain_parallel_size}")
        else:
            partition = RowPartition(rows.sizes, rows.granularity)  # refuses ranks without rows
            _check_boundaries(partition, self._granularity)
        self._partition = partition
        return partition

    @contextmanager
    def declared(self, partition: RowPartition) -> Iterator[RowPartition]:
        """Inside, this partition is the declared one; afterwards the one of before is, or none.

        Every domain rank must enter and leave it alike.

        Raises:
            ValueError: As :meth:`declare`.
        """
        before = self._partition
        try:
            yield self.declare(partition)
        finally:
            self._partition = before

    # The end

    def destroy(self) -> None:
        """Destroy the groups that this manager made; groups of a DeviceMesh are left alone. May be called again."""
        groups, self._owned_groups = self._owned_groups, []
        self._domain_group = self._dp_group = None
        if dist.is_initialized() and self._world() is _world():
            for group in groups:
                dist.destroy_process_group(group)

    def __enter__(self) -> DomainParallelManager:
        """Return the manager, which is destroyed on leaving."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Destroy the groups that this manager made."""
        self.destroy()

    def __repr__(self) -> str:
        return (
            f"DomainParallelManager(dp {self.dp_rank}/{self.data_parallel_size}, "
            f"tp {self.tp_rank}/{self.tensor_parallel_size}, "
            f"domain {self.domain_rank}/{self.domain_parallel_size}, "
            f"shard_dim={self.shard_dim}, partition={self.partition})"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> DomainParallelManager:
        """Return the manager itself: a copied layer talks to the same ranks."""
        return self

    def _own_group_of(self, groups: Iterable[range], rank: int, timeout: timedelta | None) -> ProcessGroup | None:
        mine = None
        for ranks in groups:
            group = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                mine = group
                self._owned_groups.append(group)
        return mine

    def _alone(self) -> ProcessGroup:
        """A group of this rank, which needs no other rank to be made."""
        group: ProcessGroup = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        self._owned_groups.append(group)
        return group


# One manager a world. The world's group is the key, so that a manager ends with its world, and so that ranks which run
# as threads of one process, each with a world of its own, do not see each other's.
_managers: WeakKeyDictionary[ProcessGroup, DomainParallelManager] = WeakKeyDictionary()


def initialize_domain_parallel(
    world_size: int,
    domain_parallel_size: int,
    shard_dim: int = -2,
    *,
    tensor_parallel_size: int = 1,
    mesh: DeviceMesh | None = None,
    timeout: timedelta | None = None,
) -> DomainParallelManager:
    """Build the manager that :func:`get_domain_parallel_manager` returns; one that stood before is destroyed.

    Args:
        world_size: Number of ranks; must be that of torch.distributed.
        domain_parallel_size: Number of ranks that share the rows of one sample.
        shard_dim: Tensor dim that is sharded; -2 is latitude in (B, C, H, W).
        tensor_parallel_size: Tensor-parallel degree.
        mesh: Take the process groups of this DeviceMesh, whose sizes must be those given, instead of making new ones.
        timeout: Timeout of new groups; None takes torch's default for the backend.

    Raises:
        ValueError: If torch.distributed is not initialised, or sizes do not match or divide.

    Collectives:
        Those of :class:`DomainParallelManager`; none with ``mesh``.
    """
    _require_distributed("initialize_domain_parallel")
    if mesh is None:
        manager = DomainParallelManager(
            world_size,
            domain_parallel_size,
            shard_dim,
            tensor_parallel_size=tensor_parallel_size,
            timeout=timeout,
        )
    else:
        wanted = RankLayout.from_world(world_size, tensor=tensor_parallel_size, domain=domain_parallel_size)
        manager = DomainParallelManager.from_mesh(mesh, shard_dim)
        if manager.layout != wanted:
            raise ValueError(f"the sizes ask for {wanted}, the mesh has {manager.layout}")
    destroy_domain_parallel()
    _managers[_world()] = manager
    return manager


def get_domain_parallel_manager() -> DomainParallelManager | None:
    """Return the manager of this process (of this rank), or None if none was initialised in the present world."""
    return _managers.get(_world()) if dist.is_initialized() else None


@contextmanager
def set_aside() -> Iterator[None]:
    """Inside there is no present manager: for a run of a model in which no other rank takes part."""
    world = _world() if dist.is_initialized() else None
    manager = None if world is None else _managers.pop(world, None)
    try:
        yield
    finally:
        if world is not None and manager is not None:
            _managers[world] = manager


def destroy_domain_parallel() -> None:
    """Destroy the manager of this process and the groups that it made; without one, do nothing.

    Call it before ``torch.distributed.destroy_process_group()``, which ends all groups by itself.
    """
    manager = _managers.pop(_world(), None) if dist.is_initialized() else None
    if manager is not None:
        manager.destroy()


def _world() -> ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    return world


def _require_distributed(caller: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{caller} needs torch.distributed: call torch.distributed.init_process_group() first "
            "(torchrun sets the environment that it reads)"
        )


def _check_boundaries(partition: RowPartition, granularity: int) -> None:
    try:
        RowPartition(partition.sizes, granularity)
    except ValueError as error:
        raise ValueError(
            f"the declared partition does not fit the granularity {granularity}: {error}; declare the input again, "
            f"for example with declare({partition.rows})"
        ) from None
