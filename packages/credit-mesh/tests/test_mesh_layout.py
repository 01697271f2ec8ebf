"""RankLayout against brute force and against torch's own DeviceMesh."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from credit_mesh import AXES, RankLayout


def layouts(most: int) -> Iterator[RankLayout]:
    for world in range(1, most + 1):
        for tensor in range(1, world + 1):
            for domain in range(1, world + 1):
                if world % (tensor * domain) == 0:
                    yield RankLayout.from_world(world, tensor=tensor, domain=domain)


def test_every_world_up_to_64_is_row_major_with_domain_innermost() -> None:
    count = 0
    for layout in layouts(64):
        mesh = torch.arange(layout.world_size).reshape(layout.dp, layout.tp, layout.domain)
        for rank in range(layout.world_size):
            at = layout.coords(rank)
            assert mesh[at] == rank == layout.rank(*at)
            for index, axis in enumerate(AXES):
                line = [slice(i, i + 1) for i in at]
                line[index] = slice(None)
                assert list(layout.group(rank, axis)) == mesh[tuple(line)].flatten().tolist()
        for axis in AXES:
            groups = list(layout.groups(axis))
            assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
            assert all(layout.group(rank, axis) == group for group in groups for rank in group)
        count += 1
    assert count > 500


@pytest.mark.parametrize("rank", [0, 5, 63])
def test_groups_are_those_of_init_device_mesh(rank: int) -> None:
    dist.init_process_group("fake", rank=rank, world_size=64, store=FakeStore())
    try:
        for tensor, domain in [(1, 1), (2, 4), (4, 2), (1, 64), (64, 1), (8, 8)]:
            layout = RankLayout.from_world(64, tensor=tensor, domain=domain)
            mesh = init_device_mesh("cpu", (layout.dp, layout.tp, layout.domain), mesh_dim_names=AXES)
            assert tuple(mesh.get_coordinate() or ()) == layout.coords(rank)
            for axis in AXES:
                assert dist.get_process_group_ranks(mesh.get_group(axis)) == list(layout.group(rank, axis))
    finally:
        dist.destroy_process_group()


def test_device_mesh_agrees_for_every_world_up_to_64() -> None:
    for world in range(1, 65):
        dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
        try:
            for layout in layouts(world):
                if layout.world_size != world:
                    continue
                mesh = init_device_mesh("cpu", (layout.dp, layout.tp, layout.domain), mesh_dim_names=AXES)
                ranks = [
                    [[layout.rank(d, t, m) for m in range(layout.domain)] for t in range(layout.tp)]
                    for d in range(layout.dp)
                ]
                assert mesh.mesh.tolist() == ranks
                for axis in AXES:
                    assert dist.get_process_group_ranks(mesh.get_group(axis)) == list(layout.group(world - 1, axis))
        finally:
            dist.destroy_process_group()


def test_1024_ranks_agree_with_init_device_mesh() -> None:
    layout = RankLayout.from_world(1024, tensor=4, domain=16)
    for rank in (0, 517, 1023):
        dist.init_process_group("fake", rank=rank, world_size=1024, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (16, 4, 16), mesh_dim_names=AXES)
            assert tuple(mesh.get_coordinate() or ()) == layout.coords(rank)
            for axis in AXES:
                assert dist.get_process_group_ranks(mesh.get_group(axis)) == list(layout.group(rank, axis))
        finally:
            dist.destroy_process_group()


def test_neighbors_end_at_the_edges_unless_periodic() -> None:
    layout = RankLayout(dp=2, tp=2, domain=3)
    assert layout.neighbors(3) == (None, 4)
    assert layout.neighbors(4) == (3, 5)
    assert layout.neighbors(5) == (4, None)
    assert layout.neighbors(5, periodic=True) == (4, 3)
    assert layout.neighbors(3, periodic=True) == (5, 4)
    assert layout.neighbors(1, "tp") == (None, 4)
    assert RankLayout().neighbors(0, periodic=True) == (0, 0)


def test_a_world_of_100000_ranks_lists_nothing() -> None:
    layout = RankLayout.from_world(100_000, tensor=4, domain=20)
    assert layout.coords(99_999) == (1249, 3, 19)
    group = layout.group(99_999, "dp")
    assert isinstance(group, range)
    assert len(group) == 1250
    assert next(layout.groups("dp")) == range(0, 100_000, 80)


def test_an_axis_has_its_size() -> None:
    layout = RankLayout(2, 3, 4)
    assert [layout.size(axis) for axis in AXES] == [2, 3, 4]
    assert layout.world_size == 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RankLayout(0, 1, 1), "the dp axis must be an integer >= 1; got 0"),
        (lambda: RankLayout(1, True, 1), "the tp axis must be"),
        (lambda: RankLayout(2, 1, 1).coords(2), r"rank must be in 0\.\.1; got 2"),
        (lambda: RankLayout(2, 1, 1).coords(-1), r"rank must be in 0\.\.1; got -1"),
        (lambda: RankLayout(2, 1, 1).rank(dp=2), r"dp coordinate must be in 0\.\.1; got 2"),
        (lambda: RankLayout(2, 1, 1).group(0, "pp"), "axis must be one of dp, tp, domain; got 'pp'"),
        (lambda: RankLayout.from_world(6, tensor=4), "not divisible"),
    ],
)
def test_mistakes_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
