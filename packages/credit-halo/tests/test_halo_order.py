"""Like calls in another order on one rank: CREDIT_HALO_DEBUG=1 tells them apart, cold and after many right steps."""

from __future__ import annotations

import re

import pytest
import torch

from credit_halo import ExchangeError, HaloExchange, all_mean, all_sum, broadcast, gather_rows, repartition_rows
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 2, 3))
OTHER = RowPartition((2, 4, 2))


def means(rank, first, second, halo):
    return [
        lambda: all_mean(first.mean()),
        lambda: all_mean(second.mean()),
    ]


def labelled(rank, first, second, halo):
    return [
        lambda: all_sum(first.mean(), label="mass"),
        lambda: all_sum(second.mean(), label="energy"),
    ]


def gathers(rank, first, second, halo):
    return [
        lambda: gather_rows(first, PARTITION),
        lambda: gather_rows(second, PARTITION),
    ]


def gathers_on_one(rank, first, second, halo):
    return [
        lambda: gather_rows(first, PARTITION, dst=0),
        lambda: gather_rows(second, PARTITION, dst=0),
    ]


def broadcasts(rank, first, second, halo):
    return [
        lambda: broadcast(first.mean(), 1),
        lambda: broadcast(second.mean(), 1),
    ]


def one_layer_twice(rank, first, second, halo):
    return [
        lambda: halo(first),
        lambda: halo(second),
    ]


def repartitions(rank, first, second, halo):
    return [
        lambda: repartition_rows(first, PARTITION, OTHER),
        lambda: repartition_rows(second, PARTITION, OTHER),
    ]


CALLS = [means, labelled, gathers, gathers_on_one, broadcasts, one_layer_twice, repartitions]


def tensors(rank):
    size = PARTITION.sizes[rank]
    return [torch.full((1, 1, size, 2), value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0)]


def step(calls, order):
    results = {}
    for at in order:
        results[at] = calls[at]()
    return [results[0], results[1]]


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_swapped_on_one_rank(make, warm, monkeypatch):
    monkeypatch.setenv("CREDIT_HALO_DEBUG", "1")

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        halo = HaloExchange(1, label="stem")
        for _ in range(warm):
            first, second = step(make(rank, *tensors(rank), halo), (0, 1))
            (first.sum() + second.sum()).backward()
        with pytest.raises(ValueError, match="the ranks") as info:
            step(make(rank, *tensors(rank), halo), (1, 0) if rank == 1 else (0, 1))
        first, second = step(make(rank, *tensors(rank), halo), (0, 1))  # nothing is left behind
        (first.sum() + second.sum()).backward()
        return str(info.value)

    (message,) = set(run_threads(rank_main, 3, timeout=60))
    if make is not labelled or warm:  # whose labels are compared at the first use
        assert message.startswith("the ranks make different calls at the same time. rank 0, 2: ")
        assert len(set(re.findall(r"test_halo_order.py:(\d+)", message))) >= 2, "both lines are named"


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_backwards_swapped_on_one_rank(make, monkeypatch):
    monkeypatch.setenv("CREDIT_HALO_DEBUG", "1")

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        halo = HaloExchange(1, label="stem")
        for _ in range(2):
            results = step(make(rank, *tensors(rank), halo), (0, 1))
            for result in results:
                result.sum().backward()
        results = step(make(rank, *tensors(rank), halo), (0, 1))
        last = results[0 if rank != 1 else 1]
        with pytest.raises(ValueError, match="the ranks make different calls at the same time") as info:
            last.sum().backward()
        return str(info.value)

    (message,) = set(run_threads(rank_main, 3, timeout=60))
    assert "in the backward of" in message


def test_ranks_that_have_nothing_to_exchange_take_part(monkeypatch):
    """A rank whose own rows are all that it needs is not passed over, forward or backward."""
    monkeypatch.setenv("CREDIT_HALO_DEBUG", "1")
    partition = RowPartition((2, 2, 2))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        out = repartition_rows(x, partition, RowPartition((2, 3, 1)))
        out.square().sum().backward()
        assert torch.equal(x.grad, 2 * torch.ones_like(x))

    run_threads(rank_main, 3, timeout=60)


@pytest.mark.parametrize("calls", [2, 1])
def test_two_calls_in_one_line_and_one_call_in_a_function(calls, monkeypatch):
    """The line alone does not tell them apart: the place in it does, and the lines that led there."""
    monkeypatch.setenv("CREDIT_HALO_DEBUG", "1")

    def mean(x):
        return all_mean(x)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        u = torch.ones(2)
        for _ in range(2):
            assert [all_sum(u)[0].item(), all_sum(u)[0].item()] == [3.0, 3.0]
            mean(u)
            mean(u)

        def call():
            if calls == 2:
                return [all_sum(u), None] if rank == 1 else [None, all_sum(u)]
            if rank == 1:
                return mean(u)
            return mean(u)

        with pytest.raises(ValueError, match="the ranks make different calls"):
            call()

    run_threads(rank_main, 3, timeout=60)


def test_labels_tell_sums_apart_at_their_first_use():
    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        for call in (all_sum, all_mean, broadcast):
            with pytest.raises(ValueError, match="rank 0, 2: 'mass': .*rank 1: 'energy': "):
                call(torch.ones(2), label="energy" if rank == 1 else "mass")

    run_threads(rank_main, 3, timeout=60)


def swapped_gathers(rank):
    """Two gathers of one shape, with labels; swapped on one rank after several right steps, without debugging."""
    for swap in (False, False, True):
        own = {label: torch.full((1, 1, PARTITION.sizes[rank], 2), value) for label, value in (("a", 1.0), ("b", 2.0))}
        for label in "ba" if swap and rank == 1 else "ab":
            try:
                got = gather_rows(own[label], PARTITION, label=label)
            except ExchangeError as error:
                return f"{label}: {error}"
            assert got.unique().tolist() == own[label].unique().tolist(), "never rows of the other"
    return "right"


def test_rows_of_one_label_are_never_taken_for_those_of_another():
    for said in run_processes(swapped_gathers, 3, timeout=600, group_timeout=3):
        assert said == "right" or "gather" in said or "exchange" in said
