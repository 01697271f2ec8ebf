"""Who reads which sample, who draws which random numbers, and what all ranks notice together."""

import datetime
import logging
import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

from credit_halo.testing import run_processes, run_threads
from credit_mesh import (
    Coords,
    DomainParallelManager,
    ParallelismConfig,
    RankLayout,
    RowPartition,
    build_device_mesh,
    initialize_domain_parallel,
)
from credit_parallel.contract import check_batch, check_finite, fingerprints, place_of
from credit_parallel.sampler import DataParallelSampler, data_parallel_sampler
from credit_parallel.seeds import global_noise, noise_like, rank_seeds, seed_ranks

CONF = {"trainer": {"parallelism": {"data": "ddp", "tensor": 2, "domain": 2}}}
LAYOUT = RankLayout(dp=2, tp=2, domain=2)


@dataclass
class Sample:
    field: Tensor
    time: datetime.datetime


def batch_of(sample: int) -> dict:
    """A batch with something of every kind in it."""
    field = torch.arange(60.0).view(1, 3, 4, 5) + sample
    return {
        "x": field,
        "static": (field.transpose(-1, -2).half(), None, [torch.tensor(sample), "land"]),
        "index": sample,
        "numpy": np.arange(3) + sample,
        "times": np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[h]") + np.timedelta64(sample, "h"),
        "sample": Sample(field > 3, datetime.datetime(2020, 1, 1) + datetime.timedelta(sample)),
    }


# Where a rank is


def test_all_ways_to_say_where_a_rank_is_agree() -> None:
    def rank_main(rank: int) -> None:
        wanted = (LAYOUT, LAYOUT.coords(rank))
        config = ParallelismConfig("ddp", 2, 2)
        mesh, _ = build_device_mesh(config, "cpu")
        for where in (CONF, CONF["trainer"], config, LAYOUT, mesh, DomainParallelManager.from_mesh(mesh)):
            assert place_of(where) == wanted
        with pytest.raises(ValueError, match="the layout of the ranks is not known"):
            place_of()
        with pytest.raises(ValueError, match=r"has 4 ranks; torch.distributed has 8"):
            place_of(RankLayout(4))
        with pytest.raises(ValueError, match=r"has 2 ranks; torch.distributed has 8"):
            place_of(mesh["domain"])
        with pytest.raises(ValueError, match="axes of the mesh must be some of dp, tp, domain"):
            place_of(init_device_mesh("cpu", (8,), mesh_dim_names=("ranks",)))
        initialize_domain_parallel(8, 2, tensor_parallel_size=2)
        assert place_of() == wanted

    run_processes(rank_main, 8, fork=True)
    assert place_of() == place_of(CONF) == (RankLayout(), Coords(0, 0, 0)), "without a world there is one rank"


# The batch


def read_by(rank: int, by: str) -> int:
    """The first sample of a sampler built with coordinates of the data axis, or with the global rank."""
    at = LAYOUT.coords(rank)
    replicas, index = {"dp": (2, at.dp), "rank": (8, rank), "domain": (2, at.domain), "none": (1, 0)}[by]
    return next(iter(DistributedSampler(range(16), replicas, index, shuffle=False)))


def test_the_contract_kept() -> None:
    def rank_main(rank: int) -> None:
        batch = batch_of(read_by(rank, "dp"))
        check_batch(batch, LAYOUT)
        batch["x"] = batch["x"].expand(2, 3, 4, 5)[:1].clone()  # other memory, the same numbers
        check_batch(dict(reversed(batch.items())) if rank % 2 else batch, CONF)

    run_threads(rank_main, 8)
    check_batch(batch_of(0))
    check_batch(object(), RankLayout())


def test_a_sampler_of_the_global_rank_is_caught_on_all_ranks() -> None:
    def rank_main(rank: int) -> str:
        with pytest.raises(ValueError, match="check_batch") as caught:
            check_batch(batch_of(read_by(rank, "rank")), LAYOUT)
        check_batch(batch_of(read_by(rank, "dp")), LAYOUT)
        return str(caught.value)

    messages = run_threads(rank_main, 8)
    assert len(set(messages)) == 1
    assert messages[0].startswith(
        "check_batch: replica 0 must read one batch, but rank 0 and rank 1 and rank 2 and rank 3 have read different "
        "batches (batch['index'], batch['numpy'], batch['sample'].field, batch['sample'].time and "
    )
    assert "replica 1 must read one batch, but rank 4 and rank 5 and rank 6 and rank 7" in messages[0]
    assert "build samplers with rank=dp_rank, num_replicas=dp_size (of data_parallel_coords(conf))" in messages[0]
    assert messages[0].endswith("let these ranks shuffle and augment alike")


def test_a_sampler_of_the_domain_rank_is_caught_and_sides_are_named() -> None:
    def rank_main(rank: int) -> None:
        with pytest.raises(ValueError, match=r"replica 0 must read one batch, but rank 0, 2 and rank 1, 3 have read"):
            check_batch({"x": torch.tensor([read_by(rank, "domain")])}, LAYOUT)
        with pytest.raises(ValueError, match=r"mine: replica 1 .* rank 4-5, 7 and rank 6 have read .* \(batch\[0\]\)"):
            check_batch([torch.tensor([-0.0 if rank == 6 else 0.0]), 1], LAYOUT, label="mine")

    run_threads(rank_main, 8)


def test_replicas_that_read_the_same_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run_threads(lambda rank: check_batch(batch_of(read_by(rank, "none")), LAYOUT), 8)
    assert [record.getMessage() for record in caplog.records] == [
        "check_batch: all 2 replicas have read the same batch; samplers take rank=dp_rank, num_replicas=dp_size"
    ]


def test_batches_that_are_read_in_shards() -> None:
    def rank_main(rank: int) -> None:
        at = LAYOUT.coords(rank)
        sample = read_by(rank, "dp")
        rows = torch.arange(6.0)[4 * at.domain : 4 + 2 * at.domain] + sample
        check_batch(rows, LAYOUT, sharded=True, sample_ids=[sample])
        with pytest.raises(ValueError, match="replica 0 must read one batch, but rank 0, 2 and rank 1, 3 have read"):
            check_batch(rows, LAYOUT)
        with pytest.raises(ValueError, match=r"rank 5 and rank 7 have read different batches \(batch\)"):
            check_batch(rows + (rank == 7), LAYOUT, sharded=True, sample_ids=[sample])
        with pytest.raises(ValueError, match=r"replica 0 .* rank 0, 2 and rank 1, 3 have read different samples"):
            check_batch(rows, LAYOUT, sharded=True, sample_ids=[sample if at.dp else at.domain])
        with pytest.raises(ValueError, match="pass sample_ids="):
            check_batch(rows, LAYOUT, sharded=True)

    run_threads(rank_main, 8)


def test_what_cannot_be_compared_is_named_on_all_ranks() -> None:
    def rank_main(rank: int) -> None:
        with pytest.raises(
            ValueError, match=r"on rank 1 batch\['a'\]\[1\] is of type object, which cannot be compared"
        ):
            check_batch({"a": [1, object() if rank == 1 else 2]}, RankLayout(tp=3))
        with pytest.raises(ValueError, match="on rank 0 batch is a numpy array of objects"):
            check_batch(np.array([object()]), RankLayout(tp=3))
        with pytest.raises(ValueError, match="batch is no dense tensor"):
            check_batch(torch.eye(3).to_sparse(), RankLayout(tp=3))

    run_threads(rank_main, 3)


def reads_wrongly(rank: int) -> str:
    mesh, _ = build_device_mesh({"domain": 2}, "cpu")
    check_batch(torch.full((3,), rank // 2), mesh)
    try:
        check_batch(torch.full((3,), rank), mesh)
    except ValueError as error:
        return str(error)
    return ""


def test_in_processes() -> None:
    messages = run_processes(reads_wrongly, 4)
    assert len(set(messages)) == 1
    assert "replica 0 must read one batch, but rank 0 and rank 1 have read different batches (batch)" in messages[0]


def test_checksums_see_every_bit() -> None:
    def same(a, b) -> bool:
        return fingerprints(a) == fingerprints(b)

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64):
        for size in (1, 3, 8, 1000):
            x = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
            assert same(x, x.clone())
            assert same(x, torch.stack([x, x], 1)[:, 0]), "strides do not matter"
            assert same(x, torch.cat([x[:1], x])[1:]), "nor does where it starts"
            assert not same(x, x[None])
            for at in {0, size // 2, size - 1}:
                changed = x.clone()
                changed[at] = changed[at] == 0
                assert not same(x, changed)
            if size > 8:
                assert not same(x, x.roll(1)), "order matters"
                assert not same(x, x.flip(0))
    assert not same(torch.zeros(4), torch.zeros(4).int())
    assert not same(torch.zeros(3), torch.zeros(4))
    assert same(torch.empty(0, 3), torch.empty(0, 3))
    assert same(torch.tensor(math.nan), torch.tensor(math.nan))
    assert not same([1, [2]], [1, 2])
    assert not same({"a": 1}, {"a": True})
    blocks = torch.zeros(1 << 14, dtype=torch.float64)
    blocks[0] = 1
    for distance in (1, 512, 4096, (1 << 14) - 1):
        assert not same(blocks, blocks.roll(distance)), "whole numbers have many zero bits, and swap all the same"


def test_large_tensors_are_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1001, dtype=torch.float32)
    whole = fingerprints(x)
    monkeypatch.setattr("credit_parallel.contract._WORDS", 64)
    assert fingerprints(x) == whole


# Finite


def finite(rank: int) -> list:
    seen = [check_finite(torch.ones(3)), check_finite(1.0), check_finite(math.nan if rank == 2 else 1.0)]
    message = ""
    try:
        check_finite(torch.tensor([1.0, math.inf if rank else 0.0]), what="the gradient norm", raises=True)
    except ValueError as error:
        message = str(error)
    pair = dist.new_group([0, 1]), dist.new_group([2])
    seen.append(check_finite(torch.tensor(math.nan if rank == 2 else 0.0, requires_grad=True), pair[rank // 2]))
    return [seen, message]


def test_what_is_not_finite_is_noticed_by_all() -> None:
    for run in (run_threads, run_processes):
        for rank, (seen, message) in enumerate(run(finite, 3)):
            assert seen == [True, True, False, rank < 2]
            assert message == "the gradient norm is not finite on rank 1-2 (of 3)"
    assert check_finite(1.0)
    assert not check_finite(torch.tensor(math.inf))
    with pytest.raises(ValueError, match=r"the loss is not finite on rank 0 \(of 1\)"):
        check_finite(math.nan, raises=True)


# Seeds and noise


def draws(rank: int) -> list:
    seeds = seed_ranks(7, RankLayout(dp=1, tp=2, domain=2))
    return [tuple(seeds), random.random(), float(np.random.rand()), float(torch.rand(1))]


def test_tensor_peers_draw_alike_and_domain_peers_do_not() -> None:
    by_rank = run_processes(draws, 4)
    for (a, *first), (b, *second) in zip(by_rank[:2], by_rank[2:], strict=True):
        assert a == b
        assert first == second
    for north, south in zip(by_rank[0][1:], by_rank[1][1:], strict=True):
        assert north != south
    assert by_rank[0][0][:2] == by_rank[1][0][:2], "they share the seeds of the world and of their replica"


def test_seeds_do_not_meet() -> None:
    layout = RankLayout(4, 2, 8)
    seeds = {seed: [rank_seeds(seed, layout.coords(rank)) for rank in range(64)] for seed in range(3)}
    assert len({s.rank for all_of in seeds.values() for s in all_of}) == 3 * 32
    assert len({s.replica for all_of in seeds.values() for s in all_of}) == 3 * 4
    assert len({s.world for all_of in seeds.values() for s in all_of}) == 3
    assert rank_seeds(0, Coords(0, 0, 0)) == rank_seeds(0, Coords(0, 1, 0))
    assert rank_seeds(1, Coords(0, 0, 1)).rank == 6449396456959210260, "on every machine"
    with pytest.raises(ValueError, match="seed must be an integer; got 1.0"):
        rank_seeds(1.0, Coords(0, 0, 0))


@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 6, 2), (2, 2, 1, 1, 2, 1)])
def test_noise_does_not_depend_on_the_layout(sizes: tuple[int, ...]) -> None:
    partition = RowPartition(sizes)
    want = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(5))
    again = torch.randn(9, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(len(sizes), len(sizes))
        own = partition.interval(rank)
        noise = noise_like(torch.empty(2, len(own), 4), generator=torch.Generator().manual_seed(5))
        assert torch.equal(noise, want[:, own.start : own.stop])
        assert noise.untyped_storage().nbytes() == noise.nbytes, "the rows of others are freed"
        manager.declare(partition)
        generator = torch.Generator().manual_seed(6)
        noise = global_noise((9, 3), generator=generator, dim=0, dtype=torch.float64)
        assert torch.equal(noise, again[own.start : own.stop])
        assert global_noise((1, 9), generator=generator, dim=1).shape == (1, len(own)), "it goes on alike"

    run_threads(rank_main, len(sizes))


def test_noise_from_other_seeds_is_refused_on_all_ranks() -> None:
    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(3, 3)
        with pytest.raises(ValueError, match=r"global_noise: on every rank no partition is declared"):
            global_noise((2, 9, 4), generator=torch.Generator().manual_seed(0))
        manager.declare(9)
        with pytest.raises(ValueError, match=r"global_noise: the ranks disagree.*rank 2: noise of shape .* seed 2"):
            global_noise((2, 9, 4), generator=torch.Generator().manual_seed(rank))
        with pytest.raises(ValueError, match=r"is not for the 8 rows along dim -2 of \(8, 4\) on 3 ranks"):
            global_noise((8, 4), generator=torch.Generator().manual_seed(0))
        with pytest.raises(ValueError, match=r"dim -2 is none of the dims of shape \(8,\)"):
            global_noise((8,), generator=torch.Generator().manual_seed(0))

    run_threads(rank_main, 3)


# Samplers


def indices(sampler: DataParallelSampler) -> list[int]:
    return list(sampler)


def test_replicas_share_out_the_samples() -> None:
    def rank_main(rank: int) -> list[int]:
        sampler = data_parallel_sampler(range(10), CONF, seed=3)
        sampler.set_epoch(1)
        assert len(sampler) == 5
        return [index for (index,) in DataLoader(range(10), batch_size=1, sampler=sampler, collate_fn=tuple)]

    by_rank = run_threads(rank_main, 8)
    assert by_rank[:4] == [by_rank[0]] * 4
    assert by_rank[4:] == [by_rank[4]] * 4
    assert sorted(by_rank[0] + by_rank[4]) == list(range(10))
    theirs = DistributedSampler(range(10), 2, 1, seed=3)
    theirs.set_epoch(1)
    assert by_rank[4] == list(theirs)


def samplers(replicas: int, **kwargs) -> list[DataParallelSampler]:
    return [DataParallelSampler(range(26), num_replicas=replicas, rank=rank, **kwargs) for rank in range(replicas)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
def test_training_goes_on_in_the_middle_of_an_epoch(after: int, drop_last: bool) -> None:
    """Also on another number of replicas: what was left of the order is what is seen, once."""
    before = samplers(4, seed=1, drop_last=drop_last)
    iterators = []
    for sampler in before:
        sampler.set_epoch(2)
        iterators.append(iter(sampler))
    seen = [next(iterator) for _ in range(3) for iterator in iterators]
    states = [sampler.state_dict() for sampler in before]
    assert states == [states[0]] * 4
    resumed = samplers(after, seed=1, drop_last=drop_last)
    rest = []
    for sampler in resumed:
        sampler.load_state_dict(states[0])
        sampler.set_epoch(2)  # as at the start of any epoch
        assert sampler.state_dict() == states[0]
        rest.append(indices(sampler))
        assert len(indices(sampler)) == len(sampler), "the next time from the beginning"
    left = [index for turn in zip(*rest, strict=True) for index in turn]
    fresh = samplers(after, seed=1, drop_last=drop_last)
    for sampler in fresh:
        sampler.set_epoch(2)
    order = [index for turn in zip(*map(indices, fresh), strict=True) for index in turn]
    assert seen + left == order


def test_where_an_epoch_was_left() -> None:
    (sampler,) = samplers(1, shuffle=False)
    iterator = iter(sampler)
    for _ in range(5):
        next(iterator)
    ahead = sampler.state_dict(used=3)  # of which a loader's workers have read two too many
    sampler.load_state_dict(ahead)
    assert next(iter(sampler)) == 3
    sampler.load_state_dict(ahead)
    sampler.set_epoch(1)
    assert next(iter(sampler)) == 0, "another epoch begins at its beginning"
    list(sampler)
    (other,) = samplers(1, shuffle=False)
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, list(other)) == (1, []), "the epoch was over"
    for four in samplers(4, shuffle=False):
        four.load_state_dict(sampler.state_dict())
        assert list(four) == []
        with pytest.raises(ValueError, match="3 samples were used, which 4 replicas cannot have shared evenly"):
            four.load_state_dict(ahead)
    with pytest.raises(ValueError, match=r"used must be in 0\.\.26; got 27"):
        sampler.state_dict(used=27)
    with pytest.raises(ValueError, match="another order of samples: seed is 0 in the state and 5 here"):
        samplers(1, shuffle=False, seed=5)[0].load_state_dict(ahead)


@pytest.mark.parametrize("replicas", [1, 3, 4, 5])
def test_repeated_samples_are_counted(replicas: int) -> None:
    kept = []
    for sampler in samplers(replicas):
        kept += indices(sampler)[: len(sampler) - sampler.repeated]
    assert sorted(kept) == list(range(26))
    assert all(sampler.repeated == 0 for sampler in samplers(replicas, drop_last=True))
