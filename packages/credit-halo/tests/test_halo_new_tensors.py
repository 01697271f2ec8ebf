"""Every public function returns a new tensor, also where it has nothing to do, on every rank."""

from __future__ import annotations

import pytest
import torch

import credit_halo
from credit_halo import HaloExchange, plan_halo
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel


def table(own: RowPartition, rank: int):
    needs = [range(own.offsets[r], own.offsets[r + 1]) for r in range(own.ranks)]
    plan = plan_halo(own, 0, 0, rank=rank)
    thirds = RowPartition(tuple(3 * (r == 0) for r in range(own.ranks)), allow_empty=True)
    return {
        "exchange_rows": lambda x: credit_halo.exchange_rows(x, plan),
        "take_rows": lambda x: credit_halo.take_rows(x, needs, partition=own),
        "repartition_rows": lambda x: credit_halo.repartition_rows(x, own, own),
        "post_rows": lambda x: credit_halo.post_rows(x, plan).wait(),
        "gather_rows": lambda x: credit_halo.gather_rows(x, own),
        "scatter_rows": lambda x: credit_halo.scatter_rows(x, RowPartition(own.sizes, allow_empty=True)),
        "transpose_rows": lambda x: credit_halo.transpose_rows(x, RowPartition(own.sizes, allow_empty=True), thirds),
        "all_sum": lambda x: credit_halo.all_sum(x.sum(-2)),
        "all_mean": lambda x: credit_halo.all_mean(x.sum(-2)),
        "broadcast": lambda x: credit_halo.broadcast(x.sum(-2)),
        "HaloExchange": HaloExchange(0),
        "autograd": lambda x: credit_halo.halo_exchange._HaloExchangeFunction.apply(x, 0, -2, None),
    }


NO_TENSOR = {
    *("EdgeRule", "ExchangeError", "ExchangePlan", "Message", "Need", "PendingRows", "Placement", "Span"),
    *("__version__", "constant", "pole_crossing", "plan_halo", "plan_repartition", "plan_rows"),
    *("answer_roll_calls", "as_timeout", "naming_missing_ranks", "set_timeouts"),
}
NAMES = sorted(table(RowPartition((3, 3)), 0))


def test_the_table_holds_every_public_function() -> None:
    assert {*NAMES, *NO_TENSOR} == {*credit_halo.__all__, "autograd"}


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (6, 0), (1, 0, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_new_tensors(name: str, sizes: tuple[int, ...]) -> None:
    own = RowPartition(sizes, allow_empty=True)

    def rank_main(rank: int) -> None:
        initialize_domain_parallel(own.ranks, own.ranks)
        fn = table(own, rank)[name]
        rows = own.rows if name == "scatter_rows" else sizes[rank]
        leaf = torch.ones(2, rows, 3, requires_grad=True)
        x = leaf * 1
        out, version = fn(x), x._version
        assert out is not x
        with torch.no_grad():
            out.add_(1)
        assert torch.equal(x, leaf)
        assert x._version == version
        with torch.no_grad():
            assert not fn(x).requires_grad
        assert fn(x).requires_grad

    run_threads(rank_main, own.ranks)
