"""Reductions of sharded rows are torch's of the whole: values, gradients and dtypes, for every partition and dims."""

from __future__ import annotations

import pytest
import torch
from domain_cases import cases, check, dims_of
from domain_reference import randn, shard
from hypothesis import given, settings
from hypothesis import strategies as st

from credit_domain.ops import rearranging as rows
from credit_domain.ops import reductions as reduce
from credit_domain.ops.padding import boundary
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

SHARED = (reduce.sum, reduce.mean, reduce.amax, reduce.amin, reduce.logsumexp, reduce.var, reduce.std)


@settings(max_examples=120)
@given(st.data(), cases(), st.sampled_from(SHARED))
def test_reductions(data, case, op):
    whole, partition, dim, declare = case
    if op in (reduce.amax, reduce.amin):  # with many that are equal
        whole = whole.round()
    plain = getattr(torch, op.__name__)
    keepdim, every = data.draw(st.booleans()), data.draw(st.integers(0, 3)) == 0
    dims = None if every else dims_of(data.draw, whole.ndim)
    named = range(whole.ndim) if every else [d % whole.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    replicated = dim % whole.ndim in named
    keepdim = keepdim or not replicated
    more = {"keepdim": keepdim}
    if op in (reduce.var, reduce.std):
        entries = torch.tensor([whole.shape[d] for d in named]).prod()
        more["correction"] = data.draw(st.integers(0, min(2, int(entries) - 1)))
    given_partition = partition if data.draw(st.booleans()) else None
    check(
        lambda x: plain(x, tuple(named), **more),
        lambda x: op(x, dims, dim=dim, partition=given_partition, **more),
        *(whole, partition, dim),
        replicated=replicated,
        declare=declare,
    )


@settings(max_examples=30)
@given(st.data(), cases())
def test_softmax(data, case):
    whole, partition, dim, declare = case
    along = data.draw(st.integers(-whole.ndim, whole.ndim - 1))
    whole = whole * 100 + 1000
    if data.draw(st.booleans()):
        whole = whole.masked_fill(randn(*whole.shape, seed=3) > 0.5, -torch.inf)
        whole.select(along, 0).fill_(-700.0)
    check(
        lambda x: torch.softmax(x, along),
        lambda x: reduce.softmax(x, along, dim=dim),
        *(whole, partition, dim),
        target=partition,
        declare=declare,
    )


def on_ranks(partition, function, whole, dim=-2):
    """What a function gives on each rank."""

    def rank_main(rank):
        initialize_domain_parallel(partition.ranks, partition.ranks)
        return function(shard(whole, partition, rank, dim).clone())

    return run_threads(rank_main, partition.ranks)


UNEVEN = RowPartition((5, 0, 1, 11), allow_empty=True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16])
def test_dtypes_are_torchs(dtype):
    whole = (randn(3, 17, 6) * 50).to(dtype)
    asked = [{}, {"dtype": torch.float32}, {"dtype": torch.int16}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}]
    if not whole.is_floating_point():
        asked += [{"dtype": torch.uint8}]
    calls = [(reduce.sum, more) for more in asked] + [(reduce.amax, {}), (reduce.amin, {})]
    calls += [(reduce.mean, more) for more in asked if more.get("dtype", dtype).is_floating_point]
    if dtype.is_floating_point:
        calls += [(reduce.var, {}), (reduce.std, {}), (reduce.logsumexp, {})]
    for op, more in calls:
        expected = getattr(torch, op.__name__)(whole, (-2, 0), **more)
        for out in on_ranks(UNEVEN, lambda x, op=op, more=more: op(x, (-2, 0), **more), whole):
            torch.testing.assert_close(out, expected)


def test_float32_loses_nothing_far_from_zero():
    whole = (randn(4, 500, 40) + 1000).float()
    partition = RowPartition((300, 1, 0, 199), allow_empty=True)
    for var, mean in on_ranks(partition, reduce.var_mean, whole):
        torch.testing.assert_close(var.double(), whole.double().var(), rtol=1e-6, atol=0)
        torch.testing.assert_close(mean.double(), whole.double().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["sum", "mean", "amax", "amin", "logsumexp", "var", "std"])
def test_numbers_that_are_none(odd, name):
    whole = randn(3, 17, 2)
    whole[0, 3, 0] = whole[1, 16, 1] = whole[2, :] = odd
    op, plain, factor = getattr(reduce, name), getattr(torch, name), randn(3, 2, seed=1)
    x = whole.clone().requires_grad_()
    expected = plain(x, -2)
    (expected * factor).sum().backward()

    def value_and_gradient(own):
        out = op(own.requires_grad_(), -2)
        (out * factor / 4).sum().backward()
        return out.detach(), own.grad

    results = on_ranks(UNEVEN, value_and_gradient, whole)
    for out, _ in results:
        torch.testing.assert_close(out, expected.detach(), equal_nan=True)
    if name in ("sum", "mean", "amax", "amin"):  # of the others torch's own makes no sense there
        torch.testing.assert_close(torch.cat([grad for _, grad in results], -2), x.grad, equal_nan=True)


def test_gradient_of_the_gradient():
    partition, whole, factor = RowPartition((2, 3, 1)), randn(6, 2), randn(6, 2, seed=1)

    def penalty(x, dims, average, most, factor):
        out = (average(x.sin(), -2) + most(x.square(), -2)).square().sum() / dims
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return (gradient * factor).sum()

    x = whole.clone().requires_grad_()
    penalty(x, 1, torch.mean, torch.amax, factor).backward()

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        own = shard(whole, partition, rank).clone().requires_grad_()
        penalty(own, 3, reduce.mean, reduce.amax, shard(factor, partition, rank)).backward()
        return own.grad

    torch.testing.assert_close(torch.cat(run_threads(rank_main, 3)), x.grad)


def test_autocast_gives_torchs_dtypes():
    whole = randn(3, 17, 6).bfloat16()
    for op in (reduce.sum, reduce.mean, reduce.amax, reduce.var, reduce.logsumexp):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = getattr(torch, op.__name__)(whole, (-2,))

        def under_autocast(x, op=op):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return op(x, -2)

        for out in on_ranks(UNEVEN, under_autocast, whole):
            torch.testing.assert_close(out, expected)


def test_mistakes_are_named():
    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = torch.ones(2, 1 + rank, 3)
        with pytest.raises(ValueError, match="total: dims=.* names a dim twice"):
            reduce.sum(x, (1, -2), label="total")
        with pytest.raises(ValueError, match="mean: expected a real floating-point dtype; got torch.int64"):
            reduce.mean(x.long())
        with pytest.raises(ValueError, match="var: expected a real floating-point dtype; got torch.complex64"):
            reduce.var(x + 0j)
        with pytest.raises(ValueError, match="amax: a tensor of shape .* has no extreme over dims"):
            reduce.amax(x[..., :0])
        with pytest.raises(ValueError, match="sum: on rank 0 the tensor .* says 2; on rank 1 .*; on rank 2"):
            reduce.sum(x, partition=RowPartition((2, 1, 4)))

    run_threads(rank_main, 3)


def test_complex_numbers():
    whole = torch.complex(randn(3, 17, 2), randn(3, 17, 2, seed=1))
    for op in (reduce.sum, reduce.mean):
        for out in on_ranks(UNEVEN, lambda x, op=op: op(x, -2), whole):
            torch.testing.assert_close(out, getattr(torch, op.__name__)(whole, -2))


def several(x):
    x = rows.roll(x, (3, 1), (-2, -1))
    partition = rows.partition_of(x)
    every_third = [range(first, partition.rows, 3) for first in range(3)]
    y = rows.regroup(rows.flip(x, (0, -2)), every_third).tanh()
    x = x + rows.regroup_back(y, every_third, partition)
    x = boundary.pad_boundary(x, (2, 1), (1, 3), signs=(1, -1))
    x = rows.repartition(x, RowPartition.even(partition.rows + 3, 3)).cos()
    x = boundary.unpad_boundary(x, (2, 1), (1, 3))
    x = x - reduce.mean(x, (0, -2), True) + reduce.amax(x) * reduce.std(x, -2, keepdim=True)
    return reduce.softmax(x, -2) * reduce.logsumexp(x, -2, True) + reduce.sum(x) * reduce.amin(x, 1, True)


def compiled_and_not(rank):
    partition = RowPartition((4, 2, 6))
    initialize_domain_parallel(3, 3).declare(partition)
    x = randn(2, 2, partition.sizes[rank], 6, seed=rank).requires_grad_()
    expected, out = several(x), torch.compile(several, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected)
    factor = randn(*out.shape, seed=9)
    gradients = [torch.autograd.grad((y * factor).sum(), x)[0] for y in (expected, out)]
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compiled_code():
    run_processes(compiled_and_not, 3, timeout=900)
