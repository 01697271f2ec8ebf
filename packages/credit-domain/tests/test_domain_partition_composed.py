"""FSDP2, DDP, activation checkpoints and torch.compile around a partitioned model, and hooks that make weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from credit_domain import initialize_domain_parallel, partition_model
from credit_halo.testing import run_processes
from credit_mesh import RowPartition

SIZES = (5, 3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm(self.conv(x))).movedim(1, -1)
        return x + self.mix(y).movedim(-1, 1)


class Model(nn.Module):
    """Blocks between a padding and a crop; ``recompute`` puts checkpoints around them."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.first, self.last = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.first(x), (1, 1, 1, 1))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.last(x[..., 1:-1, 1:-1])


def wrapped(model: nn.Module) -> nn.Module:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = checkpoint_wrapper(block)
    return model


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (len(SIZES),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def run_composed(rank: int, how: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = Model(how == "recomputed by the model").double()
    whole = torch.randn(1, 2, 12, 8, dtype=torch.float64).requires_grad_()
    out = plain(whole)
    factor = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * factor).sum().backward()
    manager, partition = initialize_domain_parallel(len(SIZES), len(SIZES)), RowPartition(SIZES)
    manager.declare(partition)
    rows = slice(partition.interval(rank).start, partition.interval(rank).stop)
    model: Any = copy.deepcopy(plain)
    model.zero_grad()
    if how == "wrapped before":
        wrapped(model)
    partition_model(model, (1, 2, 12, 8), manager)
    around = {
        "wrapped after": wrapped,
        "FSDP2": sharded,
        "FSDP2 of wrapped blocks": lambda model: sharded(wrapped(model)),
        "DDP": nn.parallel.DistributedDataParallel,
        "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    }
    calls: list[int] = []
    next(module for name, module in model.named_modules() if name.endswith("conv")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    model = around.get(how, lambda model: model)(model)
    for _ in range(2):
        calls.clear()
        model.zero_grad()
        part = whole.detach()[:, :, rows].clone().requires_grad_()
        made = model(part)
        (made * factor[:, :, rows]).sum().backward()
    assert len(calls) == (2 if "wrapped" in how or "recomputed" in how else 1) or how == "compiled"
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(made, out[:, :, rows], **close)
    torch.testing.assert_close(part.grad, whole.grad[:, :, rows], **close)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        for added in ("_checkpoint_wrapped_module.", "module.", "_orig_mod."):
            name = name.replace(added, "")  # noqa: PLW2901
        grad = parameter.grad
        if how.startswith("FSDP2"):
            grad = grad.full_tensor()
        elif how == "DDP":
            grad = grad * len(SIZES)
        else:
            dist.all_reduce(grad)
        torch.testing.assert_close(grad, wanted[name].grad, **close)


@pytest.mark.parametrize(
    "how",
    [
        "wrapped before",
        "wrapped after",
        "recomputed by the model",
        "FSDP2",
        "FSDP2 of wrapped blocks",
        "DDP",
        "compiled",
    ],
)
def test_around_a_partitioned_model(how: str) -> None:
    run_processes(run_composed, len(SIZES), how, fork=True)
