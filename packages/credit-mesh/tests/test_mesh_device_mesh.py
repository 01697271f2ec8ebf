"""build_device_mesh and data_parallel_coords, on worlds whose other ranks are imagined (the fake backend)."""

import logging

import pytest
from mesh_worlds import world

from credit_mesh import RankLayout, build_device_mesh, data_parallel_coords


@pytest.mark.parametrize(
    ("block", "size", "axes"),
    [
        ({"data": "fsdp2", "tensor": 1, "domain": 1}, 8, {"dp": 8}),
        ({"data": "fsdp2", "tensor": 2, "domain": 1}, 8, {"dp": 4, "tp": 2}),
        ({"data": "fsdp2", "tensor": 2, "domain": 2}, 8, {"dp": 2, "tp": 2, "domain": 2}),
        ({"data": "ddp", "tensor": 1, "domain": 4}, 8, {"dp": 2, "domain": 4}),
        ({"data": "none", "tensor": 2, "domain": 4}, 8, {"tp": 2, "domain": 4}),
        ({"data": "fsdp2", "tensor": 8, "domain": 1}, 8, {"tp": 8}),
        ({"domain": 8}, 8, {"domain": 8}),
    ],
)
def test_the_mesh_has_the_axes_of_more_than_one_rank(block: dict, size: int, axes: dict[str, int]) -> None:
    rank = size - 1
    with world(size, rank):
        mesh, submeshes = build_device_mesh(block, "cpu")
        assert mesh is not None
        assert dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=True)) == axes
        assert set(submeshes) == set(axes)
        layout = RankLayout.from_world(size, tensor=block.get("tensor", 1), domain=block.get("domain", 1))
        for axis, submesh in submeshes.items():
            assert submesh, "submeshes are used as conditions"
            assert submesh.ndim == 1
            assert submesh.mesh.tolist() == list(layout.group(rank, axis))


def test_without_parallelism_there_is_no_mesh() -> None:
    assert build_device_mesh({"data": "none", "tensor": 1, "domain": 1}) == (None, {})
    with world(1):
        assert build_device_mesh({"data": "none"}, "cpu") == (None, {})
        assert build_device_mesh({"data": "fsdp2"}, "cpu") == (None, {})


def test_replicas_that_nothing_keeps_in_step_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with world(4), caplog.at_level(logging.WARNING, "credit_mesh"):
        assert build_device_mesh({"data": "none"}, "cpu") == (None, {})
    assert "the 4 replicas train apart" in caplog.text


def test_mesh_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group\(\) before build_device_mesh"):
        build_device_mesh({"data": "fsdp2"}, "cpu")
    with world(6):
        with pytest.raises(ValueError, match="world_size=6 is not divisible"):
            build_device_mesh({"data": "fsdp2", "tensor": 4}, "cpu")
        with pytest.raises(ValueError, match="unknown key"):
            build_device_mesh({"mode": "fsdp2"}, "cpu")


def test_coords_for_samplers() -> None:
    conf = {"trainer": {"parallelism": {"data": "ddp", "tensor": 2, "domain": 3}}}
    assert data_parallel_coords(conf) == (0, 1)
    for rank in range(24):
        with world(24, rank):
            assert data_parallel_coords(conf) == (rank // 6, 4)


def test_coords_validate_even_without_a_world() -> None:
    with pytest.raises(ValueError, match="no trainer.parallelism block"):
        data_parallel_coords({"trainer": {}})
    with world(8), pytest.raises(ValueError, match="not divisible"):
        data_parallel_coords({"parallelism": {"domain": 3}})
