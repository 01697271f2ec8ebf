"""Tensor parallelism of a model that is partitioned operation by operation: its rows and its channels are divided."""

from __future__ import annotations

import pytest
import torch
from tensor_blocks import CHANNELS, CONV, LINEAR, build, randn
from torch import Tensor
from torch.distributed.tensor import DTensor

from credit_halo.testing import run_processes
from credit_parallel import parallelize
from credit_parallel.domain import is_partitioned
from credit_parallel.tensor_parallel import _is_tp_sharded_param

ROWS = 9
BLOCKS = {kind.__name__: kind for kind in (*LINEAR, *CONV)}


def shapes(name: str) -> tuple[tuple[int, ...], int]:
    """Of the input, and the dim of its rows: channels come last for linear layers."""
    return ((2, CHANNELS, ROWS, 5), -2) if BLOCKS[name] in CONV else ((2, ROWS, 5, CHANNELS), -3)


def rank_main(rank: int, name: str, tensor: int, domain: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    shape, dim = shapes(name)
    conf = {"trainer": {"parallelism": {"tensor": tensor, "domain": domain, "partition": "graph"}}}
    model = build(BLOCKS[name], BLOCKS[name])
    context = parallelize(model, conf, shard_dim=dim, input_shape=shape, check_batches=0)
    assert is_partitioned(context.model)
    assert any(map(_is_tp_sharded_param, context.model.parameters()))
    for _ in range(2):
        context.model.zero_grad()
        x = context.shard(randn(*shape)).clone().requires_grad_()
        out = context.model(x)
        (out * context.shard(randn(*shape, seed=2))).sum().backward()
    grads = {n: p.grad for n, p in context.model.named_parameters()}
    assert x.grad is not None
    return out.detach(), x.grad, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_declaration(name: str) -> None:
    tensor, domain = (2, 2) if sorted(BLOCKS).index(name) % 2 else (2, 3)
    shape, dim = shapes(name)
    model, x = build(BLOCKS[name], BLOCKS[name]), randn(*shape).requires_grad_()
    out = model(x)
    (out * randn(*shape, seed=2)).sum().backward()
    parts = run_processes(rank_main, tensor * domain, name, tensor, domain, fork=True)
    close = {"rtol": 1e-9, "atol": 1e-10}
    for t in range(tensor):
        mine = parts[t * domain : (t + 1) * domain]  # domain is the innermost axis
        torch.testing.assert_close(torch.cat([part[0] for part in mine], dim), out.detach(), **close)
        torch.testing.assert_close(torch.cat([part[1] for part in mine], dim), x.grad, **close)
        for n, p in model.named_parameters():
            torch.testing.assert_close(
                sum(part[2][n] for part in mine), p.grad, **close, msg=lambda m, n=n: f"{n}: {m}"
            )
