"""Small collectives on gloo are only taken for what they are: never a wrong number, never the end of the process."""

from __future__ import annotations

import pytest
import torch

from credit_halo import ExchangeError, all_sum, broadcast, tagged
from credit_halo.testing import run_processes

SHAPES = {"small": 4, "large": 5000}


def of_another_size(rank, kind, odd):
    """Right steps at two sizes, then rank 1 takes the other size; what each rank is told."""
    call = {"sum": all_sum, "broadcast": broadcast}[kind]
    sizes = [SHAPES[odd], next(size for name, size in SHAPES.items() if name != odd)]
    for size in sizes * 2:
        got = call(torch.full((size,), float(rank + 1)))
        assert torch.equal(got, torch.full((size,), 6.0 if kind == "sum" else 1.0))
    try:
        for size in sizes if rank == 1 else sizes[::-1]:
            call(torch.full((size,), float(rank + 1)))
    except ExchangeError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("odd", SHAPES)
@pytest.mark.parametrize("kind", ["sum", "broadcast"])
def test_another_number_of_bytes_is_an_error_of_ours(kind, odd):
    told = run_processes(of_another_size, 3, kind, odd, timeout=600, group_timeout=3)
    assert all("failed on rank" in message for message in told)


def same_bits(rank):
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    small = all_sum(x)
    large = all_sum(torch.ones(tagged.MOST_BYTES // 4 + 1))
    halves = all_sum(torch.full((2, 0), 1.0)), all_sum(torch.tensor(1 + 2j)), broadcast(torch.tensor(rank > 0), 1)
    return small, float(large.sum()), halves[0].shape, complex(halves[1]), bool(halves[2])


def test_every_rank_has_the_same_bits():
    first, *others = run_processes(same_bits, 3)
    assert first[1:] == (3.0 * (tagged.MOST_BYTES // 4 + 1), (2, 0), 3 + 6j, True)
    for other in others:
        assert torch.equal(other[0], first[0])
        assert other[1:] == first[1:]
