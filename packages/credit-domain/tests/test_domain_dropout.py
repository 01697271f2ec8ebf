"""Dropout on sharded rows: elements drop independently on each rank, channels as they would on one rank."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from domain_reference import randn, shard
from torch import nn
from torch.utils.checkpoint import checkpoint

import credit_domain.functional as DF
from credit_domain.layers import (
    DomainParallelAlphaDropout,
    DomainParallelDropout,
    DomainParallelDropout1d,
    DomainParallelDropout2d,
    DomainParallelDropout3d,
    DomainParallelFeatureAlphaDropout,
)
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((30, 10, 24))
WRAPPERS = {
    nn.Dropout: DomainParallelDropout,
    nn.Dropout1d: DomainParallelDropout1d,
    nn.Dropout2d: DomainParallelDropout2d,
    nn.Dropout3d: DomainParallelDropout3d,
    nn.AlphaDropout: DomainParallelAlphaDropout,
    nn.FeatureAlphaDropout: DomainParallelFeatureAlphaDropout,
}
# Threads as ranks share one random generator, so what depends on its state is tested on processes.


def elements(rank, p, equal_rows):
    """All ranks' generators in the same state."""
    initialize_domain_parallel(3, 3)
    rows = 40 if equal_rows else PARTITION.sizes[rank]
    layer = DomainParallelDropout(nn.Dropout(p))
    x = torch.rand(4, 8, rows, 40, dtype=torch.float64) + 1

    def draw(fn=layer):
        torch.manual_seed(7)
        return fn(x)

    out = draw()
    after = torch.get_rng_state()
    keep = (out != 0).double()
    torch.testing.assert_close(out, x * keep / (1 - p))
    assert torch.equal(draw(), out)
    again = layer(x)
    assert 0.2 * p < ((again != 0) != (out != 0)).double().mean() < 2 * p  # another mask the second time

    leaf = x.clone().requires_grad_()
    x = leaf
    (grad,) = torch.autograd.grad((draw() * 3).sum(), leaf)
    torch.testing.assert_close(grad, 3 * keep / (1 - p))

    # Recomputation under checkpointing draws the same mask, though the generator has moved on.
    for reentrant in (True, False):
        out = draw(partial(checkpoint, lambda y: layer(y.exp()), use_reentrant=reentrant))
        assert torch.equal((out != 0).double(), keep)
        torch.rand(5)
        leaf.grad = None
        out.sum().backward()
        torch.testing.assert_close(leaf.grad, leaf.detach().exp() * keep / (1 - p))

    # In place, and half precision.
    x = leaf.detach().clone()
    other = DomainParallelDropout(nn.Dropout(p, inplace=True))
    assert draw(other) is x
    torch.testing.assert_close(x, leaf.detach() * keep / (1 - p))
    x = leaf.detach().bfloat16()
    assert draw().dtype == torch.bfloat16
    return keep, after


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_drop_independently_on_each_rank(p):
    masks, states = zip(*run_processes(elements, 3, p, True), strict=True)
    assert all(torch.equal(states[0], state) for state in states)
    count = masks[0].numel()
    spread = 5 * (p * (1 - p) / count) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < spread
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        correlation = torch.corrcoef(torch.stack([masks[one].flatten(), masks[other].flatten()]))[0, 1]
        assert abs(correlation) < 5 / count**0.5


def test_generators_move_on_alike_whatever_the_rows():
    _, states = zip(*run_processes(elements, 3, 0.5, False), strict=True)
    assert all(torch.equal(states[0], state) for state in states)


CHANNELS = [
    (nn.Dropout1d, (6, 5, 64), -1),
    (nn.Dropout1d, (5, 64), -1),
    (nn.Dropout2d, (6, 5, 64, 3), -2),
    (nn.Dropout2d, (6, 5, 3, 64), -1),
    (nn.Dropout3d, (6, 5, 2, 64, 3), 3),
    (nn.Dropout3d, (5, 2, 64, 3), -2),
    (nn.FeatureAlphaDropout, (6, 5, 64, 3), -2),
]


def channels(rank):
    """Each rank's generator in another state: channels are those of the first."""
    initialize_domain_parallel(3, 3)
    for kind, shape, dim in CHANNELS:
        for inplace in (False, True):
            plain = kind(0.4, inplace=inplace)
            layer = WRAPPERS[kind](kind(0.4, inplace=inplace), dim)
            at = dim if dim < 0 else dim - 5
            whole = randn(*shape) + 5
            leaf = whole.clone().requires_grad_()
            torch.manual_seed(3)
            expected = plain(leaf * 1)
            expected.cos().sum().backward()
            torch.manual_seed(3 + rank)
            own = shard(whole, PARTITION, rank, at).clone().requires_grad_()
            before = torch.get_rng_state()
            out = layer(own * 1)
            out.cos().sum().backward()
            assert not torch.equal(torch.get_rng_state(), before)
            torch.testing.assert_close(out, shard(expected, PARTITION, rank, at))
            torch.testing.assert_close(own.grad, shard(leaf.grad, PARTITION, rank, at))
    # Without rows, and without a batch.
    assert DF.dropout2d(torch.ones(2, 3, rank, 4)).shape == (2, 3, rank, 4)
    assert DF.dropout2d(torch.ones(0, 3, rank, 4)).shape == (0, 3, rank, 4)
    assert DF.dropout(torch.ones(2, 3, 0, 4)).shape == (2, 3, 0, 4)


def test_channels_drop_as_on_one_rank():
    run_processes(channels, 3)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_alpha_dropout(p):
    """Values are torch's: what is kept and what is dropped map to the same two lines."""
    torch.manual_seed(0)
    x = torch.randn(8, 8, 40, 40, dtype=torch.float64)
    theirs = F.alpha_dropout(x, p, True)
    dropped = theirs.flatten().mode().values
    kept = theirs != dropped
    slope = ((theirs[kept][1] - theirs[kept][0]) / (x[kept][1] - x[kept][0])).item()
    shift = (theirs[kept][0] - slope * x[kept][0]).item()

    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        for inplace in (False, True):
            leaf = x.clone().requires_grad_()
            out = DomainParallelAlphaDropout(nn.AlphaDropout(p, inplace))(leaf * 1)
            keep = (out - dropped).abs() > 1e-12
            torch.testing.assert_close(out, torch.where(keep, x * slope + shift, dropped))
            assert abs(keep.double().mean() - (1 - p)) < 0.02
            out.sum().backward()
            torch.testing.assert_close(leaf.grad, keep.double() * slope)
            assert abs(out.mean()) < 0.02
            assert abs(out.var() - 1) < 0.02
        return keep

    one, other = run_threads(rank_main, 2)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_torch_does_without_drawing(kind):
    shape = {nn.Dropout1d: (2, 3, 4), nn.Dropout3d: (2, 3, 4, 5, 6)}.get(kind, (2, 3, 4, 5))

    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        x = torch.randn(shape)
        assert WRAPPERS[kind](kind(0.5)).eval()(x) is x
        assert torch.equal(WRAPPERS[kind](kind(0.0))(x), x)
        assert torch.equal(WRAPPERS[kind](kind(1.0))(x), kind(1.0)(x))
        layer = WRAPPERS[kind](kind(0.5))
        layer.wrapped.p = 1.5
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got 1.5"):
            layer(x)

    run_threads(rank_main, 2)


def test_alone_it_is_torchs_own():
    x = torch.ones(4, 5, 6, 7)
    for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout):
        torch.manual_seed(1)
        expected = kind(0.5)(x)
        torch.manual_seed(1)
        assert torch.equal(WRAPPERS[kind](kind(0.5))(x), expected)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="shard_dim=1 is no spatial dim of Dropout2d"):
        DomainParallelDropout2d(nn.Dropout2d(), 1)

    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        # torch takes three dims for (B, C, L), in which -2 are the channels.
        with pytest.raises(ValueError, match="drop: the sharded dim must be one of the last 1 of a tensor with 3 dims"):
            DomainParallelDropout2d(nn.Dropout2d(), label="drop")(torch.ones(2, 3, 4))
        with pytest.raises(ValueError, match=r"dropout1d: expected 2 or 3 dims; got a tensor of shape \(2, 3, 4, 5\)"):
            DF.dropout1d(torch.ones(2, 3, 4, 5))
        with pytest.raises(ValueError, match=r"broadcast: the ranks disagree .* \(2, 3\).* \(2, 4\)"):
            DF.dropout2d(torch.ones(2, 3 + rank, 4, 5))

    run_threads(rank_main, 2)


def compiled(rank, backend):
    initialize_domain_parallel(3, 3)
    net = nn.Sequential(
        DomainParallelDropout(nn.Dropout(0.5)),
        DomainParallelDropout(nn.Dropout(0.5)),
        DomainParallelDropout2d(nn.Dropout2d(0.4)),
    )
    run = torch.compile(net, fullgraph=True, backend=backend)
    x = torch.rand(4, 6, PARTITION.sizes[rank], 40, dtype=torch.float64) + 1
    x.requires_grad_()
    torch.manual_seed(rank)
    out = run(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    scale = 1 / (0.5 * 0.5 * 0.6)
    torch.testing.assert_close(grad, (out != 0).double() * scale)
    torch.testing.assert_close(out, x * (out != 0) * scale)
    alive = (out != 0).any(3).any(2)
    rate = (out != 0)[alive].double().mean()
    assert 0.2 < rate < 0.3  # two masks, not the same one twice
    with torch.no_grad():
        assert not torch.equal(run(x) != 0, out != 0)
    state = torch.get_rng_state()
    first = run(x)
    torch.set_rng_state(state)
    assert torch.equal(run(x), first)
    torch.set_rng_state(state)
    recomputed = checkpoint(run, x, use_reentrant=False)
    assert torch.equal(recomputed, first)
    # A checkpoint within compiled code; torch takes no collectives there.
    inside = torch.compile(lambda x: checkpoint(net[:2], x.exp(), use_reentrant=False), fullgraph=True, backend=backend)
    out = inside(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (out != 0).double() * x.detach().exp() * 4)
    return alive


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    alive = run_processes(compiled, 3, backend, timeout=900)
    assert all(torch.equal(alive[0], other) for other in alive)
    assert not alive[0].all()
