"""Every operation is known to layer, function, converter, planner and granularity alike; and how one is added."""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from domain_reference import check_layer, randn, shard
from torch import nn

import credit_domain.layers
from credit_domain import convert_to_domain_parallel, plan_domain_parallel
from credit_domain.engine import driver
from credit_domain.engine.layer import LAYERS, DomainParallelLayer, Seen, record_of
from credit_domain.engine.row_op import ROW_OPS, ratio_of
from credit_domain.model.granularity import granularity_of, stride_of
from credit_domain.model.rules import decide
from credit_domain.ops.pooling.adaptive_pooling import AdaptiveWindows
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, get_domain_parallel_manager, initialize_domain_parallel

ROWS = 24
PARTITION = RowPartition((8, 16))


def _samples():
    """A module of each type in the table, by its type, and the shape of its input."""
    shapes = {1: (2, 4, ROWS), 2: (2, 4, ROWS, 6), 3: (2, 4, 3, ROWS, 6)}
    found = {}
    for n in (1, 2, 3):
        rows = {1: 0, 2: 0, 3: 1}[n]  # the dim of latitude among the spatial ones
        kernel, stride, padding = [1] * n, [1] * n, [0] * n
        kernel[rows], stride[rows], padding[rows] = 4, 2, 1
        sides = [0, 0] * n
        sides[2 * (n - 1 - rows)] = sides[2 * (n - 1 - rows) + 1] = 2
        size = [None] * n
        size[rows] = 5
        windows = {"kernel_size": tuple(kernel), "stride": tuple(stride), "padding": tuple(padding)}
        lp = (4, 2) if n == 1 else (tuple(kernel), tuple(stride))
        found |= {
            f"Conv{n}d": lambda windows=windows, n=n: getattr(nn, f"Conv{n}d")(4, 4, **windows),
            f"ConvTranspose{n}d": lambda windows=windows, n=n: getattr(nn, f"ConvTranspose{n}d")(4, 4, **windows),
            f"MaxPool{n}d": lambda windows=windows, n=n: getattr(nn, f"MaxPool{n}d")(**windows),
            f"AvgPool{n}d": lambda windows=windows, n=n: getattr(nn, f"AvgPool{n}d")(**windows),
            f"LPPool{n}d": lambda args=lp, n=n: getattr(nn, f"LPPool{n}d")(2, *args),
            f"AdaptiveAvgPool{n}d": lambda s=size, n=n: getattr(nn, f"AdaptiveAvgPool{n}d")(tuple(s)),
            f"AdaptiveMaxPool{n}d": lambda s=size, n=n: getattr(nn, f"AdaptiveMaxPool{n}d")(tuple(s)),
            f"ConstantPad{n}d": lambda s=sides, n=n: getattr(nn, f"ConstantPad{n}d")(tuple(s), 0.5),
            f"BatchNorm{n}d": lambda n=n: getattr(nn, f"BatchNorm{n}d")(4),
            f"InstanceNorm{n}d": lambda n=n: getattr(nn, f"InstanceNorm{n}d")(4),
            f"Dropout{n}d": lambda n=n: getattr(nn, f"Dropout{n}d")(0.0),
        }
        for kind in ("ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
            found[f"{kind}{n}d"] = lambda s=sides, n=n, kind=kind: getattr(nn, f"{kind}{n}d")(tuple(s))
    found |= {
        "PixelShuffle": lambda: nn.PixelShuffle(2),
        "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
        "Upsample": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
        "GroupNorm": lambda: nn.GroupNorm(2, 4),
        "LayerNorm": lambda: nn.LayerNorm((ROWS, 6)),
        "RMSNorm": lambda: nn.RMSNorm((ROWS, 6)),
        "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
        "Dropout": lambda: nn.Dropout(0.0),
        "AlphaDropout": lambda: nn.AlphaDropout(0.0),
        "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.0),
    }
    spatial = {name: int(name[-2]) if name[-2].isdigit() else 2 for name in found}
    return {getattr(nn, name): (make, shapes[spatial[name]]) for name, make in found.items()}


SAMPLES = _samples()


def dim_of(shape):
    return -1 if len(shape) == 3 else -2


def test_the_table_is_whole():
    assert set(SAMPLES) == set(LAYERS)
    faces = (getattr(credit_domain.layers, name) for name in credit_domain.layers.__all__)
    layers = {kind for kind in faces if issubclass(kind, DomainParallelLayer) and kind is not DomainParallelLayer}
    # Layers of modules that torch does not have are for converters of families, which name them.
    assert {kind for kind in layers if kind not in LAYERS.values()} == {
        credit_domain.layers.DomainParallelCrossEmbedBranch,
        credit_domain.layers.DomainParallelPeriodicConv2d,
    }


@pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
def test_all_ask_the_same_record(kind, monkeypatch):
    make, shape = SAMPLES[kind]
    dim, module = dim_of(shape), make().double().eval()
    assert decide(module, dim).fate == "converted"
    whole = randn(*shape)
    out = nn.Identity()(whole) if kind is nn.SyncBatchNorm else module(whole)
    seen = Seen(tuple(whole.shape), tuple(out.shape), PARTITION)
    record = record_of(module, dim, seen)
    if record is None:  # it reads no rows of others, or reduces over all of them
        assert out.shape[dim] == whole.shape[dim]
        return
    assert ROW_OPS[type(record).__name__] is type(record)
    # What planner and granularity are told is what comes out.
    footprint = record.footprint(PARTITION)
    assert footprint.target.rows == out.shape[dim]
    down, up = ratio_of(record)
    assert stride_of(module, dim) == (down, up)
    # What halves or doubles the rows says so; to how many rows adaptive pooling goes does not depend on how many come.
    adaptive = type(record) is AdaptiveWindows
    assert (down > 1) == (2 * out.shape[dim] <= ROWS + 2 and not adaptive)
    assert (up > 1) == (out.shape[dim] >= 2 * ROWS - 2)
    if (down, up) != (1, 1):
        assert out.shape[dim] in (ROWS * up // down, ROWS * up // down - 1)
    assert granularity_of(module, dim, input_shape=shape) == down
    (layer,) = plan_domain_parallel(module, shape, 2, dim, partition=PARTITION).layers
    assert layer.target == footprint.target
    # And the layer runs by the same.
    used = []
    place = driver.place

    def spy(op, *args):
        used.append(op)
        return place(op, *args)

    for room in list(sys.modules.values()):
        if getattr(room, "place", None) is place:
            monkeypatch.setattr(room, "place", spy)

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        manager.declare(PARTITION)
        converted = convert_to_domain_parallel(copy.deepcopy(module), manager, shard_dim=dim, check=False)
        assert type(converted) is LAYERS[kind]
        torch.testing.assert_close(
            converted(shard(whole, PARTITION, rank, dim)), shard(out, footprint.target, rank, dim)
        )

    run_threads(rank_main, 2)
    assert [op.footprint(PARTITION) for op in used] in ([footprint] * 2, [])
    assert used or kind is nn.PixelShuffle  # which needs no rows of others


# The example of CONTRIBUTING.md


@pytest.fixture
def example():
    """The module that the example is, as a file of this package would be."""
    page = Path(__file__).parents[3] / "CONTRIBUTING.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    module = types.ModuleType("credit_domain_example")
    before = dict(LAYERS), dict(ROW_OPS)
    sys.modules[module.__name__] = module
    exec(compile(code, str(page), "exec"), vars(module))
    yield module
    del sys.modules[module.__name__]
    for table, entries in zip((LAYERS, ROW_OPS), before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("sizes", [(8, 10), (7, 2, 1), (3, 3, 3, 3), (1, 1)])
def test_an_operation_is_added_in_one_file(example, sizes):
    partition = RowPartition(sizes)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), example.PairMean(), nn.Conv2d(3, 2, 1)).double()
    whole = randn(2, 3, partition.rows, 4)

    def convert(module):
        return convert_to_domain_parallel(module, get_domain_parallel_manager(), check=False)

    if all(offset % 2 == 0 for offset in partition.offsets[:-1]):
        check_layer(model, convert, whole, partition)
    check_layer(example.PairMean(), LAYERS[example.PairMean], whole, partition)
    assert granularity_of(model, input_shape=tuple(whole.shape)) == 2
    plan = plan_domain_parallel(model, tuple(whole.shape), partition.ranks, partition=partition)
    assert [layer.kind for layer in plan.layers] == ["Conv2d", "PairMean"]
    assert plan.layers[1].target == partition.strided(2)


def test_its_mistakes_are_errors_on_all_ranks(example):
    def rank_main(rank):
        initialize_domain_parallel(2, 2).declare(5)
        layer = LAYERS[example.PairMean](example.PairMean(), label="pairs")
        with pytest.raises(ValueError, match="pairs: an even number of rows is needed; there are 5"):
            layer(torch.zeros(1, 1, 3 - rank, 2))

    run_threads(rank_main, 2)


def test_two_operations_of_one_name_are_refused(example):
    with pytest.raises(ValueError, match="two operations are called Pairs"):
        example.row_op(type("Pairs", (), {}))


def test_a_record_that_is_written_again_counts(example):
    def footprint(self, source):
        raise ValueError("another one")

    driver.step_for(example.Pairs(), (2, 2), 0, "pairs")
    again = example.row_op(type("Pairs", (example.Pairs,), {"footprint": footprint, "__module__": example.__name__}))
    with pytest.raises(ValueError, match="pairs: another one"):
        driver.step_for(again(), (2, 2), 0, "pairs")


def test_columns_are_not_paired(example):
    model = nn.Sequential(example.PairMean()).double()
    assert decide(model[0], -1).fate == "local"
    assert granularity_of(model, -1, input_shape=(1, 1, 4, 7)) == 1
    assert plan_domain_parallel(model, (1, 1, 4, 7), 2, -1).layers == ()


def test_records_that_are_wrong_or_unknown_are_named(example):
    unknown = type("Unknown", (example.Pairs,), {})
    with pytest.raises(ValueError, match="pairs: Unknown is no known operation; put @row_op before its class"):
        driver.step_for(unknown(), (2, 2), 0, "pairs")

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        call = driver.Call(-2, RowPartition((2, 2)), manager, "pairs")
        with pytest.raises(ValueError, match="pairs: 2 rows came out, where Pairs says 1"):
            driver.run(example.Pairs(), torch.zeros(1, 1, 2, 2), call, 2, torch.clone, lambda rows, placed: rows)

    run_threads(rank_main, 2)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.ConvTranspose2d(1, 1, 1, dilation=(2, 1), output_padding=(1, 0)), (1, 1, 5, 4)),
        (nn.ConvTranspose2d(1, 1, 3, stride=2, dilation=3, output_padding=2), (1, 1, 5, 4)),
        (nn.ZeroPad2d((1, 0, 0, 0)), (1, 1, 5, 4)),
        (nn.CircularPad2d((0, 0, 1, -1)), (1, 1, 25, 4)),
    ],
)
def test_a_plan_is_that_of_the_layer(module, shape):
    (layer,) = plan_domain_parallel(module, shape, 2).layers
    assert layer.target.rows == module(torch.zeros(shape)).shape[-2]
    assert any(layer.halo) or not layer.messages
