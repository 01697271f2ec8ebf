"""What the tests of this package share: a layer on the whole tensor against its converted self on many ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from credit_domain.manager import DomainParallelManager, initialize_domain_parallel
from credit_halo.testing import run_threads
from credit_mesh import RowPartition

HEIGHTS = (17, 33, 34, 41, 181, 241)


@st.composite
def partitions(draw: st.DrawFn, rows: st.SearchStrategy[int] | None = None, most: int = 6) -> RowPartition:
    """Any partition of small or odd heights over 1 to 6 ranks, each with a row at least."""
    height = draw(st.integers(1, 24) | st.sampled_from(HEIGHTS[:4]) if rows is None else rows)
    ranks = draw(st.integers(1, min(most, height)))
    cuts = draw(st.sets(st.integers(1, height - 1), min_size=ranks - 1, max_size=ranks - 1)) if ranks > 1 else set()
    return RowPartition(tuple(b - a for a, b in pairwise([0, *sorted(cuts), height])))


def shard(x: Tensor, partition: RowPartition, rank: int, dim: int = -2) -> Tensor:
    own = partition.interval(rank)
    return x.narrow(dim, own.start, len(own))


def random_like(x: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def check_layer(
    module: nn.Module,
    convert: Callable[[nn.Module], nn.Module],
    whole: Tensor,
    partition: RowPartition,
    dim: int = -2,
    *,
    target: RowPartition | None = None,
    replicated: bool = False,
    calls: int = 2,
    declare: bool = True,
    rtol: float = 1e-9,
    atol: float = 1e-10,
) -> None:
    """Outputs, input gradients, parameter gradients and buffers of a converted layer are those of the whole.

    Args:
        module: The torch layer, in float64.
        convert: Makes the converted layer of a copy of it.
        whole: Input of all ranks.
        partition: How its rows are divided.
        dim: The sharded dim.
        target: Partition of the output, where the test knows it; it is seen from the ranks' outputs otherwise.
        replicated: The output is the same on every rank, and counts once for each.
        calls: How often the layer is called; gradients are those of the last call.
        declare: Declare the partition on the manager.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """
    reference = copy.deepcopy(module)
    for _ in range(calls):
        x = whole.clone().requires_grad_(whole.is_floating_point())
        reference.zero_grad()
        out = reference(x)
    factor = random_like(out)
    scale = partition.ranks if replicated else 1
    (out * factor).sum().mul(scale).backward()

    def forward(rank: int, manager: DomainParallelManager) -> tuple[Any, ...]:
        layer = convert(copy.deepcopy(module))
        assert list(layer.state_dict()) == list(reference.state_dict())
        for _ in range(calls):
            part = shard(whole, partition, rank, dim).clone().requires_grad_(whole.is_floating_point())
            layer.zero_grad()
            result = layer(part)
        return layer, part, result

    sizes: dict[int, int] = {}

    def rank_main(rank: int) -> dict[str, Any]:
        manager = initialize_domain_parallel(partition.ranks, partition.ranks)
        if declare:
            manager.declare(partition)
        layer, part, result = forward(rank, manager)
        if replicated:
            own = factor
        else:
            sizes[rank] = result.shape[dim]
            torch.distributed.barrier()
            own = shard(
                factor, RowPartition(tuple(sizes[r] for r in range(partition.ranks)), allow_empty=True), rank, dim
            )
        (result * own).sum().backward()
        return {
            "out": result.detach(),
            "input": part.grad,
            "parameters": {name: p.grad for name, p in layer.named_parameters()},
            "buffers": dict(layer.named_buffers()),
        }

    results = run_threads(rank_main, partition.ranks)
    if target is not None:
        assert [result["out"].shape[dim] for result in results] == list(target.sizes)
    close = {"rtol": rtol, "atol": atol}
    outs = [result["out"] for result in results]
    if replicated:
        for each in outs:
            torch.testing.assert_close(each, out.detach(), **close)
    else:
        torch.testing.assert_close(torch.cat(outs, dim), out.detach(), **close)
    torch.testing.assert_close(torch.cat([result["input"] for result in results], dim), x.grad, **close)
    for name, parameter in reference.named_parameters():
        total = sum(result["parameters"][name] for result in results)
        torch.testing.assert_close(total, parameter.grad, **close, msg=lambda text, name=name: f"{name}: {text}")
    for result in results:
        for name, buffer in reference.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, **close)
