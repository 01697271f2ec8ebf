"""What a halo convolution costs a rank on a GPU, beside the plain convolution on the same rows; skipped without one.

The halo convolution is the one that converted layers run: interior, borders and the gradients of both. The rank gives
itself the halo, as where longitude wraps around: there is one GPU, and nothing travels, so what is measured is what a
rank computes and copies. Both convolutions keep as many rows as they get. Each repetition times one after the other,
forward and backward, between events on the stream. `ratio` is the median over the repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, Placed, step_for
from credit_domain.extend import Domain
from credit_domain.ops.conv.borders import borders_of
from credit_domain.ops.conv.convolution import Convolution
from credit_domain.ops.conv.overlap import Shape, overlapped
from credit_halo.testing import run_processes
from credit_mesh import RowPartition

GOAL = 1.03
KINDS = ("plain", "halo")
ROWS, WIDTH = 181, 1440  # a quarter of 0.25 degrees


def wrapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as a halo convolution, by a padded copy."""
    return F.conv2d(F.pad(x, (0, 0, 1, 1), mode="circular"), weight, bias, padding=(0, 1))


def halo_convolution(rows: int, group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """A 3x3 convolution whose halo comes from the other end of the same rows, in the group of a single rank."""
    op, partition = Convolution(3, 1, 1, 1, 1, "circular"), RowPartition((rows,))
    borders = borders_of(op, op.footprint(partition), 0)
    assert borders is not None
    assert len(borders.borders) == 2
    step = step_for(op, partition.sizes, 0, "conv")
    domain = Domain(group.group_name, 0, 1, "")
    placed = Placed(-2, domain, partition.sizes, step, Call(-2, partition, None, "halo convolution"))
    shape = Shape((1, 1), (0, 1), (1, 1), False, (0, 0), 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = overlapped(op, x, weight, bias, placed, shape, wrapped, None)
        assert out is not None
        return out

    return run


def tensors(channels: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Input, weight, bias, and the gradient of the output, channels last."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    inputs = [randn(1, channels, rows, width), randn(channels, channels, 3, 3) / channels, randn(channels)]
    return [*(x.requires_grad_() for x in inputs), randn(1, channels, rows, width)]


def step(layer: Callable[..., Tensor], data: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a forward and backward."""
    *inputs, grad = data
    out = layer(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def milliseconds(action: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            action()
        return 1e3 * (time.perf_counter() - started) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls


def on_rank(
    rank: int, device_type: str, channels: int, rows: int, width: int, dtype: torch.dtype, repetitions: int
) -> dict:
    device = torch.device(device_type)
    torch.backends.cudnn.benchmark = True
    group = dist.new_group([0], backend="nccl") if device_type == "cuda" else dist.group.WORLD
    data = tensors(channels, rows, width, dtype, device)
    actions = {
        "plain": partial(step, partial(F.conv2d, padding=1), data),
        "halo": partial(step, halo_convolution(rows, group), data),
    }
    for action in actions.values():  # the first use is not what is measured
        action()
        action()
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repetitions):
        for kind in KINDS:
            times[kind].append(milliseconds(actions[kind], device, calls=5))
    return times


def summary(channels: int, rows: int, width: int, dtype: torch.dtype, times: dict[str, list[float]]) -> dict:
    ratios = [a / b for a, b in zip(times["halo"], times["plain"], strict=True)]
    result = {"channels": channels, "rows": rows, "width": width, "dtype": str(dtype).removeprefix("torch.")}
    result["milliseconds"] = {kind: median(each) for kind, each in times.items()}
    return result | {"ratio": dict(zip(("lower", "median", "upper"), quantiles(ratios, n=4), strict=True))}


def line(result: dict) -> str:
    ms, q = result["milliseconds"], result["ratio"]
    return (
        f"{result['channels']:>8}{result['rows']:>8} x {result['width']:<5}  {result['dtype']:<10}"
        f"{ms['plain']:>10.3f}{ms['halo']:>10.3f}  {q['median']:.3f} ({q['lower']:.3f}-{q['upper']:.3f})"
    )


def run(*, quick: bool, device: str = "cuda") -> list[dict] | dict[str, str]:
    """Measure, print a table, and return its rows; where there is no GPU, say so."""
    print(f"\nhalo convolution on a GPU, forward and backward, channels last; goal: at most {GOAL} of the plain one")
    if device == "cuda" and not torch.cuda.is_available():
        reason = "no GPU: torch.cuda.is_available() is False"
        print(f"skipped: {reason}", flush=True)
        return {"skipped": reason}
    print(f"{'channels':>8}{'rows x columns':>16}  {'dtype':<10}{'plain ms':>10}{'halo ms':>10}  ratio (quartiles)")
    rows, width = (ROWS, WIDTH) if device == "cuda" else (12, 16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (64,) if quick else (64, 128, 256, 512):
            args = (device, channels, rows, width, dtype, 3 if quick else 15)
            (times,) = run_processes(on_rank, 1, *args, timeout=300)
            results.append(summary(channels, rows, width, dtype, times))
            print(line(results[-1]), flush=True)
    return results
