"""Tests of the test: exchanges with one mistake each, which the dot test must catch on every rank."""

import pytest
import torch
from halo_reference import shard, whole_numbers
from torch import Tensor

from credit_halo import plan_halo, rows, transport
from credit_halo.ops import exchange
from credit_halo.testing import dot_test, run_threads
from credit_mesh import RowPartition

PARTITION = RowPartition((3, 2, 4, 2))


class Exchange(torch.autograd.Function):
    """An exchange whose backward is put together here, so that it can be put together wrongly."""

    @staticmethod
    def forward(ctx, x, plan, mutant):
        ctx.plan, ctx.mutant = plan, mutant
        return exchange(x, 2, plan.key, _world(), "mutant", False, False)

    @staticmethod
    def backward(ctx, grad):
        return backward(grad, ctx.plan, ctx.mutant), None, None


def _world() -> str:
    return torch.distributed.group.WORLD.group_name


def backward(grad: Tensor, plan, mutant: str) -> Tensor:
    flight = transport.start(grad, 2, plan, torch.distributed.group.WORLD, "mutant", adjoint=True)
    out = rows.collect_local(grad, 2, plan)
    received = flight.wait()
    if mutant == "trim only":
        return out
    if mutant == "off by one" and out.shape[2] > 1:
        out = out.roll(1, 2)
    pairs = list(zip(plan.sends, received, strict=True))
    if mutant == "swapped sides" and len(pairs) == 2:
        pairs = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])]
    for message, home in pairs:
        if mutant == "overwrite":
            out.index_copy_(2, torch.tensor(list(message.rows)), home)
        else:
            rows.add_returned(message, home, out, 2)
    return out


def sides(mutant: str) -> list[tuple[float, float]]:
    whole = whole_numbers((2, 2, PARTITION.rows, 4))

    def rank_main(rank: int) -> tuple[float, float]:
        plan = plan_halo(PARTITION, 1, 1, rank=rank)
        return dot_test(lambda t: Exchange.apply(t, plan, mutant), shard(whole, PARTITION, rank))

    return run_threads(rank_main, 4)


def test_without_a_mistake_both_sides_are_equal() -> None:
    assert all(left == right for left, right in sides("none"))


@pytest.mark.parametrize("mutant", ["trim only", "overwrite", "swapped sides", "off by one"])
def test_a_mistake_shows_on_every_rank(mutant: str) -> None:
    assert all(left != right for left, right in sides(mutant))
