"""The worked blocks on sharded rows are the blocks of one GPU, written out here once more."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from domain_reference import check_layer, partitions, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from credit_domain import blocks
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel


@st.composite
def shards(draw, most=24):
    """A partition, of which some ranks may hold no rows."""
    partition = draw(partitions(st.integers(1, most)))
    if partition.ranks < 6 and draw(st.integers(0, 3)) == 0:
        sizes = list(partition.sizes)
        sizes.insert(draw(st.integers(0, len(sizes))), 0)
        partition = RowPartition(tuple(sizes), allow_empty=True)
    return partition


def whole_grid(draw, partition, channels):
    """A grid with these rows along any of one to three spatial dims: (the dim, the tensor)."""
    nd = draw(st.sampled_from([1, 2, 2, 3]))
    at = draw(st.integers(0, nd - 1))
    sizes = [draw(st.integers(1, 7 if nd < 3 else 4)) for _ in range(nd)]
    sizes[at] = partition.rows
    return at - nd, randn(2, channels, *sizes)


def check(reference, make, whole, partition, dim, draw, **kwargs):
    """``make`` builds the block; it loads the state_dict of the reference as it is."""

    def convert(module):
        block = make().double()
        block.load_state_dict(module.state_dict())
        return block

    declare = 0 not in partition.sizes and draw(st.booleans())
    check_layer(reference.double(), convert, whole, partition, dim, declare=declare, **kwargs)


# Windows


class PlainWindowAttention(nn.Module):
    """Swin's, token by token: which window each token of the padded and rolled grid is in, and what it sees there."""

    def __init__(self, channels, window, heads, shift, cyclic, dilated):
        super().__init__()
        self.window, self.heads, self.shift, self.cyclic, self.dilated = window, heads, shift, cyclic, dilated
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        offsets = 1
        for w in window:
            offsets *= 2 * w - 1
        self.relative_position_bias_table = nn.Parameter(randn(offsets, heads, seed=5))
        places = list(product(*map(range, window)))
        index = torch.zeros(len(places), len(places), dtype=torch.int64)
        for i, a in enumerate(places):
            for j, b in enumerate(places):
                for p, q, w in zip(a, b, window, strict=True):
                    index[i, j] = index[i, j] * (2 * w - 1) + p - q + w - 1
        self.register_buffer("relative_position_index", index)

    def forward(self, x):
        nd = x.ndim - 2
        C = x.shape[1]
        padded = [-(-size // w) * w for size, w in zip(x.shape[2:], self.window, strict=True)]
        # Regions of the padded grid: tokens see only their own. Padding is one, rows that wrap around are another.
        region = torch.zeros(padded)
        for d, size in enumerate(x.shape[2:]):
            region.narrow(d, size, padded[d] - size).fill_(-1e9)
        for d, s in enumerate(self.shift):
            if s and not self.cyclic[d]:
                region.narrow(d, 0, min(s, padded[d])).add_(10.0**d)
        amounts = [n for d in reversed(range(nd)) for n in (0, padded[d] - x.shape[2 + d])]
        x = F.pad(x, amounts).roll([-s for s in self.shift], list(range(2, 2 + nd)))
        region = region.roll([-s for s in self.shift], list(range(nd))).clamp_min(-1e8)
        counts = [p // w for p, w in zip(padded, self.window, strict=True)]
        out = torch.zeros_like(x)
        for number in product(*map(range, counts)):
            place = [
                torch.arange(w) * n + k if self.dilated else torch.arange(w) + k * w
                for k, n, w in zip(number, counts, self.window, strict=True)
            ]
            at = torch.meshgrid(*place, indexing="ij")
            tokens = x[(slice(None), slice(None), *at)].flatten(2).mT  # (B, N, C)
            seen = region[at].flatten()
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(tokens).chunk(3, -1))
            scores = q @ k.mT * (C // self.heads) ** -0.5
            scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
            scores = scores.masked_fill(seen[:, None] != seen[None], float("-inf"))
            done = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            out[(slice(None), slice(None), *at)] = done.mT.unflatten(-1, at[0].shape)
        out = out.roll(self.shift, list(range(2, 2 + nd)))
        for d in range(nd):
            out = out.narrow(2 + d, 0, x.shape[2 + d] - amounts[2 * (nd - 1 - d) + 1])
        return out


@settings(max_examples=40)
@given(st.data(), shards())
def test_window_attention(data, partition):
    draw = data.draw
    dim, whole = whole_grid(draw, partition, 4)
    nd = whole.ndim - 2
    window = tuple(draw(st.integers(1, 4 if nd < 3 else 3)) for _ in range(nd))
    dilated = draw(st.sampled_from([False, False, True]))
    shift = (0,) * nd if dilated else tuple(draw(st.integers(0, w - 1)) for w in window)
    cyclic = draw(st.none() | st.tuples(*[st.booleans()] * nd))
    rolls = (False,) * (nd - 1) + (True,) if cyclic is None else cyclic
    reference = PlainWindowAttention(4, window, 2, shift, rolls, dilated)

    def make():
        return blocks.WindowAttention(4, window, 2, shift, cyclic=cyclic, dilated=dilated, dim=dim)

    check(reference, make, whole, partition, dim, draw, target=partition)


def test_aligned_windows_do_not_move():
    partition = RowPartition((4, 8, 2))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = randn(1, 3, partition.sizes[rank], 6, seed=rank)
        tokens, layout = blocks.split_windows(x, (4, 3), partition=partition)
        assert tokens.shape == (1, 2 * (1, 2, 1)[rank], 12, 3)
        assert (layout.inside is None) == (rank < 2)  # the last window alone is padded
        assert not layout.cuts[0].join.local
        whole = RowPartition((4, 8, 4))
        x = randn(1, 3, whole.sizes[rank], 6, seed=rank)
        tokens, layout = blocks.split_windows(x, (4, 3), partition=whole)
        assert layout.inside is None
        assert all(step.local for cut in layout.cuts for step in (cut.split, cut.join))
        assert torch.equal(blocks.join_windows(tokens, layout), x)

    run_threads(rank_main, 3)


# All tokens


class Mixed(nn.Module):
    """Attention over the tokens of a grid with a mask or a bias; torch's own, as it is."""

    def __init__(self, tokens, masked, ring=False, chunk=1024):
        super().__init__()
        self.masked, self.ring, self.chunk = masked, ring, chunk
        if masked == "boolean":
            self.register_buffer("allowed", randn(tokens, tokens, seed=6) > 0)
            self.allowed[tokens // 2] = False  # a query that sees nothing
        if masked == "full":
            self.table = nn.Parameter(randn(1, 2, tokens, tokens, seed=3))
        if masked in ("keys", "full"):
            self.weight = nn.Parameter(randn(tokens, seed=4))

    def forward(self, x):
        query, key, value = x.flatten(2).unflatten(1, (2, 8)).mT.split((3, 3, 2), -1)
        return self.attend(query, key, value).mT.flatten(1, 2).unflatten(-1, x.shape[2:])

    def mask(self, rows):
        if self.masked == "boolean":
            return rows(self.allowed)
        if self.masked == "full":
            return rows(self.table) + self.weight.sin()
        return self.weight[None] if self.masked == "keys" else None

    def attend(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, self.mask(lambda table: table))


class ShardedMixed(Mixed):
    def attend(self, query, key, value):
        mask = self.mask(lambda table: blocks.local_rows(table, query))
        return blocks.attention(query, key, value, mask, ring=self.ring, chunk=self.chunk)


MASKS = ("none", "boolean", "keys", "full")


@settings(max_examples=60)
@given(st.data(), shards(12), st.sampled_from(MASKS), st.booleans(), st.sampled_from([1, 3, 99]))
def test_attention(data, partition, masked, ring, chunk):
    width = data.draw(st.integers(1, 3))
    tokens = partition.rows * width
    whole = randn(2, 16, partition.rows, width)
    check(Mixed(tokens, masked), lambda: ShardedMixed(tokens, masked, ring, chunk), whole, partition, -2, data.draw)


def test_large_scores_overflow_nowhere():
    """The maximum lies on one rank, and scores there are beyond what an exponential can hold."""
    x = randn(1, 16, 6, 2)
    x[:, :, 3] *= 100
    expected, linear = Mixed(12, "none")(x), PlainLinear(16).double()

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        own = x[:, :, 2 * rank : 2 * rank + 2]
        for ring in (False, True):
            out = ShardedMixed(12, "none", ring, 3)(own)
            torch.testing.assert_close(out, expected[:, :, 2 * rank : 2 * rank + 2])
        block = blocks.LinearAttention(16, 2, 3).double()
        block.load_state_dict(linear.state_dict())
        torch.testing.assert_close(block(own * 30), linear(x * 30)[:, :, 2 * rank : 2 * rank + 2])

    run_threads(rank_main, 3)


class Plain(nn.Module):
    """Attention as diffusion UNets write it: channels first, tokens last."""

    def __init__(self, channels, spatial=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
        self.to_qkv, self.to_out = conv(channels, 18, 1, bias=False), conv(6, channels, 1)

    def forward(self, x):
        q, k, v = (t.flatten(2).unflatten(1, (2, 3)) for t in self.to_qkv(x).chunk(3, 1))  # b h c n
        return self.to_out(self.attend(q, k, v).flatten(1, 2).unflatten(-1, x.shape[2:]))


class PlainFull(Plain):
    def attend(self, q, k, v):
        weights = torch.einsum("bhdi,bhdj->bhij", q * 3**-0.5, k).softmax(-1)
        return torch.einsum("bhij,bhdj->bhdi", weights, v)


class PlainLinear(Plain):
    def attend(self, q, k, v):
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
        return torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2) * 3**-0.5)


@settings(max_examples=40)
@given(st.data(), shards(), st.sampled_from(["gathered", "ring", "linear"]))
def test_attention_blocks(data, partition, kind):
    dim, whole = whole_grid(data.draw, partition, 4)
    spatial = whole.ndim - 2
    if kind == "linear":
        make = lambda: blocks.LinearAttention(4, 2, 3, spatial=spatial, dim=dim)  # noqa: E731
        check(PlainLinear(4, spatial), make, whole, partition, dim, data.draw, target=partition)
    else:
        make = lambda: blocks.FullAttention(4, 2, 3, spatial=spatial, ring=kind == "ring", dim=dim)  # noqa: E731
        check(PlainFull(4, spatial), make, whole, partition, dim, data.draw, target=partition)


def test_the_ring_keeps_only_what_this_rank_has():
    """Until backward, that is; the gathered keys are kept whole."""

    def rank_main(rank):
        initialize_domain_parallel(4, 4)
        tokens = randn(1, 8, 3, seed=rank).requires_grad_()
        kept = []
        for ring in (True, False):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x), lambda x: x):
                blocks.attention(tokens, tokens, tokens, ring=ring)
            kept.append(max(x.shape[-2] for x in saved if x.numel()))
        assert kept == [8, 32]

    run_threads(rank_main, 4)


def test_cross_attention_takes_queries_under_another_partition():
    query, key, value = randn(2, 5, 3), randn(2, 7, 3, seed=1), randn(2, 7, 4, seed=2)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    mine, theirs = RowPartition((1, 0, 4), allow_empty=True), RowPartition((2, 5, 0), allow_empty=True)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        own, keys = (slice(p.offsets[rank], p.offsets[rank + 1]) for p in (mine, theirs))
        for ring in (False, True):
            out = blocks.attention(query[:, own], key[:, keys], value[:, keys], scale=0.3, ring=ring, partition=theirs)
            torch.testing.assert_close(out, expected[:, own])

    run_threads(rank_main, 3)


# Means of the whole grid, and tables of it


class PlainSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return x * self.fc2(self.fc1(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class PlainScSE(nn.Module):
    def __init__(self):
        super().__init__()
        squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()]
        self.cSE, self.sSE = nn.Sequential(*squeeze), nn.Sequential(nn.Conv2d(4, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


@settings(max_examples=30)
@given(st.data(), shards(), st.sampled_from([-2, -1]), st.booleans())
def test_squeeze_excitation(data, partition, dim, both):
    whole = randn(2, 4, partition.rows, 3) if dim == -2 else randn(2, 4, 3, partition.rows)
    if both:
        check(PlainScSE(), lambda: blocks.ScSE(4, 2, dim), whole, partition, dim, data.draw, target=partition)
    else:
        make = lambda: blocks.SqueezeExcitation(4, 2, dim)  # noqa: E731
        check(PlainSE(), make, whole, partition, dim, data.draw, target=partition)


@given(st.data(), shards())
def test_global_mean(data, partition):
    dim, whole = whole_grid(data.draw, partition, 3)
    expected = whole.flatten(2).mean(-1)

    def rank_main(rank):
        initialize_domain_parallel(partition.ranks, partition.ranks)
        own = partition.interval(rank)
        mean = blocks.GlobalMean(dim)(whole.narrow(dim, own.start, len(own)))
        torch.testing.assert_close(mean.flatten(1), expected)

    run_threads(rank_main, partition.ranks)


class PlainTable(nn.Module):
    def __init__(self, channels, grid):
        super().__init__()
        self.table = nn.Parameter(randn(1, channels, *grid, seed=8))

    def forward(self, x):
        return x + self.table


@settings(max_examples=30)
@given(st.data(), shards())
def test_position_table(data, partition):
    dim, whole = whole_grid(data.draw, partition, 3)
    grid = tuple(whole.shape[2:])
    make = lambda: blocks.PositionTable(3, grid, dim)  # noqa: E731
    check(PlainTable(3, grid), make, whole, partition, dim, data.draw, target=partition)


# How they are used


class Net(nn.Module):
    """Every block once."""

    def __init__(self):
        super().__init__()
        self.position = blocks.PositionTable(4, (11, 6))
        self.shifted = blocks.WindowAttention(4, (3, 2), 2, (1, 1))
        self.dilated = blocks.WindowAttention(4, (3, 2), 2, dilated=True)
        self.gathered = blocks.FullAttention(4, 2, 2)
        self.ring = blocks.FullAttention(4, 2, 2, ring=True)
        self.linear = blocks.LinearAttention(4, 2, 2)
        self.excited = nn.Sequential(blocks.SqueezeExcitation(4, 2), blocks.ScSE(4, 2))

    def forward(self, x):
        x = self.position(x)
        for block in (self.shifted, self.dilated, self.gathered, self.ring, self.linear, self.excited):
            x = x + block(x)
        return x


def net_and_input(partition, rank):
    net, x = Net().double(), randn(2, 4, partition.rows, 6)
    for i, parameter in enumerate(net.parameters()):  # ranks that are threads share torch's generator
        parameter.data = randn(*parameter.shape, seed=i) * 0.3
    return net, x[:, :, partition.offsets[rank] : partition.offsets[rank + 1]].clone().requires_grad_()


def gradients(net, x, run):
    out = run(x)
    got = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *net.parameters()])
    return [out.detach(), *got]


def compiled(rank):
    manager = initialize_domain_parallel(3, 3)
    partition = manager.declare(RowPartition((5, 4, 2)))
    net, x = net_and_input(partition, rank)
    run = torch.compile(net, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(gradients(net, x, run), gradients(net, x, net), strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiled_equals_eager():
    run_processes(compiled, 3, timeout=900)


def test_compiled_on_one_rank_at_two_sizes():
    """The second one, whose sizes torch.compile takes for symbols."""
    net = torch.compile(blocks.WindowAttention(4, (2, 3), 2, (1, 1)), backend="aot_eager", fullgraph=True)
    for rows in (6, 9):
        x = torch.randn(1, 4, rows, 2 * rows)
        assert torch.allclose(net(x), net._orig_mod(x))


def test_checkpointed_and_copied():
    partition = RowPartition((5, 4, 2))

    def rank_main(rank):
        initialize_domain_parallel(3, 3).declare(partition)
        net, x = net_and_input(partition, rank)
        twin = copy.deepcopy(net)
        assert twin.shifted.sharding["layer"] != net.shifted.sharding["layer"]
        expected = gradients(net, x, net)
        for again, once in zip(
            gradients(twin, x, lambda x: checkpoint(twin, x, use_reentrant=False)), expected, strict=True
        ):
            torch.testing.assert_close(again, once, rtol=0, atol=0)

    run_threads(rank_main, 3)


def test_bfloat16_autocast_is_close_to_one_rank():
    partition = RowPartition((5, 4, 2))

    def rank_main(rank, whole=False):
        if not whole:
            initialize_domain_parallel(3, 3)
        net, x = net_and_input(RowPartition((11,)) if whole else partition, rank)
        net, x = net.float(), x.detach().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(net, x, net)

    alone = rank_main(0, whole=True)
    ranks = run_threads(rank_main, 3)
    for i, expected in enumerate(alone):
        parts = [result[i] for result in ranks]
        got = torch.cat(parts, 2) if i < 2 else sum(parts)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_mistakes_are_named():
    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = torch.ones(1, 2, 1 + rank, 4)
        with pytest.raises(ValueError, match="encoder: expected a window and a smaller shift for each of 2 spatial"):
            blocks.split_windows(x, (2, 2), (2, 0), label="encoder")
        with pytest.raises(ValueError, match="got window=\\(2,\\), shift=0, cyclic=None, dilated=False"):
            blocks.split_windows(x, (2,))
        with pytest.raises(ValueError, match="no shift where dilated"):
            blocks.split_windows(x, 2, 1, dilated=True)
        with pytest.raises(ValueError, match="the sharded dim must be one of the last 2"):
            blocks.split_windows(x, 2, dim=1)
        with pytest.raises(ValueError, match="3 heads do not divide 4 channels"):
            blocks.WindowAttention(4, (2, 2), 3)
        tokens = x.flatten(2).mT
        for wrong, shape in ((torch.ones(4, 4), "4, 4"), (torch.ones(24, 24), "24, 24")):
            with pytest.raises(
                ValueError, match=f"block: on rank 0 attn_mask has the shape \\({shape}\\); .* 24 keys of all"
            ):
                blocks.attention(tokens, tokens, tokens, wrong, label="block")
        with pytest.raises(ValueError, match="rank 0: attention without mask, with gradient; rank 1, 2: .* without"):
            blocks.attention(tokens.requires_grad_(rank == 0), tokens, tokens, ring=True)
        with pytest.raises(ValueError, match="pos: the table of shape .* has 5 rows along dim -2; expected .* 6"):
            blocks.local_rows(torch.ones(2, 5, 4), x, label="pos")
        with pytest.raises(ValueError, match="ScSE: the ranks disagree"):
            blocks.ScSE(2, 1)(x if rank else x.double())

    run_threads(rank_main, 3)
