"""What the tests of partitioned models share: a model on the whole against the same model on many ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit_domain import PartitionReport, initialize_domain_parallel, partition_model, partition_report
from credit_domain.containers import tensors_in
from credit_domain.partitioner import partitioning
from credit_domain.partitioner.capture import Arguments, Captured, Ghost
from credit_domain.verification.compare import sharded_dim
from credit_halo.testing import run_threads
from credit_mesh import RowPartition


class SharedGhost:
    """One trace for all ranks, which are threads here: they would make the same one after another."""

    def __init__(self, model: nn.Module) -> None:
        self.ghost, self.captured = Ghost(model), dict[Any, Captured]()
        self.signature, self.presented = self.ghost.signature, self.ghost.presented

    def capture(self, arguments: Arguments, settings: Any) -> Captured:
        key = tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in arguments.tensors), repr(settings)
        if key not in self.captured:
            self.captured[key] = self.ghost.capture(arguments, settings)
        return self.captured[key]


def check_partitioned(
    model: nn.Module,
    inputs: Sequence[Tensor],
    sizes: tuple[int, ...],
    *,
    rtol: float = 1e-9,
    calls: int = 1,
) -> PartitionReport:
    """Outputs, input gradients, parameter gradients and buffers are those of one rank.

    Args:
        model: A model for one rank, in float64.
        inputs: Its arguments; those of three dims or more with as many rows as ``sizes`` have are sharded.
        sizes: Rows of each rank.
        rtol: The largest difference, relative to the largest entry of a tensor, or to 1.
        calls: How often it is called.

    Returns:
        The report of the first rank.
    """
    partition, ranks = RowPartition(sizes, allow_empty=True), len(sizes)
    divided = [x.ndim >= 3 and x.shape[-2] == partition.rows for x in inputs]
    plain = copy.deepcopy(model)
    for _ in range(calls):
        whole = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        plain.zero_grad()
        outs = [x for _, x in tensors_in(plain(*whole))]
    draw = torch.Generator().manual_seed(7)
    factors = [torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype) for out in outs]
    differentiable = [out.requires_grad for out in outs]
    loss_of(outs, factors, differentiable, [1.0] * len(outs)).backward()
    ghost = SharedGhost(copy.deepcopy(model))

    def rank_main(rank: int) -> Any:
        manager = initialize_domain_parallel(ranks, ranks)
        manager.declare(partition)
        mine = copy.deepcopy(model)
        examples = tuple(torch.empty_like(x, device="meta") for x in inputs)
        partition_model(mine, examples, manager)
        own = partition.interval(rank)
        for _ in range(calls):
            parts = [
                (x[..., own.start : own.stop, :] if rows else x).detach().clone().requires_grad_(x.is_floating_point())
                for x, rows in zip(inputs, divided, strict=True)
            ]
            mine.zero_grad()
            made = [x for _, x in tensors_in(mine(*parts))]
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, [tuple(out.shape) for out in made])
        dims = [sharded_dim(ref.shape, [told[at] for told in every], -2) for at, ref in enumerate(outs)]
        replicated = [dim is None for dim in dims]
        own_factors = []
        for at, (factor, dim) in enumerate(zip(factors, dims, strict=True)):
            if dim is not None:
                start = sum(told[at][dim] for told in every[:rank])
                factor = factor.narrow(dim, start, every[rank][at][dim])  # noqa: PLW2901
            own_factors.append(factor)
        scales = [1 / ranks if each else 1.0 for each in replicated]  # a replicated value counts once for each rank
        loss_of(made, own_factors, differentiable, scales).backward()
        return {
            "outs": [out.detach() for out in made],
            "dims": dims,
            "inputs": [x.grad for x in parts],
            "parameters": {name: p.grad for name, p in mine.named_parameters()},
            "buffers": {name: x.clone() for name, x in mine.named_buffers()},
            "report": partition_report(mine),
        }

    with mock.patch.object(partitioning, "Ghost", return_value=ghost):
        results = run_threads(rank_main, ranks)
    for at, out in enumerate(outs):
        parts = [result["outs"][at] for result in results]
        dim = results[0]["dims"][at]
        if dim is None:
            for part in parts:
                close(part, out.detach(), f"result {at}", rtol)
        else:
            close(torch.cat(parts, dim), out.detach(), f"result {at}", rtol)
    for at, x in enumerate(whole):
        grads = [result["inputs"][at] for result in results]
        if not x.requires_grad:
            continue
        if divided[at]:
            for rank, grad in enumerate(grads):
                own = partition.interval(rank)
                close(grad, None if x.grad is None else x.grad[..., own.start : own.stop, :], f"input {at}", rtol)
        else:
            close(total(grads), x.grad, f"input {at}", rtol)
    for name, parameter in plain.named_parameters():
        close(total([result["parameters"][name] for result in results]), parameter.grad, name, rtol)
    for name, buffer in plain.named_buffers():
        for result in results:
            close(result["buffers"][name], buffer, name, rtol)
    return results[0]["report"]


def loss_of(
    outs: Sequence[Tensor], factors: Sequence[Tensor], counts: Sequence[bool], scales: Sequence[float]
) -> Tensor:
    terms = [
        (torch.view_as_real(out) * torch.view_as_real(factor) if out.is_complex() else out * factor).sum() * scale
        for out, factor, count, scale in zip(outs, factors, counts, scales, strict=True)
        if count
    ]
    return torch.stack(terms).sum()


def total(grads: Sequence[Tensor | None]) -> Tensor | None:
    given = [grad for grad in grads if grad is not None]
    return torch.stack(given).sum(0) if given else None


def close(given: Tensor | None, wanted: Tensor | None, what: str, rtol: float) -> None:
    if given is None or wanted is None:
        there = wanted if given is None else given
        assert there is None or not there.any(), f"{what}: no gradient here, {there} there"
        return
    assert given.shape == wanted.shape, what
    assert given.dtype == wanted.dtype, what
    if given.numel():
        worst = (given - wanted).abs().max().item()
        assert worst <= rtol * max(1.0, wanted.abs().max().item()), f"{what}: differs by {worst}"
