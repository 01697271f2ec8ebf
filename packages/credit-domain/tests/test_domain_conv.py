"""Convolutions on sharded rows are torch's convolutions of the whole: every parameter, partition and dim."""

from __future__ import annotations

import copy

import pytest
import torch
from domain_reference import HEIGHTS, check_layer, partitions, randn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import credit_domain.functional as DF
from credit_domain.layers import (
    DomainParallelConv1d,
    DomainParallelConv2d,
    DomainParallelConv3d,
    DomainParallelConvTranspose1d,
    DomainParallelConvTranspose2d,
    DomainParallelConvTranspose3d,
    DomainParallelPeriodicConv2d,
)
from credit_halo import HaloExchange
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

CONV = {
    1: (nn.Conv1d, DomainParallelConv1d),
    2: (nn.Conv2d, DomainParallelConv2d),
    3: (nn.Conv3d, DomainParallelConv3d),
}
TRANSPOSED = {
    1: (nn.ConvTranspose1d, DomainParallelConvTranspose1d),
    2: (nn.ConvTranspose2d, DomainParallelConvTranspose2d),
    3: (nn.ConvTranspose3d, DomainParallelConvTranspose3d),
}


@st.composite
def layouts(draw, heights=None):
    """Number of spatial dims, the sharded one, the sizes of all, and a partition."""
    spatial = draw(st.sampled_from([1, 2, 2, 2, 3]))
    at = draw(st.integers(0, spatial - 1))
    partition = draw(partitions(heights))
    sizes = [draw(st.integers(3, 6)) for _ in range(spatial)]
    sizes[at] = partition.rows
    return spatial, at, sizes, partition


def each(draw, spatial, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(spatial))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=80)
@given(st.data(), layouts())
def test_convolution(data, layout):
    spatial, at, sizes, partition = layout
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel, dilation, stride = each(draw, spatial, 1, 5), each(draw, spatial, 1, 3), each(draw, spatial, 1, 4)
    padding = draw(st.sampled_from(["numbers", "numbers", "same", "valid"]))
    if padding == "same":
        stride = (1,) * spatial
    if padding == "numbers":
        padding = each(draw, spatial, 0, 6)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    module, wrapper = CONV[spatial]
    layer = module(2, 4, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode, dtype=torch.float64)
    whole = randn(*([] if draw(st.booleans()) else [2]), 2, *sizes)
    try:
        layer(whole)
    except RuntimeError:
        assume(False)  # torch takes no such layer
    dim = at - spatial
    shard_dim = dim if draw(st.booleans()) else at + 2
    check_layer(layer, lambda m: wrapper(m, shard_dim), whole, partition, dim, declare=draw(st.booleans()))


@settings(max_examples=80)
@given(st.data(), layouts())
def test_transposed_convolution(data, layout):
    spatial, at, sizes, partition = layout
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2]))
    kernel, dilation, stride = each(draw, spatial, 1, 5), each(draw, spatial, 1, 3), each(draw, spatial, 1, 4)
    padding, output_padding = each(draw, spatial, 0, 6), each(draw, spatial, 0, 3)
    module, wrapper = TRANSPOSED[spatial]
    layer = module(
        2, 4, kernel, stride, padding, output_padding, groups, draw(st.booleans()), dilation, dtype=torch.float64
    )
    whole = randn(*([] if draw(st.booleans()) else [2]), 2, *sizes)
    try:
        layer(whole)
    except RuntimeError:
        assume(False)
    dim = at - spatial
    check_layer(layer, lambda m: wrapper(m, dim), whole, partition, dim, declare=draw(st.booleans()))


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ownership_rules_undo_each_other(height, ranks):
    partition = RowPartition.even(height, ranks, 2)
    down = nn.Conv2d(2, 3, 4, 2, 1, dtype=torch.float64)
    whole = randn(1, 2, height, 6)
    half = partition.strided(2, height // 2)
    check_layer(down, DomainParallelConv2d, whole, partition, target=half)
    up = nn.ConvTranspose2d(2, 3, 2, 2, dtype=torch.float64)
    check_layer(up, DomainParallelConvTranspose2d, randn(1, 2, half.rows, 3), half, target=half.upsampled(2))
    assert half.upsampled(2, height) == partition


@pytest.mark.parametrize("size", [9, 10])
def test_output_size_is_global(size):
    partition = RowPartition((2, 1, 2))
    layer = nn.ConvTranspose2d(2, 3, 3, 2, 1, dtype=torch.float64)
    whole = randn(1, 2, 5, 4)

    class Sized(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, output_size=(size, 8))

    def convert(m):
        m.layer = DomainParallelConvTranspose2d(m.layer)
        return m

    check_layer(Sized(layer), convert, whole, partition)


def test_output_size_out_of_range():
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        layer = DomainParallelConvTranspose2d(nn.ConvTranspose2d(1, 1, 3, 2, 1), label="up1")
        with pytest.raises(ValueError, match="up1: output_size asks for 11 rows; .* it can be 9 to 10"):
            layer(torch.ones(1, 1, 3 - rank, 4), output_size=(11, 8))
        for columns in (6, 9):
            with pytest.raises(ValueError, match=rf"up1: .* \(9, {columns}\) is not within .*, 7\] and .*, 8\]"):
                layer(torch.ones(1, 1, 3 - rank, 4), output_size=(9, columns))
        with pytest.raises(ValueError, match=r"up1: output_size must have 2 sizes; got \(9,\)"):
            layer(torch.ones(1, 1, 3 - rank, 4), output_size=(9,))

    run_threads(rank_main, 2)


class PeriodicConv2d(nn.Module):
    """What models of the field have: reflection at the poles, circular longitude."""

    def __init__(self, channels, out, kernel, stride=1, dilation=1):
        super().__init__()
        self.padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(channels, out, kernel, stride, dilation=dilation, dtype=torch.float64)

    def forward(self, x):
        p = self.padding
        x = nn.functional.pad(x, (p, p, 0, 0), mode="circular")
        return self.conv(nn.functional.pad(x, (0, 0, p, p), mode="reflect"))


@settings(max_examples=30)
@given(st.data(), partitions(st.integers(8, 20)), st.sampled_from([-2, -1]))
def test_periodic_convolution(data, partition, dim):
    draw = data.draw
    layer = PeriodicConv2d(2, 3, draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    whole = randn(2, 2, partition.rows, 9) if dim == -2 else randn(2, 2, 9, partition.rows)
    check_layer(layer, lambda m: DomainParallelPeriodicConv2d(m, dim), whole, partition, dim)


def test_it_answers_for_the_module_that_it_wraps():
    conv = nn.Conv2d(2, 3, (5, 3), (2, 1), (1, 1))
    layer = DomainParallelConv2d(conv)
    assert layer.conv is conv
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert layer.kernel_size == (5, 3)
    assert [id(p) for p in layer.parameters()] == [id(p) for p in conv.parameters()]
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.halo_width == 2
    assert isinstance(layer.halo_exchange, HaloExchange)
    assert layer.halo_exchange.halo_width == (1, 2)
    assert DomainParallelConv2d(nn.Conv2d(1, 1, 1)).halo_exchange is None
    assert DomainParallelConv2d(nn.Conv2d(1, 1, 3, padding=1)).halo_width == 1
    assert DomainParallelConv2d(nn.Conv2d(1, 1, 2, 2)).halo_width == 0
    assert DomainParallelConvTranspose2d(nn.ConvTranspose2d(1, 1, 2, 2)).halo_width == 0
    assert DomainParallelConvTranspose2d(nn.ConvTranspose2d(1, 1, 4, 2, 1)).halo_width == 1
    assert DomainParallelConv3d(nn.Conv3d(1, 1, 3, padding=1)).shard_dim == 3
    periodic = DomainParallelPeriodicConv2d(PeriodicConv2d(2, 3, 3))
    assert list(periodic.state_dict()) == ["conv.weight", "conv.bias"]
    assert periodic.halo_width == periodic.padding == 1
    assert periodic.weight is periodic.conv.weight
    assert "kernel_size=(5, 3)" in repr(layer)


def test_conversion_keeps_what_was_set_on_the_module():
    conv = nn.Conv2d(2, 3, 3, padding=1).eval()
    conv.weight.requires_grad_(False)
    conv.register_buffer("extra", torch.ones(1), persistent=False)
    seen = []
    conv.register_forward_hook(lambda module, args, out: seen.append(module))
    layer = DomainParallelConv2d(conv)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.ones(1, 2, 4, 4)
    assert torch.equal(layer(x), conv.forward(x))
    assert seen == [layer]
    layer.train()
    assert conv.training
    layer.double()
    assert conv.weight.dtype == torch.float64
    copied = copy.deepcopy(layer)
    assert copied.weight is copied.conv.weight
    assert copied.weight is not layer.weight
    layer.load_state_dict({"weight": torch.zeros(3, 2, 3, 3), "bias": torch.ones(3)})
    assert conv.bias.sum() == 3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="DomainParallelConv2d wraps torch.nn.Conv2d; got Conv3d"):
        DomainParallelConv2d(nn.Conv3d(1, 1, 1))
    with pytest.raises(ValueError, match="shard_dim=1 is no spatial dim of Conv2d: expected one of -2, -1, or of 2, 3"):
        DomainParallelConv2d(nn.Conv2d(1, 1, 1), 1)
    with pytest.raises(ValueError, match="LazyConv2d has no parameters yet"):
        DomainParallelConv2d(nn.LazyConv2d(1, 1))
    with pytest.raises(ValueError, match="without padding as .conv"):
        DomainParallelPeriodicConv2d(nn.Sequential())

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        layer = DomainParallelConv2d(nn.Conv2d(1, 1, 9, padding=1), label="encoder.conv1")
        with pytest.raises(ValueError, match="encoder.conv1: the kernel spans 9 rows, and 6 rows with padding 1 and 1"):
            layer(torch.ones(1, 1, 2, 9))
        layer = DomainParallelConv2d(nn.Conv2d(1, 1, 3, padding=1), label="encoder.conv2")
        with pytest.raises(ValueError, match="rank 0, 1: .* rank 2: .*float64"):
            layer(torch.ones(1, 1, 2, 9, dtype=torch.float64 if rank == 2 else torch.float32))

    run_threads(rank_main, 3)


def test_explicit_partition():
    partition = RowPartition((3, 1, 2))
    whole, weight = randn(1, 2, 6, 4), randn(2, 2, 3, 3)
    expected = torch.nn.functional.conv2d(whole, weight, padding=1)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        own = slice(partition.offsets[rank], partition.offsets[rank + 1])
        out = DF.conv2d(whole[:, :, own], weight, padding=1, partition=partition)
        torch.testing.assert_close(out, expected[:, :, own])
        with pytest.raises(ValueError, match="on rank 1 the tensor .* has 1 rows along dim -2; partition=.* says 2"):
            DF.conv2d(whole[:, :, own], weight, partition=RowPartition((3, 2, 2)), label="wrong")

    run_threads(rank_main, 3)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("sizes", [(4, 0, 3), (0, 7), (3, 4, 0)])
@pytest.mark.parametrize("batch", [True, False])
def test_ranks_without_rows_pad_columns_too(mode, sizes, batch):
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode).double()
    whole = randn(*([2] if batch else []), 2, 7, 4)
    check_layer(conv, DomainParallelConv2d, whole, RowPartition(sizes, allow_empty=True), declare=False)
