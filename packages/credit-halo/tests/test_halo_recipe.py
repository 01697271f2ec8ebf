"""Plans are forgotten and made again from their keys, so that many heights take no memory and compiled code goes on."""

import gc
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from halo_reference import partitions
from hypothesis import given

from credit_halo import (
    EdgeRule,
    ExchangePlan,
    HaloExchange,
    agreement,
    constant,
    plan,
    plan_halo,
    plan_rows,
    pole_crossing,
    take_rows,
)
from credit_halo.plan import plans
from credit_halo.recipe import recipe_of, recipe_text
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel


def forget() -> None:
    """What happens to a plan once many others have been used."""
    for cache in (plan._plan, plan._plan_of, plan._plan_halo):
        cache.cache_clear()


def same(one: ExchangePlan, other: ExchangePlan) -> bool:
    names = set(one.__dataclass_fields__)
    return all(getattr(one, name) == getattr(other, name) for name in names)


RULES = (EdgeRule(), constant(-np.inf), constant(np.float64(0.5)), EdgeRule("circular"), pole_crossing(signs=(1, -1)))


@given(st.data(), partitions(), st.sampled_from(RULES))
def test_a_plan_is_made_again_from_its_key(data: st.DataObject, partition: RowPartition, edge: EdgeRule) -> None:
    rows = st.integers(0, partition.rows - 1)
    some = st.one_of(st.lists(rows, max_size=40), st.builds(range, rows, rows, st.integers(1, 3)))
    needs = [data.draw(some) for _ in range(partition.ranks)]
    for rank in range(partition.ranks):
        made = plan_rows(partition, needs, rank=rank, edge=edge)
        for key in (made.key, made.linear.key):
            before = plans[key]
            forget()
            again = plans[key]
            assert again is not before
            assert same(again, before)
        assert same(pickle.loads(pickle.dumps(made)), made)


@pytest.mark.parametrize("ranks", [1, 4, 1024])
def test_the_key_of_a_halo_is_short_on_any_number_of_ranks(ranks: int) -> None:
    partition = RowPartition.even(4 * ranks + 1, ranks)
    assert len(plan_halo(partition, 2, 3, rank=ranks // 2, edge="circular").key) < 250


def test_a_recipe_keeps_what_ranks_need() -> None:
    recipe = (3, 2), (range(-1, 4), (4, 0, 0)), constant(-np.inf)
    assert recipe_of(recipe_text(*recipe)) == recipe
    empty = (3, 2), (range(0), ()), EdgeRule()
    assert recipe_of(recipe_text(*empty)) == empty


@pytest.mark.parametrize("key", ["", "0123/0", "0123/0:[[1],[]", "0123/zero:[[1],[],[]]", "0123/0:c-o7", "0123/0:[1]"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="is the key of no plan"):
        plans[key]


@pytest.mark.slow
def test_ten_thousand_heights_leave_a_bounded_number_of_plans() -> None:
    halo = HaloExchange(1, edge=constant(1.0))
    counts = []
    for height in range(1, 10_001):
        x = torch.ones(1, 1, 1, 1).expand(1, 1, 1 + height % 100, 1)
        assert halo(x).shape[2] == x.shape[2] + 2
        assert plan_halo(RowPartition((height, 2)), 1, 1, rank=1).out_rows == 4
        if height % 5000 == 0:
            gc.collect()
            counts.append(sum(type(each) is ExchangePlan for each in gc.get_objects()))
    assert counts[1] < 1.05 * counts[0], "the second five thousand took the places of the first"


def test_what_ranks_agreed_on_is_forgotten_by_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "AGREED", 8)

    def rank_main(rank: int) -> int:
        manager, halo = initialize_domain_parallel(2, 2), HaloExchange(1)
        for height in (*range(4, 24), 4, 5, 23):
            x = torch.ones(1, 1, manager.declare(height).sizes[rank], 1)
            assert halo(x).shape[2] == x.shape[2] + 2
        return len(agreement._agreed[manager.domain_group])

    assert run_threads(rank_main, 2, timeout=20) == [8, 8]
    assert not dist.is_initialized()


@pytest.mark.slow
def test_compiled_code_goes_on_once_its_plans_are_forgotten() -> None:
    halo = HaloExchange(2, edge=constant(3.0))
    partition = RowPartition((6,))

    def step(x: torch.Tensor) -> torch.Tensor:
        return halo(take_rows(x, [[5, 0, -1, 2, 6, 1]], partition=partition, edge=constant(2.0)).sin())

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    whole = torch.randn(1, 2, 6, 3, dtype=torch.float64)
    results = []
    for function in (step, run, run):
        x = whole.clone().requires_grad_()
        forget()
        out = function(x)
        forget()
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for out, grad in results[1:]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(grad, results[0][1])
