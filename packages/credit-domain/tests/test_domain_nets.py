"""Whole networks of the field, converted, on 2, 3 and 4 ranks of uneven rows: the numbers of one rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from domain_models import CubeEmbedding, MultiKernelEmbedding, PeriodicConv2d, PeriodicResidualNet, UNet
from domain_reference import check_layer, randn, shard
from scipy.io import netcdf_file
from torch import nn

from credit_domain import convert_to_domain_parallel
from credit_domain.layers import DomainParallelPeriodicConv2d
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, get_domain_parallel_manager, initialize_domain_parallel

NETS = {
    "unet": (UNet, (2, 3, 36, 12), 4),
    "odd unet": (lambda: UNet(odd=True), (1, 3, 41, 12), 4),
    "embedding": (MultiKernelEmbedding, (2, 3, 44, 16), 4),
    "periodic": (PeriodicResidualNet, (1, 3, 17, 10), 1),
    "cube": (CubeEmbedding, (1, 2, 4, 36, 8), 4),
}


def convert(model: nn.Module) -> nn.Module:
    manager = get_domain_parallel_manager()
    return convert_to_domain_parallel(model, manager, custom_converters={PeriodicConv2d: DomainParallelPeriodicConv2d})


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", NETS)
def test_network_is_exact(name, ranks):
    make, shape, granularity = NETS[name]
    torch.manual_seed(0)
    model = make().double()
    partition = RowPartition.even(shape[-2], ranks, granularity)
    check_layer(model, convert, randn(*shape), partition, calls=1, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "sizes"), [("embedding", (13, 3, 21, 7)), ("periodic", (2, 1, 13, 1)), ("cube", (3, 5, 21, 7))]
)
def test_any_partition_will_do_where_no_skip_connection_crosses_a_stride(name, sizes):
    make, shape, _ = NETS[name]
    torch.manual_seed(0)
    model = make().double()
    check_layer(model, convert, randn(*shape), RowPartition(sizes), calls=1, declare=False, rtol=1e-7, atol=1e-9)


def compiled_and_plain(rank: int, name: str, backend: str) -> None:
    make, shape, granularity = NETS[name]
    manager = initialize_domain_parallel(3, 3)
    torch.manual_seed(0)
    model = convert(make().double())
    partition = manager.declare(RowPartition.even(shape[-2], 3, granularity))
    run = torch.compile(model, fullgraph=True, backend=backend)
    results = []
    for forward in (model, run):
        torch.manual_seed(1)
        x = shard(randn(*shape), partition, rank).clone().requires_grad_()
        model.zero_grad()
        out = forward(x)
        (out * out.detach().cos()).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd unet", "embedding"])
def test_compiled_equals_eager(name):
    run_processes(compiled_and_plain, 3, name, "aot_eager", timeout=900)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager():
    run_processes(compiled_and_plain, 3, "unet", "inductor", timeout=900)


@pytest.mark.parametrize("name", NETS)
def test_autocast_is_that_of_one_rank(name):
    """The same roundings in the same places; sums over rows come in another order, so a few units in the last place."""
    make, shape, granularity = NETS[name]
    torch.manual_seed(0)
    model = make()
    whole = randn(*shape, dtype=torch.float32)
    partition = RowPartition.even(shape[-2], 3, granularity)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(whole)
    state = model.state_dict()

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        twin = make()
        twin.load_state_dict(state)
        twin = convert(twin)
        manager.declare(partition)
        with torch.autocast("cpu", torch.bfloat16):
            return twin(shard(whole, partition, rank)).detach()

    out = torch.cat(run_threads(rank_main, 3), -2)
    assert out.dtype == expected.dtype
    error = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < 0.02, error


DATA = Path(os.environ.get("CREDIT_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.mark.skipif(not (DATA / "eraint_uvz.nc").exists(), reason="no eraint_uvz.nc: CREDIT_TEST_DATA names its folder")
def test_real_field():
    """ERA-Interim u, v and z at three levels, 241 x 480 with both poles, on four uneven ranks."""
    with netcdf_file(DATA / "eraint_uvz.nc", mmap=False) as file:
        fields = []
        for name in ("u", "v", "z"):
            values = torch.from_numpy(file.variables[name][:].astype("float64"))
            fields.append((values - values.mean()) / values.std())
    whole = torch.cat([field[:, :1] for field in fields], 1)
    assert whole.shape[-2:] == (241, 480)
    torch.manual_seed(0)
    model = UNet(odd=True).double()
    check_layer(model, convert, whole, RowPartition.even(241, 4, 4), calls=1, rtol=1e-6, atol=1e-8)
