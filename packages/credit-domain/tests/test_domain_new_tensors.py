"""Every function and layer returns a new tensor where torch's own does, on every rank alike, and no graph without grad.

What is called here has nothing to do: sizes stay, nothing is padded, cropped, moved or dropped.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from domain_reference import randn, shard
from torch import nn

import credit_domain.functional as CF
from credit_domain import layers
from credit_domain.manager import initialize_domain_parallel
from credit_halo.testing import run_threads
from credit_mesh import RowPartition

PARTITIONS = [(6,), (3, 3), (6, 0), (1, 0, 5)]


def kernel(nd, transposed=False):
    return randn(3, 3, *[1] * nd)


def new(x):
    """What is not in torch counts as an operation of torch."""
    return x.clone()


def table(own):
    """Each public function as called here, and as torch calls it; ``own`` is the partition of the rows."""
    needs = [range(own.offsets[r], own.offsets[r + 1]) for r in range(own.ranks)]
    running = torch.zeros(3).double(), torch.ones(3).double()
    functions = {
        "crop": (CF.crop, new),
        "repartition": (lambda x: CF.repartition(x, own), new),
        "regroup": (lambda x: CF.regroup(x, needs), new),
        "regroup_back": (lambda x: CF.regroup_back(x, needs, own), new),
        "roll": (lambda x: CF.roll(x, 0, -2), lambda x: torch.roll(x, 0, -2)),
        "flip": (lambda x: CF.flip(x, ()), lambda x: torch.flip(x, ())),
        "pad": (lambda x: CF.pad(x, (0, 0, 0, 0)), lambda x: F.pad(x, (0, 0, 0, 0))),
        "pad_boundary": (lambda x: CF.pad_boundary(x, 0, 0), new),
        "unpad_boundary": (lambda x: CF.unpad_boundary(x, 0, 0), new),
        "interpolate": (lambda x: CF.interpolate(x, (6, 4)), lambda x: F.interpolate(x, (6, 4))),
        "pixel_shuffle": (lambda x: CF.pixel_shuffle(x, 1), lambda x: F.pixel_shuffle(x, 1)),
        "pixel_unshuffle": (lambda x: CF.pixel_unshuffle(x, 1), lambda x: F.pixel_unshuffle(x, 1)),
        "softmax": (lambda x: CF.softmax(x, -2), lambda x: torch.softmax(x, -2)),
        "batch_norm": (lambda x: CF.batch_norm(x, *running), lambda x: F.batch_norm(x, *running)),
        "group_norm": (lambda x: CF.group_norm(x, 1), lambda x: F.group_norm(x, 1)),
        "instance_norm": (CF.instance_norm, F.instance_norm),
        "layer_norm": (lambda x: CF.layer_norm(x, (6, 4)), lambda x: F.layer_norm(x, (6, 4))),
        "rms_norm": (lambda x: CF.rms_norm(x, (6, 4)), lambda x: F.rms_norm(x, (6, 4))),
    }
    for name in ("sum", "mean", "amax", "amin", "var", "std", "logsumexp", "var_mean"):
        ours, theirs = getattr(CF, name), getattr(torch, name)
        functions[name] = (lambda x, fn=ours: fn(x, -2), lambda x, fn=theirs: fn(x, -2))
    for name in ("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"):
        for how, args in (("none", (0.0, True)), ("evaluated", (0.5, False)), ("drawn", (0.5, True))):
            ours, theirs = getattr(CF, name), getattr(F, name)
            functions[f"{name} {how}"] = (
                lambda x, fn=ours, args=args: fn(x, *args),
                lambda x, fn=theirs, args=args: fn(x, *args),
            )
    for n in (1, 2, 3):
        for name in (f"conv{n}d", f"conv_transpose{n}d"):
            ours, theirs, w = getattr(CF, name), getattr(F, name), kernel(n)
            functions[name] = (lambda x, fn=ours, w=w: fn(x, w), lambda x, fn=theirs, w=w: fn(x, w))
        for name, args in {
            **{"max_pool": (1,), "avg_pool": (1,), "lp_pool": (1, 1)},
            **dict.fromkeys(("adaptive_max_pool", "adaptive_avg_pool"), (6,) if n == 1 else ((None,) * n,)),
        }.items():
            ours, theirs = getattr(CF, f"{name}{n}d"), getattr(F, f"{name}{n}d")
            functions[f"{name}{n}d"] = (
                lambda x, fn=ours, args=args: fn(x, *args),
                lambda x, fn=theirs, args=args: fn(x, *args),
            )
    return functions


NO_TENSOR = {"partition_of"}


class Periodic(nn.Module):
    """A convolution that would wrap, if it padded."""

    def __init__(self):
        super().__init__()
        self.conv, self.padding = nn.Conv2d(3, 3, 1), 0

    def forward(self, x):
        return self.conv(x)


def layer_table():
    """A module that has nothing to do for each layer, and how to wrap it."""
    modules = {
        "Dropout": nn.Dropout(0.0),
        "AlphaDropout": nn.AlphaDropout(0.5).eval(),
        "FeatureAlphaDropout": nn.FeatureAlphaDropout(0.0),
        "GroupNorm": nn.GroupNorm(1, 3),
        "LayerNorm": nn.LayerNorm((6, 4)),
        "RMSNorm": nn.RMSNorm((6, 4)),
        "Pad": nn.ZeroPad2d(0),
        "CrossEmbedBranch": nn.Sequential(nn.ZeroPad2d(0), nn.Conv2d(3, 3, 1)),
        "PixelShuffle": nn.PixelShuffle(1),
        "PixelUnshuffle": nn.PixelUnshuffle(1),
        "Upsample": nn.Upsample((6, 4)),
        "PeriodicConv2d": Periodic(),
    }
    for n in (1, 2, 3):
        modules[f"Dropout{n}d"] = getattr(nn, f"Dropout{n}d")(0.0)
        modules[f"Conv{n}d"] = getattr(nn, f"Conv{n}d")(3, 3, 1)
        modules[f"ConvTranspose{n}d"] = getattr(nn, f"ConvTranspose{n}d")(3, 3, 1)
        modules[f"BatchNorm{n}d"] = getattr(nn, f"BatchNorm{n}d")(3)
        modules[f"InstanceNorm{n}d"] = getattr(nn, f"InstanceNorm{n}d")(3)
        modules[f"MaxPool{n}d"] = getattr(nn, f"MaxPool{n}d")(1)
        modules[f"AvgPool{n}d"] = getattr(nn, f"AvgPool{n}d")(1)
        modules[f"LPPool{n}d"] = getattr(nn, f"LPPool{n}d")(1, 1)
        for kind in ("Avg", "Max"):
            size = 6 if n == 1 else (None,) * n
            modules[f"Adaptive{kind}Pool{n}d"] = getattr(nn, f"Adaptive{kind}Pool{n}d")(size)
    return {f"DomainParallel{name}": module.double() for name, module in modules.items()}


def spatial_of(name):
    """(B, C, L), (B, C, H, W) or (B, C, T, H, W), by the name."""
    n = next((int(d) for d in "123" if f"{d}d" in name), 2)
    return {1: (2, 3, 6), 2: (2, 3, 6, 4), 3: (2, 3, 2, 6, 4)}[n], -1 if n == 1 else -2


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def shares(out, x):
    return out is x or (out.numel() > 0 and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())


def watch(fn, x):
    """For each output: whether it is the input, shares its memory, changes it, and has a graph without grad."""
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    found = []
    for out in outputs(fn(h)):
        same, shared, version = out is h, shares(out, h), h._version
        with torch.no_grad():
            out.add_(1)
        found.append((same, shared, h._version != version or not torch.equal(h, leaf)))
    h = leaf * 1
    with torch.no_grad():
        graphs = [out.requires_grad for out in outputs(fn(h))]
    return list(zip(found, graphs, strict=True))


def compare(ours_of, plain, shape, dim, sizes):
    partition = RowPartition(sizes, allow_empty=True)
    torch.manual_seed(0)
    whole = randn(*shape)
    wanted = watch(plain, whole)

    def rank_main(rank):
        manager = initialize_domain_parallel(partition.ranks, partition.ranks)
        if min(sizes):
            manager.declare(partition)
        return watch(ours_of(manager), shard(whole, partition, rank, dim))

    assert run_threads(rank_main, partition.ranks) == [wanted] * partition.ranks


def test_the_table_holds_every_public_function_and_layer():
    functions = {name.split()[0] for name in table(RowPartition((3, 3)))}
    assert functions | NO_TENSOR == set(CF.__all__)
    assert {*layer_table(), "DomainParallelInterpolate", "DomainParallelLayer"} == set(layers.__all__)


@pytest.mark.parametrize("sizes", PARTITIONS, ids=str)
@pytest.mark.parametrize("name", sorted(table(RowPartition((3, 3)))))
def test_functions(name, sizes):
    own, plain = table(RowPartition(sizes, allow_empty=True))[name]
    shape, dim = spatial_of(name.split()[0])
    compare(lambda manager: own, plain, shape, dim, sizes)


@pytest.mark.parametrize("sizes", PARTITIONS, ids=str)
@pytest.mark.parametrize("name", [*sorted(layer_table()), "DomainParallelInterpolate"])
def test_layers(name, sizes):
    shape, dim = spatial_of(name)
    if name == "DomainParallelInterpolate":
        compare(lambda manager: layers.DomainParallelInterpolate((6, 4)), nn.Upsample((6, 4)), shape, dim, sizes)
        return
    module = layer_table()[name]
    kind = getattr(layers, name)
    where = () if name == "DomainParallelGroupNorm" else (dim,)  # it does not ask which
    compare(lambda manager: kind(copy.deepcopy(module), *where), copy.deepcopy(module), shape, dim, sizes)


@pytest.mark.parametrize("sizes", [(3, 3), (5, 1), (1, 2, 3)], ids=str)
def test_an_activation_in_place_leaves_the_skip(sizes):
    """The gradient too, of one rank and of all."""
    partition, whole = RowPartition(sizes), randn(2, 3, 6, 4)
    for ours, plain in (
        (lambda x: CF.interpolate(x, (6, 4), mode="bilinear"), lambda x: F.interpolate(x, (6, 4), mode="bilinear")),
        (lambda x: CF.crop(x, 0, 6), new),
        (lambda x: CF.pad(x, (0, 0, 0, 0)), new),
    ):

        def grad(fn, x):
            x = x.clone().requires_grad_()
            h = x.sin()
            (h * F.relu(fn(h), inplace=True)).sum().backward()
            return x.grad

        def rank_main(rank, ours=ours, grad=grad):
            initialize_domain_parallel(partition.ranks, partition.ranks).declare(partition)
            return grad(ours, shard(whole, partition, rank))

        together = torch.cat(run_threads(rank_main, partition.ranks), -2)
        torch.testing.assert_close(together, grad(plain, whole), rtol=1e-12, atol=1e-12)
