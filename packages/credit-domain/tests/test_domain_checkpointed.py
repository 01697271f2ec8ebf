"""Activation checkpoints around what speaks to other ranks: all ranks compute again, those without rows too.

After each function comes a padding of longitudes, which saves a tensor only where there are rows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from domain_cases import Op
from domain_reference import check_layer, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import credit_domain.functional as CF
from credit_domain import convert_to_domain_parallel
from credit_domain.manager import get_domain_parallel_manager
from credit_mesh import RowPartition

WEIGHT = randn(3, 3, 3, 3)
MOVED = RowPartition((0, 8, 0), allow_empty=True)
ROWS = [range(4, 8), range(4), range(0)]


def running():
    return torch.zeros(3).double(), torch.ones(3).double()


def mask(x):
    """What needs no gradient speaks to other ranks too."""
    return x * CF.roll(x.detach(), 1, -2)


def reduced(fn):
    return lambda x: x * fn(x, -2, keepdim=True)


OPS = {
    "crop": (lambda x: CF.crop(x, 1, 3), lambda x: x[:, :, 1:3]),
    "roll": (lambda x: CF.roll(x, 3, -2), lambda x: torch.roll(x, 3, -2)),
    "flip": (lambda x: CF.flip(x, -2), lambda x: torch.flip(x, (-2,))),
    "repartition": (lambda x: CF.repartition(x, MOVED), lambda x: x * 1),
    "regroup": (lambda x: CF.regroup(x, ROWS), lambda x: x.roll(4, -2)),
    "nothing to do": (lambda x: CF.crop(x, 0, 8), lambda x: x * 1),
    "pad": (lambda x: CF.pad(x, (0, 0, 2, 1), "replicate"), lambda x: F.pad(x, (0, 0, 2, 1), "replicate")),
    "pad and crop": (
        lambda x: CF.pad(CF.crop(x, 7, 8), (1, 3, 1, 2), "replicate"),
        lambda x: F.pad(x[:, :, 7:], (1, 3, 1, 2), "replicate"),
    ),
    "boundary": (lambda x: CF.unpad_boundary(CF.pad_boundary(x, 2, 1), 2, 1), lambda x: x * 1),
    "interpolate": (lambda x: CF.interpolate(x, (3, 5)), lambda x: F.interpolate(x, (3, 5))),
    "same size": (lambda x: CF.interpolate(x, (8, 4)), lambda x: F.interpolate(x, (8, 4))),
    "shuffle": (
        lambda x: CF.pixel_shuffle(CF.pixel_unshuffle(x, 2).sin(), 2),
        lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2).sin(), 2),
    ),
    "conv2d": (lambda x: CF.conv2d(x, WEIGHT, padding=1), lambda x: F.conv2d(x, WEIGHT, padding=1)),
    "strided": (lambda x: CF.conv2d(x, WEIGHT, None, 4, 1), lambda x: F.conv2d(x, WEIGHT, None, 4, 1)),
    "transposed": (
        lambda x: CF.conv_transpose2d(x, WEIGHT, None, 2, 1),
        lambda x: F.conv_transpose2d(x, WEIGHT, None, 2, 1),
    ),
    "max_pool2d": (lambda x: CF.max_pool2d(x, 3, 4, 1), lambda x: F.max_pool2d(x, 3, 4, 1)),
    "avg_pool2d": (lambda x: CF.avg_pool2d(x, 3, 4, 1), lambda x: F.avg_pool2d(x, 3, 4, 1)),
    "lp_pool2d": (lambda x: CF.lp_pool2d(x.exp(), 2, 3, 2), lambda x: F.lp_pool2d(x.exp(), 2, 3, 2)),
    "adaptive_avg_pool2d": (lambda x: CF.adaptive_avg_pool2d(x, 3), lambda x: F.adaptive_avg_pool2d(x, 3)),
    "adaptive_max_pool2d": (lambda x: CF.adaptive_max_pool2d(x, 3), lambda x: F.adaptive_max_pool2d(x, 3)),
    "one row": (lambda x: x * CF.adaptive_max_pool2d(x, 1), lambda x: x * F.adaptive_max_pool2d(x, 1)),
    "batch_norm": (
        lambda x: CF.batch_norm(x, *running(), training=True),
        lambda x: F.batch_norm(x, *running(), training=True),
    ),
    "group_norm": (lambda x: CF.group_norm(x, 1), lambda x: F.group_norm(x, 1)),
    "instance_norm": (CF.instance_norm, F.instance_norm),
    "layer_norm": (lambda x: CF.layer_norm(x, (8, 4)), lambda x: F.layer_norm(x, (8, 4))),
    "rms_norm": (lambda x: CF.rms_norm(x, (8, 4)), lambda x: F.rms_norm(x, (8, 4))),
    "softmax": (lambda x: CF.softmax(x, -2), lambda x: torch.softmax(x, -2)),
    "without gradient": (mask, lambda x: x * x.detach().roll(1, -2)),
    **{
        name: (reduced(getattr(CF, name)), reduced(getattr(torch, name)))
        for name in ("sum", "mean", "amax", "amin", "var", "std", "logsumexp")
    },
}


def then(fn, sharded):
    """The function, then what saves a tensor on some ranks only, and an exchange without gradient after that."""

    def run(x):
        y = fn(x)
        if sharded:
            y = CF.pad(y, (1, 1, 0, 0), "replicate")
            return y + CF.roll(y.detach(), 1, -2)
        y = F.pad(y, (1, 1, 0, 0), "replicate")
        return y + y.detach().roll(1, -2)

    return run


@pytest.mark.parametrize("sizes", [(8, 0, 0), (0, 5, 3)], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", OPS)
@pytest.mark.timeout(60)
def test_functions(name, reentrant, sizes):
    ours, plain = OPS[name]
    check_layer(
        Op(then(plain, False)),
        lambda _: Op(lambda x: checkpoint(then(ours, True), x, use_reentrant=reentrant)),
        randn(2, 3, 8, 4),
        RowPartition(sizes, allow_empty=True),
        declare=False,
    )


LAYERS = {
    "conv": nn.Conv2d(3, 4, 3, padding=1),
    "strided": nn.Conv2d(3, 4, 3, 2, 1),
    "transposed": nn.ConvTranspose2d(3, 4, 4, 2, 1),
    "pad": nn.ReplicationPad2d((1, 3, 1, 2)),
    "pool": nn.MaxPool2d(3, 2, 1),
    "adaptive": nn.AdaptiveAvgPool2d(3),
    "upsample": nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "shuffle": nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
    "groups": nn.GroupNorm(1, 3),
    "instances": nn.InstanceNorm2d(3),
    "rows": nn.LayerNorm((8, 4)),
    "net": nn.Sequential(
        nn.Conv2d(3, 4, (4, 1), (4, 1)), nn.ReflectionPad2d((1, 1, 0, 0)), nn.Upsample(scale_factor=4)
    ),
}


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.timeout(60)
def test_layers(name, reentrant, declared):
    class Checkpointed(nn.Module):
        def __init__(self, inner, padded):
            super().__init__()
            self.inner, self.padded = inner, padded

        def forward(self, x):
            run = lambda x: self.padded(self.inner(x))  # noqa: E731
            return checkpoint(run, x, use_reentrant=reentrant) if x.requires_grad else run(x)

    def convert(module):
        manager = get_domain_parallel_manager()
        if declared:  # another height than that of what is sharded here, which leaves ranks without rows
            manager.declare(RowPartition((8, 4, 4)))
        module.inner = convert_to_domain_parallel(nn.Sequential(module.inner), manager)[0]
        module.padded = convert_to_domain_parallel(nn.Sequential(module.padded), manager)[0]
        return module

    module = Checkpointed(LAYERS[name].double(), nn.ReplicationPad2d((1, 1, 0, 0)))
    partition = RowPartition((0, 5, 3), allow_empty=True)
    check_layer(module, convert, randn(2, 3, 8, 4), partition, declare=False)
