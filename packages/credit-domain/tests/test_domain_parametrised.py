"""Parametrised layers: hooks fire once, one power iteration for each step, the same on all ranks; checkpoints fit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from domain_reference import check_layer, randn, shard
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from credit_domain.layers import DomainParallelConv2d, DomainParallelConvTranspose2d
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 1, 4))


def old(fn):
    """The hooks of torch before parametrisations, which it warns about."""

    def apply(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return fn(module)

    return apply


KINDS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old spectral_norm": old(nn.utils.spectral_norm),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_parametrised_layer(kind, transposed):
    torch.manual_seed(0)
    if transposed:
        layer, wrap = nn.ConvTranspose2d(2, 2, 4, 2, 1), DomainParallelConvTranspose2d
    else:
        layer, wrap = nn.Conv2d(2, 2, 3, padding=1), DomainParallelConv2d
    layer = KINDS[kind](layer.double())
    check_layer(layer, wrap, randn(2, 2, 8, 5), PARTITION, calls=3)


def test_state_moves_between_plain_and_converted():
    torch.manual_seed(0)
    plain = parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1))
    x = torch.randn(1, 2, 6, 6)
    for _ in range(3):
        plain(x)
    other = DomainParallelConv2d(parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)))
    assert list(other.state_dict()) == list(plain.state_dict())
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other.eval()(x), plain.eval()(x))
    back = parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1))
    back.load_state_dict(other.state_dict())
    torch.testing.assert_close(back.eval()(x), plain(x))


def test_old_weight_norm():
    """Not in the list above since torch cannot copy such a layer."""
    whole, factor = randn(1, 2, 8, 5), randn(1, 3, 8, 5, seed=1)

    def make():
        torch.manual_seed(0)
        return old(nn.utils.weight_norm)(nn.Conv2d(2, 3, 3, padding=1).double())

    plain = make()
    (plain(whole) * factor).sum().backward()
    twins = [make() for _ in range(3)]

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        layer = DomainParallelConv2d(twins[rank])
        (layer(shard(whole, PARTITION, rank)) * shard(factor, PARTITION, rank)).sum().backward()

    run_threads(rank_main, 3)
    for name in ("weight_g", "weight_v", "bias"):
        total = sum(getattr(twin, name).grad for twin in twins)
        torch.testing.assert_close(total, getattr(plain, name).grad)


def test_a_parametrisation_may_come_after_the_conversion():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    expected = parametrizations.spectral_norm(copy.deepcopy(conv)).eval()
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(DomainParallelConv2d(copy.deepcopy(conv))).eval()
    layer.load_state_dict(expected.state_dict())
    x = randn(1, 2, 4, 4)
    torch.testing.assert_close(layer(x), expected(x))


def test_old_weight_norm_may_come_after_the_conversion():
    layer = DomainParallelConv2d(nn.Conv2d(2, 2, 3, padding=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)
    assert sorted(layer.state_dict()) == ["bias", "weight_g", "weight_v"]
    before = layer.weight.clone()
    with torch.no_grad():
        layer.weight_g.mul_(2)
    layer(torch.ones(1, 2, 4, 4))
    torch.testing.assert_close(layer.weight, 2 * before)


def test_optimizer_and_activation_checkpointing():
    """Steps of SGD with recomputation are those of one rank, and the recomputation asks nobody anything."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 5, 1, 2)).double()
    whole, factor = randn(1, 2, 8, 5), randn(1, 2, 8, 5, seed=1)
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        (plain(whole) * factor).sum().backward()
        optimizer.step()

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        mine = copy.deepcopy(net)
        mine[0], mine[2] = DomainParallelConv2d(mine[0]), DomainParallelConv2d(mine[2])
        optimizer = torch.optim.SGD(mine.parameters(), 0.01, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            out = checkpoint(mine, shard(whole, PARTITION, rank), use_reentrant=False)
            (out * shard(factor, PARTITION, rank)).sum().backward()
            for parameter in mine.parameters():
                torch.distributed.all_reduce(parameter.grad)
            optimizer.step()
        return mine.state_dict()

    for state in run_threads(rank_main, 3):
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value)
