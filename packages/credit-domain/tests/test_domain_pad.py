"""Padding, cross-embedding branches and pixel shuffling on sharded rows are torch's of the whole."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from domain_reference import check_layer, partitions, randn, shard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from credit_domain.ops.conv.conv_layers import DomainParallelConv2d
from credit_domain.ops.padding.padding import pad
from credit_domain.ops.padding.padding_layers import DomainParallelCrossEmbedBranch, DomainParallelPad
from credit_domain.ops.pixel import (
    DomainParallelPixelShuffle,
    DomainParallelPixelUnshuffle,
    pixel_shuffle,
    pixel_unshuffle,
)
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PADS = {
    kind: tuple(getattr(nn, f"{kind}Pad{nd}d") for nd in (1, 2, 3))
    for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
}


@st.composite
def layouts(draw):
    """Number of spatial dims, the sharded one, the sizes of all, and a partition."""
    spatial = draw(st.sampled_from([1, 2, 2, 2, 3]))
    at = draw(st.integers(0, spatial - 1))
    partition = draw(partitions())
    sizes = [draw(st.integers(1, 6)) for _ in range(spatial)]
    sizes[at] = partition.rows
    return spatial, at, sizes, partition


def pads(draw, kind, spatial, low=-4, high=6):
    amounts = tuple(draw(st.integers(low, high)) for _ in range(2 * spatial))
    if draw(st.integers(0, 3)) == 0:
        amounts = amounts[0]
    if kind == "Constant":
        return PADS[kind][spatial - 1](amounts, draw(st.sampled_from([0.0, 1.5, -3])))
    return PADS[kind][spatial - 1](amounts)


def takes(layer, whole):
    """Whether torch takes this, and something comes out that is not read from memory that nobody wrote."""
    try:
        out = layer(whole)
    except (RuntimeError, ValueError):
        return False
    if isinstance(layer, PADS["Circular"]):
        for n, a, b in zip(whole.shape[::-1], layer.padding[::2], layer.padding[1::2], strict=False):
            if max(a, b) > n + min(a, 0) + min(b, 0):
                return False
    return out.numel() > 0


@settings(max_examples=100)
@given(st.data(), layouts(), st.sampled_from(list(PADS)))
def test_padding(data, layout, kind):
    spatial, at, sizes, partition = layout
    draw = data.draw
    layer = pads(draw, kind, spatial)
    whole = randn(*([] if draw(st.booleans()) else [2]), 2, *sizes)
    assume(takes(layer, whole))
    dim = at - spatial
    shard_dim = dim if draw(st.booleans()) else at + 2
    check_layer(layer, lambda m: DomainParallelPad(m, shard_dim), whole, partition, dim, declare=draw(st.booleans()))


@settings(max_examples=60)
@given(st.data(), partitions(), st.sampled_from(list(PADS)), st.sampled_from([-2, -1]))
def test_padding_and_a_valid_convolution(data, partition, kind, dim):
    draw = data.draw
    pad = pads(draw, kind, 2, 0)
    conv = nn.Conv2d(2, 3, draw(st.integers(1, 4)), draw(st.integers(1, 3)), dtype=torch.float64)
    whole = randn(1, 2, partition.rows, 5) if dim == -2 else randn(1, 2, 5, partition.rows)
    assume(takes(pad, whole) and min(pad(whole).shape[2:]) >= conv.kernel_size[0])

    def convert(m):
        return nn.Sequential(DomainParallelPad(m[0], dim), DomainParallelConv2d(m[1], dim))

    before, after = pad.padding[:2] if dim == -1 else pad.padding[2:]
    same = conv.stride[0] == 1 and before + after == conv.kernel_size[0] - 1
    target = partition if same else None
    check_layer(nn.Sequential(pad, conv), convert, whole, partition, dim, target=target)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_of_ranks_without_rows(mode):
    """And where only another dim is padded."""
    partition = RowPartition((0, 5, 0, 1), allow_empty=True)
    whole = randn(2, 3, 6, 4)
    for amounts in [(1, 2, 2, 1), (1, 2, 0, 0), (0, 0, -1, 2), (0, 0, -4, -1)]:

        class Pad(nn.Module):
            def forward(self, x, amounts=amounts):
                return F.pad(x, amounts, mode)

        class Sharded(nn.Module):
            def forward(self, x, amounts=amounts):
                return pad(x, amounts, mode, partition=partition)

        check_layer(Pad(), lambda m: Sharded(), whole, partition, declare=False)


def test_padding_of_other_tensors():
    """Integers, channels_last, many dims, and a constant that no zero could stand for."""
    partition = RowPartition((3, 1, 2))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)

        def check(whole, amounts, dim, *args):
            out = pad(shard(whole, partition, rank, dim), amounts, *args, dim=dim)
            wanted = F.pad(whole, amounts, *args)
            own = partition.strided(1, wanted.shape[dim])
            assert torch.equal(out, shard(wanted, own, rank, dim))
            return out

        check(torch.arange(12).reshape(6, 2), (0, 0, 2, 3), 0, "constant", 7)
        check(torch.arange(12).reshape(6, 2), (1, 1), -2)
        check(randn(6, 1, 2, 3), (1, 0, 0, 0, 0, 1, 2, -3), 0, "constant", float("-inf"))
        check(randn(6) > 0, (1, 1), -1, "constant", True)
        last = check(randn(2, 3, 6, 4).contiguous(memory_format=torch.channels_last), (1, 1, 1, 1), -2, "reflect")
        assert last.is_contiguous(memory_format=torch.channels_last)
        check(randn(2, 6, 4), (1, 1), 1, "circular")

    run_threads(rank_main, 3)


@pytest.mark.parametrize(
    ("amounts", "mode", "message"),
    [
        ((0, 0, 6, 0), "reflect", "p1: .*[Pp]adding size should be less than the corresponding input dimension"),
        ((0, 0, 7, 0), "circular", "p1: .*wrapping around more than once"),
        ((0, 0, 4, -3), "circular", "p1: circular padding by 4 rows would wrap around 3 rows more than once"),
        ((0, 0, -3, -3), "constant", "p1: padding 6 rows by -3 and -3 leaves 0 rows"),
        ((0, 0, -8, 3), "constant", "p1: .*must be non-negative"),
        ((0, 0, 1, 1), "mirror", "p1: .*mirror"),
        ((0, 0, 1), "constant", "p1: pad must list pairs .*; got 3 numbers"),
        ((1, 1, 1, 1, 0, 0, 0, 0), "replicate", "p1: .*[Pp]adding"),
    ],
)
def test_paddings_that_torch_refuses(amounts, mode, message):
    """On all ranks alike, also where a rank's own rows would do."""
    partition = RowPartition((4, 1, 1))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        with pytest.raises(ValueError, match=message):
            pad(shard(randn(1, 1, 6, 3), partition, rank), amounts, mode, label="p1")

    run_threads(rank_main, 3)


def test_padding_layers_answer_for_what_they_wrap():
    layer = DomainParallelPad(nn.CircularPad2d((1, 2, 3, 4)), label="pole")
    assert layer.padding == (1, 2, 3, 4)
    assert layer.label == "pole"
    x = torch.ones(1, 1, 5, 5)
    assert torch.equal(layer(x), layer.wrapped(x))
    with pytest.raises(ValueError, match="DomainParallelPad wraps .*torch.nn.CircularPad3d; got Conv2d"):
        DomainParallelPad(nn.Conv2d(1, 1, 1))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))


# Cross-embedding branches


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=80)
@given(st.data(), partitions(), st.sampled_from([-2, -1, 2, 3]))
def test_cross_embedding_branch(data, partition, dim):
    draw = data.draw
    around = tuple(draw(st.integers(0, 5)) for _ in range(4))
    kernel, stride, dilation, padding = (
        tuple(draw(st.integers(low, high)) for _ in range(2)) for low, high in [(1, 6), (1, 4), (1, 2), (0, 2)]
    )
    if draw(st.integers(0, 3)) == 0:
        stride, padding = (1, 1), draw(st.sampled_from(["same", "valid"]))
    conv = nn.Conv2d(2, 2, kernel, stride, padding, dilation, draw(st.sampled_from([1, 2])), dtype=torch.float64)
    branch = nn.Sequential(nn.ZeroPad2d(around), conv)
    rows = dim in (-2, 2)
    whole = randn(*([] if draw(st.booleans()) else [2]), 2, *((partition.rows, 5) if rows else (5, partition.rows)))
    try:
        branch(whole)
    except RuntimeError:
        assume(False)
    check_layer(
        branch,
        lambda m: DomainParallelCrossEmbedBranch(m, dim),
        whole,
        partition,
        -2 if rows else -1,
        declare=draw(st.booleans()),
    )


def test_cross_embedding_branch_keeps_the_partition_of_its_stride():
    """Which padding and convolution one after the other would not: boundaries would move by the padding."""
    partition = RowPartition((8, 4, 8))
    for kernel in (4, 8, 16):
        before = (kernel - 2) // 2
        branch = nn.Sequential(
            nn.ZeroPad2d((before, kernel - 2 - before, before, kernel - 2 - before)), nn.Conv2d(1, 2, kernel, 2)
        ).double()
        check_layer(branch, DomainParallelCrossEmbedBranch, randn(1, 1, 20, 12), partition, target=partition.strided(2))


def test_cross_embedding_branch_answers_for_the_module_that_it_wraps():
    branch = nn.Sequential(nn.ZeroPad2d((1, 1, 3, 1)), nn.Conv2d(2, 3, 5, 2))
    branch[1] = nn.utils.parametrizations.weight_norm(branch[1])
    layer = DomainParallelCrossEmbedBranch(branch)
    assert list(layer.state_dict()) == list(branch.state_dict())
    assert {id(p) for p in layer.parameters()} == {id(p) for p in branch.parameters()}
    assert layer.halo_width == 3
    assert layer.halo_exchange.halo_width == (3, 0)
    x = randn(1, 2, 9, 9, dtype=torch.float32)
    torch.testing.assert_close(layer(x), branch(x))
    assert not isinstance(branch[1], DomainParallelConv2d)
    assert layer.eval().conv.training is False
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(copied(x), branch(x))


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 1, 1)),
            r"wraps .*Sequential\(ZeroPad2d, Conv2d\); got Sequential\(Conv2d\)",
        ),
        (nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(1, 1, 1)), r"got Sequential\(ReflectionPad2d, Conv2d\)"),
        (nn.Sequential(nn.ZeroPad2d((0, 0, -1, 0)), nn.Conv2d(1, 1, 1)), "must not crop"),
        (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")), "'circular'"),
    ],
)
def test_branches_that_are_refused(branch, message):
    with pytest.raises(ValueError, match=message):
        DomainParallelCrossEmbedBranch(branch)


# Pixel shuffling


@settings(max_examples=60)
@given(st.data(), partitions(), st.integers(1, 4), st.sampled_from([-2, -1]))
def test_pixel_shuffle(data, partition, factor, dim):
    other = data.draw(st.integers(1, 3)) * factor
    lead = data.draw(st.sampled_from([(), (2,), (2, 2)]))
    sizes = (partition.rows, other) if dim == -2 else (other, partition.rows)
    shard_dim = data.draw(st.sampled_from([dim, dim + 4]))
    check_layer(
        nn.PixelShuffle(factor),
        lambda m: DomainParallelPixelShuffle(m, shard_dim),
        randn(*lead, 2 * factor**2, *sizes),
        partition,
        dim,
        target=partition.upsampled(factor),
    )
    layer, whole = nn.PixelUnshuffle(factor), randn(*lead, 2, *sizes)
    assume(partition.rows % factor == 0)
    check_layer(
        layer,
        lambda m: DomainParallelPixelUnshuffle(m, shard_dim),
        whole,
        partition,
        dim,
        target=partition.strided(factor),
        declare=data.draw(st.booleans()),
    )


def test_pixel_shuffling_functions():
    partition = RowPartition((3, 1, 2))
    whole = randn(4, 6, 6)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        own = shard(whole, partition, rank)
        up = pixel_shuffle(own, 2)
        assert torch.equal(up, shard(F.pixel_shuffle(whole, 2), partition.upsampled(2), rank))
        assert torch.equal(pixel_unshuffle(up, 2, partition=partition.upsampled(2)), own)
        down = pixel_unshuffle(own, 3)
        assert torch.equal(down, shard(F.pixel_unshuffle(whole, 3), partition.strided(3), rank))
        with pytest.raises(ValueError, match="shuffle1: 6 rows cannot be cut into blocks of 4"):
            pixel_unshuffle(own, 4, label="shuffle1")
        with pytest.raises(ValueError, match="downscale_factor must be at least 1; got 0"):
            pixel_unshuffle(own, 0)
        for function in (pixel_shuffle, pixel_unshuffle):
            with pytest.raises(ValueError, match="must be one of the last 2 of a tensor with 3 dims; got -3"):
                function(own, 2, dim=-3)

    run_threads(rank_main, 3)
