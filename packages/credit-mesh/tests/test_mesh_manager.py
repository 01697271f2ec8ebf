"""DomainParallelManager: its coordinates on imagined worlds, its groups in real processes."""

import copy
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mesh_worlds import world
from torch.distributed.device_mesh import init_device_mesh

from credit_mesh import (
    DomainParallelManager,
    RankLayout,
    RowPartition,
    destroy_domain_parallel,
    get_domain_parallel_manager,
    initialize_domain_parallel,
)


@pytest.mark.parametrize("via_mesh", [False, True], ids=["own groups", "from a mesh"])
@pytest.mark.parametrize(("size", "tensor", "domain"), [(8, 1, 2), (12, 2, 3), (4, 1, 4), (4, 1, 1), (6, 6, 1)])
def test_coordinates_and_groups_of_every_rank(size: int, tensor: int, domain: int, via_mesh: bool) -> None:
    layout = RankLayout.from_world(size, tensor=tensor, domain=domain)
    for rank in range(size):
        with world(size, rank):
            if via_mesh:
                axes = {axis: layout.size(axis) for axis in ("dp", "tp", "domain") if layout.size(axis) > 1}
                mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
                manager = DomainParallelManager.from_mesh(mesh)
            else:
                manager = DomainParallelManager(size, domain, tensor_parallel_size=tensor)
            at = layout.coords(rank)
            assert (manager.dp_rank, manager.tp_rank, manager.domain_rank) == at
            assert (manager.dp_world_size, manager.domain_world_size) == (layout.dp, layout.domain)
            assert (manager.data_parallel_size, manager.domain_parallel_size) == (layout.dp, layout.domain)
            assert (manager.world_size, manager.tensor_parallel_size, manager.shard_dim) == (size, tensor, -2)
            assert manager.layout == layout
            assert manager._domain_group_idx == rank // domain
            assert dist.get_process_group_ranks(manager.domain_group) == list(layout.group(rank, "domain"))
            assert dist.get_process_group_ranks(manager.data_parallel_group) == list(layout.group(rank, "dp"))
            assert manager.neighbor_ranks() == layout.neighbors(rank)
            assert manager.is_first_domain_rank == (at.domain == 0)
            assert manager.is_last_domain_rank == (at.domain == domain - 1)
            assert f"domain {at.domain}/{domain}" in repr(manager)
            manager.destroy()


def test_a_mesh_makes_no_new_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    with world(8, 5):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "tp", "domain"))
        monkeypatch.setattr(dist, "new_group", lambda *_, **__: pytest.fail("made a group"))
        manager = DomainParallelManager.from_mesh(mesh)
        assert manager.domain_group is mesh.get_group("domain")
        assert manager.data_parallel_group is mesh.get_group("dp")
        manager.destroy()
        assert mesh.get_group("domain").size() == 2


def test_the_singleton_lives_as_long_as_its_world() -> None:
    assert get_domain_parallel_manager() is None
    with world(4, 3):
        assert get_domain_parallel_manager() is None
        first = initialize_domain_parallel(4, 2)
        assert get_domain_parallel_manager() is first
        second = initialize_domain_parallel(4, 4)
        assert get_domain_parallel_manager() is second
        assert second.domain_rank == 3
        destroy_domain_parallel()
        assert get_domain_parallel_manager() is None
        destroy_domain_parallel()
        initialize_domain_parallel(4, 2)
    assert get_domain_parallel_manager() is None
    destroy_domain_parallel()
    with world(2, 1):
        assert get_domain_parallel_manager() is None
        assert initialize_domain_parallel(2, 2).domain_rank == 1
    first.destroy()  # its world is gone; nothing is left to do


def test_initialisation_from_a_mesh_checks_the_sizes() -> None:
    with world(8):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "tp", "domain"))
        manager = initialize_domain_parallel(8, 2, -1, tensor_parallel_size=2, mesh=mesh)
        assert get_domain_parallel_manager() is manager
        assert manager.shard_dim == -1
        with pytest.raises(ValueError, match="the sizes ask for .* the mesh has"):
            initialize_domain_parallel(8, 4, mesh=mesh)
        assert get_domain_parallel_manager() is manager


def test_the_declared_partition() -> None:
    with world(4, 1), DomainParallelManager(4, 4) as manager:
        assert manager.partition is None
        assert manager.declare(241) == RowPartition((61, 60, 60, 60))
        assert manager.partition == RowPartition.even(241, 4)
        with pytest.raises(ValueError, match=r"does not fit the granularity 16: .* declare\(241\)"):
            manager.granularity = 16
        manager.declare(RowPartition((64, 64, 64, 49)))
        manager.granularity = 16
        assert manager.declare(721).sizes == (192, 176, 176, 177)
        with pytest.raises(ValueError, match="is not a multiple of granularity=16"):
            manager.declare(RowPartition((61, 60, 60, 60)))
        with pytest.raises(ValueError, match="is for 2 ranks; the domain group has 4"):
            manager.declare(RowPartition((64, 64)))
        with pytest.raises(ValueError, match="rank 1 would hold no rows"):
            manager.declare(RowPartition((16, 0, 16, 16), allow_empty=True))
        with pytest.raises(ValueError, match="at most 1 ranks fit 3 rows"):
            manager.declare(3)
        assert manager.partition == RowPartition((192, 176, 176, 177))


def test_a_copy_of_a_manager_is_the_manager() -> None:
    with world(4, 1), DomainParallelManager(4, 2) as manager:
        assert copy.deepcopy({"manager": manager})["manager"] is manager


def test_manager_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"DomainParallelManager needs torch.distributed: call .*init_process_group"):
        DomainParallelManager(4, 2)
    with pytest.raises(ValueError, match=r"initialize_domain_parallel needs torch.distributed"):
        initialize_domain_parallel(1, 1)
    with world(4):
        with pytest.raises(ValueError, match="world_size=8, but torch.distributed has 4 ranks"):
            DomainParallelManager(8, 2)
        with pytest.raises(ValueError, match="world_size=4 is not divisible"):
            DomainParallelManager(4, 3)
        with pytest.raises(ValueError, match="domain must be an integer >= 1; got 0"):
            DomainParallelManager(4, 0)
        with pytest.raises(ValueError, match="shard_dim must be an integer"):
            DomainParallelManager(4, 2, None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the axes of the mesh must be some of dp, tp, domain, in this order"):
            DomainParallelManager.from_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("domain", "dp")))
        with pytest.raises(ValueError, match="got no names"):
            DomainParallelManager.from_mesh(init_device_mesh("cpu", (2, 2)))


# Real processes: the groups must connect the right ranks, and go away.


def _sums(manager: DomainParallelManager) -> tuple[int, int]:
    sums = []
    for group in (manager.domain_group, manager.data_parallel_group):
        value = torch.tensor(10 ** dist.get_rank())
        dist.all_reduce(value, group=group)
        sums.append(int(value))
    return sums[0], sums[1]


def _use_groups(rank: int) -> list[tuple[int, int]]:
    dist.new_group([0, 1])  # which only its members count, should names of groups depend on that
    manager = initialize_domain_parallel(4, 2, tensor_parallel_size=2)
    results = [_sums(manager)]
    results.append(_sums(initialize_domain_parallel(4, 2)))  # again, with another layout
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "domain"))
    results.append(_sums(initialize_domain_parallel(4, 2, mesh=mesh)))
    results.append(_sums(initialize_domain_parallel(4, 1, tensor_parallel_size=4)))
    destroy_domain_parallel()
    return results


def _process(rank: int, size: int, rendezvous: str, fn: Callable[[int], Any], pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        for _ in range(2):  # a second world in the same processes
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}{_}", rank=rank, world_size=size)
            result = fn(rank)
            dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(result))
    except BaseException:
        pipe.send_bytes(pickle.dumps(traceback.format_exc()))


def test_groups_in_real_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed"])
    pipes = [context.Pipe(duplex=False) for _ in range(4)]
    processes = [
        context.Process(target=_process, args=(rank, 4, str(tmp_path / "world"), _use_groups, pipes[rank][1]))
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    results = []
    for reader, _ in pipes:
        assert reader.poll(60), "a rank did not answer"
        results.append(pickle.loads(reader.recv_bytes()))
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    pair = {0: 11, 1: 11, 2: 1100, 3: 1100}
    across = {0: 101, 1: 1010, 2: 101, 3: 1010}
    for rank, result in enumerate(results):
        alone = 10**rank
        assert result == [
            (pair[rank], alone),
            (pair[rank], across[rank]),
            (pair[rank], across[rank]),
            (alone, alone),
        ]
