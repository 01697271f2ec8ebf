"""State that a forward updates: a recomputation in an activation checkpoint updates it as often as on one rank.

A non-reentrant checkpoint stops its recomputation as soon as it has the last tensor that the backward needs. So it
counts whether a layer updates its state before it keeps its tensors or after.
"""

from __future__ import annotations

import copy

import pytest
import torch
from domain_reference import randn, shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from credit_domain import convert_to_domain_parallel
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 1, 4))
PARTS = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "spectral": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "batch": lambda: nn.BatchNorm2d(4),
    "batch plain": lambda: nn.BatchNorm2d(4, affine=False),
    "batch cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "instance affine": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "pool": lambda: nn.MaxPool2d(3, 1, 1),
    "gelu": nn.GELU,
}


def build(names, frozen):
    torch.manual_seed(0)
    net = nn.Sequential(*[PARTS[name]() for name in names]).double()
    for at in frozen:
        net[at].requires_grad_(False)
    return net


def train(net, x, factor, span, reentrant, gradient):
    """Two steps' forwards and backwards, with a part of the net in a checkpoint; the state afterwards."""
    first, last = span
    for _ in range(2):
        y = net[:first](x.detach().clone().requires_grad_(gradient))
        y = checkpoint(net[first:last], y, use_reentrant=reentrant)
        y = net[last:](y)
        if y.requires_grad:
            (y * factor).sum().backward()
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


@st.composite
def nets(draw):
    names = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5))
    first = draw(st.integers(0, len(names) - 1))
    span = first, draw(st.integers(first + 1, len(names)))
    return names, span, draw(st.sets(st.integers(0, len(names) - 1), max_size=2))


@settings(max_examples=40)
@given(nets(), st.booleans(), st.booleans())
@example((["conv", "batch"], (1, 2), set()), False, True)
@example((["conv", "batch"], (0, 2), set()), False, True)
@example((["conv", "batch", "gelu"], (0, 3), set()), False, True)
@example((["conv", "instance"], (0, 2), set()), False, True)
@example((["instance affine", "conv"], (0, 2), {1}), False, True)
@example((["spectral", "batch cumulative"], (0, 2), {0}), False, False)
def test_as_many_updates_as_on_one_rank(net, reentrant, gradient):
    names, span, frozen = net
    plain = build(names, frozen)
    other, whole, factor = copy.deepcopy(plain), randn(2, 4, 8, 5) + 1, randn(2, 4, 8, 5, seed=1)
    gradient = gradient or reentrant  # without one a reentrant checkpoint gives no gradient
    want = train(plain, whole, factor, span, reentrant, gradient)

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        mine = convert_to_domain_parallel(copy.deepcopy(other), manager)
        x, own = (shard(each, PARTITION, rank) for each in (whole, factor))
        return train(mine, x, own, span, reentrant, gradient)

    for got in run_threads(rank_main, 3):
        assert sorted(got) == sorted(want)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_sync_batch_norm():
    """One rank's SyncBatchNorm is a BatchNorm."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)).double()
    other = nn.Sequential(copy.deepcopy(net[0]), nn.SyncBatchNorm(4, momentum=None).double())
    want = train(net, randn(2, 4, 8, 5), randn(2, 4, 8, 5, seed=1), (0, 2), False, True)
    assert int(want["1.num_batches_tracked"]) == 4

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        mine = convert_to_domain_parallel(copy.deepcopy(other), manager)
        x, factor = (shard(randn(2, 4, 8, 5, seed=seed), PARTITION, rank) for seed in (0, 1))
        return train(mine, x, factor, (0, 2), False, True)

    for got in run_threads(rank_main, 3):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value)


def compiled(rank, ranks, names):
    torch.manual_seed(0)
    net, x, factor = build(names, ()), randn(2, 4, 8, 5), randn(2, 4, 8, 5, seed=1)
    if ranks > 1:
        manager = initialize_domain_parallel(ranks, ranks)
        manager.declare(PARTITION)
        net = convert_to_domain_parallel(net, manager)
        x, factor = (shard(each, PARTITION, rank) for each in (x, factor))
    run = torch.compile(net, backend="aot_eager")
    for _ in range(2):
        (checkpoint(run, x.clone().requires_grad_(), use_reentrant=False) * factor).sum().backward()
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


@pytest.mark.slow
def test_compiled():
    names = ["conv", "batch", "gelu", "instance"]  # torch breaks the graph where momentum is None
    want = compiled(0, 1, names)
    for got in run_processes(compiled, 3, 3, names, timeout=900):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value)
