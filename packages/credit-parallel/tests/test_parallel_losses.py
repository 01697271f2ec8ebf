"""Losses of sharded fields against the plain mean of the whole, and latitude weights against their integrals."""

import math
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel
from credit_parallel.losses import cos_latitude_weights, domain_mean, domain_value, latitude_weights

CLOSE = {"rtol": 1e-13, "atol": 1e-15}


@st.composite
def partitions(draw: st.DrawFn) -> RowPartition:
    """Any partition of a few rows over 1 to 6 ranks, some of them without rows."""
    rows, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=ranks - 1, max_size=ranks - 1)))
    return RowPartition(tuple(b - a for a, b in pairwise([0, *cuts, rows])), allow_empty=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows_of(x: Tensor, partition: RowPartition, rank: int, dim: int = -2) -> Tensor:
    own = partition.interval(rank)
    return x.narrow(dim, own.start, len(own))


@settings(max_examples=60)
@given(
    partitions(),
    st.integers(-3, 2),
    st.sampled_from(("none", "all", "own")),
    st.sampled_from(("none", "elements", "columns")),
    st.booleans(),
)
def test_the_mean_of_the_losses_and_of_their_gradients_is_that_of_one_rank(partition, dim, weighted, masked, known):
    shape = [2, 3, 4]
    shape[dim] = partition.rows
    x, target, scale = randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2)[:1, :1, :1]
    weights = torch.rand(partition.rows, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
    mask = None
    if masked != "none":
        mask = (
            randn(*(1 if masked == "columns" and d == dim % 3 else size for d, size in enumerate(shape)), seed=4) > -0.7
        )
        mask[0, 0, 0] = True  # something is left

    def loss_of(x, scale, rank):
        own = (lambda t: t) if rank is None else (lambda t: rows_of(t, partition, rank, dim))
        values = (own(x) * scale - own(target)) ** 2
        if rank is None:
            w = torch.ones(partition.rows) if weighted == "none" else weights
            w = w.double().view([-1 if d == dim % 3 else 1 for d in range(3)]).expand_as(values)
            w = w if mask is None else w * mask
            return (values * w).sum() / w.sum()
        return domain_mean(
            values,
            dim=dim,
            weights={"none": None, "all": weights, "own": rows_of(weights, partition, rank, 0)}[weighted],
            mask=own(mask) if masked == "elements" else mask,
            partition=partition if known else None,
        )

    def rank_main(rank: int) -> tuple[Tensor, ...]:
        initialize_domain_parallel(partition.ranks, partition.ranks)
        mine, factor = x.clone().requires_grad_(), scale.clone().requires_grad_()
        loss = loss_of(mine, factor, rank)
        assert loss.shape == ()
        loss.backward()
        return loss.detach(), mine.grad, factor.grad, domain_value(loss)

    inputs = x.clone().requires_grad_(), scale.clone().requires_grad_()
    whole = loss_of(*inputs, None)
    whole.backward()
    losses, *grads, values = map(torch.stack, zip(*run_threads(rank_main, partition.ranks), strict=True))
    torch.testing.assert_close(losses.mean(), whole.detach(), equal_nan=True, **CLOSE)
    torch.testing.assert_close(values, whole.detach().expand_as(values), equal_nan=True, **CLOSE)
    for grad, wanted in zip(grads, inputs, strict=True):
        torch.testing.assert_close(grad.mean(0), wanted.grad, equal_nan=True, **CLOSE)


UNEVEN = RowPartition((4, 1, 3))


def in_processes(rank: int) -> Tensor:
    manager = initialize_domain_parallel(3, 3)
    manager.declare(UNEVEN)
    values = rows_of(randn(2, 8, 5), UNEVEN, rank).requires_grad_()
    loss = domain_mean(values, weights=latitude_weights(8, pole_is_row=False), mask=values > -1)
    loss.backward()
    return torch.stack([loss.detach(), values.grad.sum(), domain_value(loss)])


def test_in_processes() -> None:
    whole = randn(2, 8, 5)
    weights = latitude_weights(8, pole_is_row=False)[:, None] * (whole > -1)
    loss, grad, value = torch.stack(run_processes(in_processes, 3)).mean(0)
    assert float(loss) == pytest.approx(float((whole * weights).sum() / weights.sum()), rel=1e-13)
    assert float(value) == pytest.approx(float(loss), rel=1e-13)
    assert float(grad) == pytest.approx(1, rel=1e-13), "weights are constants, and their shares add up"


def compiled(rank: int) -> None:
    manager = initialize_domain_parallel(2, 2)
    manager.declare(RowPartition((5, 3)))
    own = manager.partition.interval(rank)
    weights = latitude_weights(8, pole_is_row=True)

    def loss(x: Tensor) -> Tensor:
        return domain_mean(x * x, weights=weights, mask=x > -1, partition=manager.partition)

    results = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = randn(2, 8, 5)[:, own.start : own.stop].requires_grad_()
        value = fn(x)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*results)


def test_in_compiled_code() -> None:
    run_processes(compiled, 2, timeout=600, group_timeout=100)


def test_nothing_is_sent_where_the_partition_is_given() -> None:
    weights = latitude_weights(8, pole_is_row=True)
    calls: list[str] = []  # a fork has a list of its own

    def counted(collective):
        def count(*args, **kwargs):
            calls.append(collective.__name__)
            return collective(*args, **kwargs)

        return count

    def rank_main(rank: int) -> list[int]:
        manager = initialize_domain_parallel(3, 3)
        manager.declare(UNEVEN)
        sent = []
        for _ in range(2):
            before = len(calls)
            values = rows_of(randn(2, 8, 5), UNEVEN, rank).requires_grad_()
            plain = domain_mean(values, partition=manager.partition)
            weighted = domain_mean(values, weights=weights, partition=manager.partition)
            (plain + weighted).backward()
            sent.append(len(calls) - before)
        return sent

    with (
        patch.object(dist, "all_gather", counted(dist.all_gather)),
        patch.object(dist, "all_reduce", counted(dist.all_reduce)),
    ):
        assert run_processes(rank_main, 3, fork=True) == [[2, 0]] * 3, "ranks agree on partition and weights, once"


def test_16_bit_losses_do_not_overflow() -> None:
    values = torch.full((4, 100, 100), 300.0, dtype=torch.float16)
    assert float(domain_mean(values)) == 300
    assert domain_mean(values).dtype == torch.float32
    assert domain_mean(values.double(), weights=torch.rand(100)).dtype == torch.float64


def test_without_a_world_it_is_the_mean() -> None:
    values = randn(2, 5, 4)
    assert float(domain_mean(values)) == pytest.approx(float(values.mean()), rel=1e-14)
    loss = domain_mean(values.requires_grad_())
    assert float(domain_value(loss)) == loss.item()
    assert not domain_value(loss).requires_grad


def test_masked_nan_and_nothing_left() -> None:
    target = torch.tensor([[[1.0, math.nan], [3.0, 4.0]]])
    there = target.isfinite()
    prediction = torch.zeros(1, 2, 2, requires_grad=True)
    loss = domain_mean((prediction - target.nan_to_num()) ** 2, mask=there)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 9 + 16) / 3)
    assert prediction.grad.tolist() == [[[pytest.approx(-2 / 3), 0], [pytest.approx(-2), pytest.approx(-8 / 3)]]]
    assert domain_mean((prediction - target) ** 2, mask=there).item() == pytest.approx((1 + 9 + 16) / 3)
    assert domain_mean(target, mask=torch.zeros(2, 2, dtype=torch.bool)).isnan()


def test_mistakes_are_named_on_all_ranks() -> None:
    def rank_main(rank: int) -> None:
        initialize_domain_parallel(3, 3)
        values = rows_of(randn(2, 8, 5), UNEVEN, rank)
        with pytest.raises(
            ValueError, match=r"mse: on rank 1 weights must be of shape \(8,\) for all rows, or \(1,\) "
        ):
            domain_mean(values, weights=torch.ones(3 if rank == 1 else 8), label="mse")
        with pytest.raises(ValueError, match=r"rank 0, 2: weights of all rows, rows 4,1,3; rank 1: weights of its own"):
            domain_mean(values, weights=torch.ones(1 if rank == 1 else 8))
        with pytest.raises(
            ValueError, match=r"on rank 2 the mask must be of torch.bool and broadcast against this rank's"
        ):
            domain_mean(values, mask=torch.ones(8 if rank == 2 else 1, 5).bool())
        with pytest.raises(ValueError, match=r"on rank 0 the mask must be of torch.bool .* got torch.float32"):
            domain_mean(values, mask=torch.ones(5) if rank == 0 else torch.ones(5).bool())
        with pytest.raises(ValueError, match=r"the ranks disagree"):
            domain_mean(values[:, :, : 4 if rank == 1 else 5])
        with pytest.raises(ValueError, match=r"on rank 0 the tensor .* has 4 rows"):
            domain_mean(values, partition=RowPartition((3, 2, 3)))
        with pytest.raises(ValueError, match=r"got torch.float64 of shape \(\) \(reduction='none'"):
            domain_mean(values.mean())
        assert float(domain_value(domain_mean(values))) == pytest.approx(float(randn(2, 8, 5).mean())), "all is well"

    run_threads(rank_main, 3)
    with pytest.raises(ValueError, match=r"needs the floating-point loss"):
        domain_mean(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"domain_mean: weights must be of shape \(3,\)"):
        domain_mean(torch.ones(3, 4), weights=torch.ones(4))


# Latitude weights


@pytest.mark.parametrize("rows", [1, 2, 3, 180, 721])
@pytest.mark.parametrize("pole_is_row", [True, False])
def test_cells_are_the_areas_between_their_edges(rows: int, pole_is_row: bool) -> None:
    if rows == 1 and pole_is_row:
        return
    step = 180 / (rows - pole_is_row)
    edges = [90 - step * (row - (0.5 if pole_is_row else 0)) for row in range(rows + 1)]
    sines = [math.sin(math.radians(max(-90.0, min(90.0, edge)))) for edge in edges]
    wanted = torch.tensor([a - b for a, b in pairwise(sines)], dtype=torch.float64)
    weights = latitude_weights(rows, pole_is_row=pole_is_row)
    torch.testing.assert_close(weights, wanted / 2 * rows, rtol=1e-9, atol=0)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-14)
    assert float(weights.min()) > 0, "a row at a pole counts"


def test_latitudes_of_any_grid() -> None:
    latitudes = torch.tensor([80.0, 50.0, 10.0, -20.0, -85.0], dtype=torch.float64)
    sines = torch.sin(torch.deg2rad(torch.tensor([90.0, 65.0, 30.0, -5.0, -52.5, -90.0], dtype=torch.float64)))
    torch.testing.assert_close(latitude_weights(latitudes), -sines.diff() / 2 * 5)
    torch.testing.assert_close(latitude_weights(latitudes.flip(0)), latitude_weights(latitudes).flip(0))
    cosines = torch.cos(torch.deg2rad(latitudes))
    torch.testing.assert_close(cos_latitude_weights(latitudes), cosines)
    torch.testing.assert_close(latitude_weights(latitudes, "cos"), cosines / cosines.mean())


def test_cosine_and_cell_agree_where_rows_are_thin() -> None:
    cell, cosine = latitude_weights(720, pole_is_row=False), latitude_weights(720, "cos", pole_is_row=False)
    torch.testing.assert_close(cell, cosine, rtol=1e-5, atol=0)
    assert float(latitude_weights(721, "cos", pole_is_row=True)[0]) == pytest.approx(0, abs=1e-15)


def test_bad_latitudes() -> None:
    with pytest.raises(ValueError, match="kind must be 'cell' or 'cos'; got 'sin'"):
        latitude_weights(4, "sin", pole_is_row=True)
    with pytest.raises(ValueError, match="pole_is_row must be True or False where rows is a number"):
        latitude_weights(4)
    with pytest.raises(ValueError, match="left out where rows are latitudes"):
        latitude_weights(torch.ones(3), pole_is_row=True)
    with pytest.raises(ValueError, match="rows must be an integer >= 2 with pole_is_row=True"):
        latitude_weights(1, pole_is_row=True)
    with pytest.raises(ValueError, match="within -90 to 90"):
        cos_latitude_weights(torch.tensor([0.0, 91.0]))
    with pytest.raises(ValueError, match="within -90 to 90"):
        cos_latitude_weights(torch.tensor([math.nan]))
    for bad in ([10.0, 20.0, 15.0], [10.0, 10.0], []):
        with pytest.raises(ValueError, match="must be 1-D and in order"):
            latitude_weights(torch.tensor(bad))
