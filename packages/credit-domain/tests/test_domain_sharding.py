"""Sharding whole tensors and batches, and gathering them: exact, differentiable, and nothing else is touched."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from domain_cases import cases
from domain_reference import randn, random_like, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from credit_domain.sharding import gather_tensor, shard_batch, shard_tensor
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel


def on_ranks(ranks, function):
    def rank_main(rank):
        return function(initialize_domain_parallel(ranks, ranks))

    return run_threads(rank_main, ranks)


def refused(text):
    return pytest.raises(ValueError, match=re.escape(text))


# Tensors


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data(), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_tensors_are_divided_and_gathered(data, ranks, granularity, ndim):
    blocks = data.draw(st.integers(ranks, 3 * ranks))
    height = blocks * granularity + data.draw(st.integers(0, granularity - 1))
    at = data.draw(st.integers(0, ndim - 1))
    sizes = [2, 3, 4, 2][: ndim - 1]
    whole = randn(*sizes[:at], height, *sizes[at:])
    factor, dim = random_like(whole), data.draw(st.sampled_from([at, at - ndim]))
    even = RowPartition.even(height, ranks, granularity)
    x = whole.clone().requires_grad_()
    (x.sin() * factor).sum().backward()

    def function(manager):
        manager.granularity = granularity
        own = whole.clone().requires_grad_()
        part = shard_tensor(own, dim)
        assert manager.partition == even
        assert torch.equal(part, shard(whole, even, manager.domain_rank, dim))
        again = gather_tensor(part.sin(), dim)
        assert torch.equal(again, whole.sin())
        (again * factor).sum().div(ranks).backward()
        return own.grad

    torch.testing.assert_close(sum(on_ranks(ranks, function)), x.grad)


@settings(max_examples=20)
@given(cases(), st.booleans())
def test_gathering_any_partition(case, known):
    whole, partition, dim, declare = case
    factor = random_like(whole)

    def function(manager):
        if declare:
            manager.declare(partition)
        own = shard(whole, partition, manager.domain_rank, dim).clone().requires_grad_()
        out = gather_tensor(own, dim, manager, partition=partition if known else None)
        assert torch.equal(out, whole)
        (out * factor).sum().backward()
        expected = shard(factor, partition, manager.domain_rank, dim) * partition.ranks
        torch.testing.assert_close(own.grad, expected)  # every rank has a loss of the whole

    on_ranks(partition.ranks, function)


@pytest.mark.parametrize(("granularity", "sizes"), [(1, [61, 60, 60, 60]), (16, [64, 64, 64, 49])])
def test_heights_that_do_not_divide(granularity, sizes):
    x = randn(1, 2, 241, 4)

    def function(manager):
        manager.granularity = granularity
        part, declared = shard_tensor(x, manager=manager), manager.partition
        assert shard_tensor(x[:, :1], 2).shape[2] == part.shape[2]
        assert manager.partition is declared
        return part.shape[-2]

    assert on_ranks(4, function) == sizes


def test_a_declared_partition_stays():
    """As a reader declares it that loads its own rows."""
    x = randn(1, 2, 6, 4)

    def function(manager):
        manager.declare(RowPartition((1, 4, 1)))
        return shard_tensor(x), shard_tensor(x[:, :, :3]), manager.partition

    parts = on_ranks(3, function)
    assert torch.equal(torch.cat([part for part, _, _ in parts], -2), x)
    assert [part.shape[-2] for part, _, _ in parts] == [1, 4, 1]
    assert [part.shape[-2] for _, part, _ in parts] == [1, 1, 1]
    assert parts[0][2] == RowPartition((1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_shards_have_memory_of_their_own(dtype):
    x = (randn(2, 3, 7, 5) * 3).to(dtype)
    last = x.to(memory_format=torch.channels_last)

    def function(manager):
        part, part_last = shard_tensor(x), shard_tensor(last)
        assert part.dtype == dtype
        assert part.is_contiguous()
        assert part_last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(part, part_last)
        for each in (part, part_last, shard_tensor(x, 0), shard_tensor(x.mT, -1)):
            assert each.untyped_storage().nbytes() == each.numel() * each.element_size()
            assert each.untyped_storage().data_ptr() not in (x.data_ptr(), last.data_ptr())
            assert not each.is_pinned()
            assert not each.requires_grad

    on_ranks(2, function)


@pytest.mark.gpu
def test_pinned_tensors_give_pinned_shards():
    x = torch.ones(2, 3, 8, 4).pin_memory()
    parts = on_ranks(2, lambda manager: shard_tensor(x, manager=manager))
    assert all(part.is_pinned() for part in parts)
    assert torch.equal(torch.cat(parts, -2), x)


def test_one_rank():
    x, batch = randn(1, 2, 4, 4), {"x": randn(1, 2, 4, 4)}
    assert shard_tensor(x) is gather_tensor(x) is x
    alone = shard_batch(batch)
    assert alone is not batch
    assert alone["x"] is batch["x"]

    def function(manager):
        assert shard_tensor(x) is gather_tensor(x) is x
        assert manager.partition == RowPartition((4,))
        assert shard_batch({"x": x[:, :, :3]})["x"].shape[-2] == 3
        assert manager.partition == RowPartition((3,))

    on_ranks(1, function)


def test_mistakes_with_tensors_are_named():
    def function(manager):
        x = randn(2, 3, 4)
        with refused("shard_tensor of shape (2, 3, 4): the sharded dim must be one of the last 3"):
            shard_tensor(x, 3)
        with refused("shard_tensor of shape (2, 3, 4) along dim -3: 2 rows over 3 ranks"):
            shard_tensor(x, 0)
        assert manager.partition is None
        with refused("gather_tensor of shape (2, 3, 4): the sharded dim must be one of the last 3"):
            gather_tensor(x, -4)
        with refused("gather_tensor: on rank 1 the tensor of shape (2, 3, 4) has 3 rows"):
            gather_tensor(x, partition=RowPartition((3, 1, 3)))
        with pytest.raises(ValueError, match="gather_tensor: the ranks disagree"):
            gather_tensor(x[..., : 1 + manager.domain_rank])

    on_ranks(3, function)


# Batches

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Sample:
    x: Any
    name: str = "era5"
    parts: list = field(default_factory=list)


@dataclass(frozen=True)
class Frozen:
    x: Any
    count: int = 3


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any


class Named(dict):
    """A dict with something more, as libraries have them."""

    note = "none"


def grid(*sizes, rows=9):
    return randn(*sizes, rows, 4)


def content(value):
    """A batch as lists, to compare it by."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (dict, UserDict, MappingProxyType)):
        return [(key, content(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [content(item) for item in value]
    if isinstance(value, (Sample, Frozen, Slotted)):
        return [content(getattr(value, name)) for name in type(value).__dataclass_fields__]
    return str(value)


def nested():
    extra = Named(x=grid(1, 2))
    extra.note = "kept"
    return {
        "x": {"era5": OrderedDict(input=grid(1, 2), static=grid(2, 1, 3))},
        "y": defaultdict(list, target=[grid(1, 2), grid(1)]),
        "pair": Pair(grid(1, 2), None),
        "tuple": (grid(1, 2), "name"),
        "sample": Sample(grid(1, 2), parts=[grid(1, 1)]),
        "frozen": Frozen(grid(1, 2)),
        "slotted": Slotted({"deep": grid(1, 2)}),
        "extra": extra,
        "user": UserDict(x=grid(1, 2)),
        "fixed": MappingProxyType({"x": grid(1, 2)}),
        "queue": deque([grid(1, 2)], maxlen=3),
        "lead": torch.arange(3),
        "scalars": randn(9, 4),
        "other": randn(1, 2, 5, 4),
        "array": np.zeros((1, 2, 9, 4)),
        "time": "2020-01-01",
        7: None,
        "shape": torch.Size([3]),
    }


def test_batches_keep_their_containers():
    batch = nested()
    before = content(batch)
    partition = RowPartition.even(9, 3)

    def function(manager):
        rank = manager.domain_rank
        part = shard_batch(batch, height=9)
        assert manager.partition == partition

        def same(x, own):
            assert torch.equal(own, shard(x, partition, rank))
            assert own.untyped_storage().nbytes() == own.numel() * own.element_size()

        assert list(part) == list(batch)
        for key, value in batch.items():
            assert type(part[key]) is type(value)
        same(batch["x"]["era5"]["input"], part["x"]["era5"]["input"])
        same(batch["x"]["era5"]["static"], part["x"]["era5"]["static"])
        assert type(part["x"]["era5"]) is OrderedDict
        same(batch["y"]["target"][0], part["y"]["target"][0])
        assert part["y"]["target"][1] is batch["y"]["target"][1]  # 3 dims
        assert part["y"].default_factory is list
        same(batch["pair"].first, part["pair"].first)
        same(batch["tuple"][0], part["tuple"][0])
        assert part["tuple"][1] == "name"
        same(batch["sample"].x, part["sample"].x)
        same(batch["sample"].parts[0], part["sample"].parts[0])
        same(batch["frozen"].x, part["frozen"].x)
        same(batch["slotted"].x["deep"], part["slotted"].x["deep"])
        same(batch["extra"]["x"], part["extra"]["x"])
        assert part["extra"].note == "kept"
        same(batch["user"]["x"], part["user"]["x"])
        same(batch["fixed"]["x"], part["fixed"]["x"])
        same(batch["queue"][0], part["queue"][0])
        assert part["queue"].maxlen == 3
        for key in ("lead", "scalars", "other", "array", "time", 7, "shape"):
            assert part[key] is batch[key]

    on_ranks(3, function)
    assert content(batch) == before


def test_lists_and_tensors_are_batches_too():
    def function(manager):
        x = grid(1, 2)
        part = shard_batch([{"x": x}, (x, x)])
        assert type(part) is list
        assert part[0]["x"] is part[1][0] is part[1][1]
        assert torch.equal(part[0]["x"], shard_batch(x))
        return part[0]["x"]

    assert torch.equal(torch.cat(on_ranks(2, function), -2), grid(1, 2))


def test_dims_of_4_and_5_dims_and_by_name():
    batch = {
        "x": randn(1, 2, 3, 8, 4),
        "y": randn(1, 8, 2, 3),
        "static": {"mask": randn(2, 8, 4)},
        "aux": randn(1, 1, 8, 8),
    }

    def function(manager):
        return shard_batch(batch, -2, 1, dims={"static.mask": -2, "aux": None})

    parts = on_ranks(3, function)
    assert torch.equal(torch.cat([part["x"] for part in parts], -2), batch["x"])
    assert torch.equal(torch.cat([part["y"] for part in parts], 1), batch["y"])
    assert torch.equal(torch.cat([part["static"]["mask"] for part in parts], -2), batch["static"]["mask"])
    assert parts[0]["aux"] is batch["aux"]
    assert parts[0]["static"]["mask"].shape == (2, 3, 4)


def test_gradients_flow_through_batches():
    x = randn(1, 2, 7, 4).requires_grad_()

    def function(manager):
        own = x.detach().clone().requires_grad_()
        (shard_batch({"x": own})["x"] * shard_tensor(random_like(x))).sum().backward()
        return own.grad

    torch.testing.assert_close(sum(on_ranks(3, function)), random_like(x))


def test_the_height_of_a_batch():
    high, low = randn(1, 2, 8, 4), randn(1, 2, 5, 4)

    def function(manager):
        with refused(
            "shard_batch: tensors of several heights, of which none is declared: x[0] (1, 2, 8, 4) along dim -2"
        ):
            shard_batch({"x": [high, low]})
        assert manager.partition is None
        assert shard_batch({"x": [high, low]}, height=5)["x"][0] is high
        part = shard_batch({"x": [high, low]})  # as declared
        assert part["x"][0] is high
        assert part["x"][1].shape[-2] < 5
        assert shard_batch({"x": high})["x"].shape[-2] < 8  # which declares another
        assert manager.partition.rows == 8
        batch = {"name": "none", "table": randn(8, 4)}
        assert shard_batch(batch) == batch
        with refused("shard_batch: no tensor has height=721; those that can be sharded are [0].x (1, 2, 8, 4)"):
            shard_batch([{"x": high}], height=721)
        with refused("shard_batch: no tensor has height=721; those that can be sharded are none"):
            shard_batch(batch, height=721)

    on_ranks(3, function)


def test_mistakes_with_batches_are_named():
    batch = {"x": {"era5": {"input": randn(1, 2, 8, 4)}}, "static": randn(2, 5, 4), "name": "a"}

    def function(manager):
        with refused("shard_batch: dims names no tensor of the batch: name, era5; it has x.era5.input, static"):
            shard_batch(batch, dims={"name": -2, "era5": -2, "static": None})
        with refused("dims says to shard static of shape (2, 5, 4) along dim -2, where it has 5 rows; the height of"):
            shard_batch(batch, height=8, dims={"static": -2})
        with refused("shard_batch: x.era5.input of shape (1, 2, 8, 4): the sharded dim must be one of the last 4"):
            shard_batch(batch, spatial_dims_4d=4)
        with refused("shard_batch: 2 rows over 3 ranks with granularity=1 would leave rank 2 without rows"):
            shard_batch(batch, spatial_dims_4d=1)

    on_ranks(3, function)


def test_tensordicts():
    tensordict = pytest.importorskip("tensordict")
    x, y = randn(2, 3, 8, 4), randn(2, 8, 4)
    inner = tensordict.TensorDict({"x": x, "y": y, "name": "a"}, batch_size=[2])
    batch = {"data": tensordict.TensorDict({"inner": inner}, batch_size=[2]).lock_()}

    def function(manager):
        part = shard_batch(batch)["data"]
        assert type(part) is tensordict.TensorDict
        assert part.batch_size == (2,)
        assert part["inner"]["y"] is y
        assert part["inner"]["name"] == "a"
        with refused("shard_batch: the rows of data.x are one of its batch dims"):
            shard_batch({"data": tensordict.TensorDict({"x": x}, batch_size=[2, 3, 8])})
        return part["inner"]["x"]

    assert torch.equal(torch.cat(on_ranks(3, function), -2), x)
    assert inner["x"] is x


def test_tensordict_is_imported_by_nobody_here():
    if "tensordict" not in sys.modules:
        on_ranks(2, lambda manager: shard_batch(nested(), height=9))
        assert "tensordict" not in sys.modules
