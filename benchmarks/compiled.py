"""Blocks of the example models through torch.compile, each as one graph, against the same blocks as they are.

Each layout has one model. Inductor compiles its blocks, which takes a minute or so for each layout; in a quick run,
whose ratio says nothing, only aot_eager does. Each repetition times a forward and backward with the compiled blocks and
one without, one after the other, and lasts as long as its slowest rank took. `compiled/eager` is the median over the
repetitions of the ratio within one; below 1 compiled blocks are faster. `difference` is the largest of outputs, input
gradients and parameter gradients, relative to the largest value of what is compared; it must be at most 1e-5.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, quantiles

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit_halo.testing import run_processes
from credit_parallel import ParallelContext, parallelize
from credit_parallel.app.examples.transformer import Transformer
from credit_parallel.app.examples.unet import UNet
from credit_parallel.blocks import blocks_of

TOLERANCE = 1e-5
BACKEND = {False: "inductor", True: "aot_eager"}
"""By whether the run is a quick one."""
LAYOUTS = {
    "domain": (2, {"domain": 2}),
    "fsdp2 x domain": (2, {"data": "fsdp2", "domain": 2}),
    "tensor x domain": (4, {"tensor": 2, "domain": 2}),
    "fsdp2 x tensor x domain": (4, {"data": "fsdp2", "tensor": 2, "domain": 2}),
}


def build(name: str, quick: bool) -> nn.Module:
    torch.manual_seed(0)
    if name == "unet":
        model = UNet(4, 4, width=16 if quick else 32, levels=1)
    else:
        model = Transformer(4, 4, width=16 if quick else 64, depths=(1 if quick else 2,), heads=(4,))
    for parameter in model.head.parameters():  # which starts as zeros, and would hide what comes before it
        nn.init.normal_(parameter, std=0.1)
    return model


@contextmanager
def as_they_are(blocks: list[nn.Module]) -> Iterator[None]:
    """Blocks without what was compiled, which is an attribute of each that hides its class's forward."""
    compiled = [block.__dict__.pop("forward") for block in blocks]
    try:
        yield
    finally:
        for block, forward in zip(blocks, compiled, strict=True):
            block.forward = forward


def largest(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of each tensor, on whichever ranks it lies."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    found = torch.stack([part.abs().max() if part.numel() else torch.zeros(()) for part in parts])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def step(context: ParallelContext, x: Tensor, grad: Tensor) -> list[Tensor]:
    """What a step computes: output, input gradient, parameter gradients."""
    context.model.zero_grad()
    x.grad = None
    out = context.model(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in context.model.parameters() if p.grad is not None)]


def on_rank(rank: int, name: str, parallelism: dict, height: int, width: int, quick: bool, repetitions: int) -> dict:
    context = parallelize(build(name, quick), {"trainer": {"parallelism": parallelism}})
    torch.manual_seed(1)
    x = context.shard(torch.randn(1, 4, height, width)).requires_grad_()
    grad = context.shard(torch.randn(1, 4, height, width))
    blocks = list(blocks_of(context.model, {}).values())
    for block in blocks:  # what FSDP2 does around a block stays outside of the compiled code
        block.forward = torch.compile(block.forward, fullgraph=True, backend=BACKEND[quick])

    def eager() -> list[Tensor]:
        with as_they_are(blocks):
            return step(context, x, grad)

    started = time.perf_counter()
    compiled = [tensor.clone() for tensor in step(context, x, grad)]
    compiling = time.perf_counter() - started
    expected = [tensor.clone() for tensor in eager()]
    errors = [found - right for found, right in zip(compiled, expected, strict=True)]
    difference = (largest(errors) / largest(expected)).max().item()
    seconds: dict[str, list[float]] = {"compiled": [], "eager": []}
    for _ in range(repetitions):
        for kind, action in {"compiled": lambda: step(context, x, grad), "eager": eager}.items():
            dist.barrier()
            started = time.perf_counter()
            action()
            seconds[kind].append(time.perf_counter() - started)
    return {"seconds": seconds, "difference": difference, "compiling": compiling, "blocks": len(blocks)}


def summary(name: str, layout: str, height: int, width: int, answers: list[dict]) -> dict:
    slowest = {
        kind: [max(times) for times in zip(*(a["seconds"][kind] for a in answers), strict=True)]
        for kind in ("compiled", "eager")
    }
    ratios = [a / b for a, b in zip(slowest["compiled"], slowest["eager"], strict=True)]
    result = {"model": name, "layout": layout, "ranks": len(answers), "height": height, "width": width}
    result |= {"blocks": answers[0]["blocks"], "difference": max(answer["difference"] for answer in answers)}
    result |= {"first_step_seconds": max(answer["compiling"] for answer in answers)}
    result["milliseconds"] = {kind: 1e3 * median(times) for kind, times in slowest.items()}
    result["compiled_over_eager"] = dict(zip(("lower", "median", "upper"), quantiles(ratios, n=4), strict=True))
    return result


def line(result: dict) -> str:
    ms, q = result["milliseconds"], result["compiled_over_eager"]
    ratio = f"{q['median']:.2f} ({q['lower']:.2f}-{q['upper']:.2f})"
    return (
        f"{result['model']:<12}{result['layout']:<24}{result['ranks']:>5}{result['height']:>5} x {result['width']:<5}"
        f"{result['blocks']:>6}{ms['compiled']:>10.1f}{ms['eager']:>10.1f}  {ratio:<18}"
        f"{result['difference']:>9.0e}{result['first_step_seconds']:>9.1f}"
    )


def run(*, quick: bool) -> list[dict]:
    """Measure, print a table, and return its rows."""
    height, width, repetitions = (17, 16, 3) if quick else (129, 256, 15)
    print(f"\nblocks compiled by {BACKEND[quick]}, fullgraph: ms of a step; ratio: median (quartiles); first step in s")
    print(
        f"{'model':<12}{'layout':<24}{'ranks':>5}{'rows x columns':>14}{'blocks':>5}{'compiled':>10}{'eager':>10}  "
        f"{'compiled/eager':<18}{'difference':>9}{'first s':>8}"
    )
    results = []
    for name in ("unet", "transformer"):
        for layout, (ranks, parallelism) in LAYOUTS.items():
            if ("tensor" in parallelism and name == "unet") or (quick and (name, layout) != ("transformer", "domain")):
                continue  # the UNet has no tensor-parallel blocks
            args = (name, parallelism, height, width, quick, repetitions)
            answers = run_processes(on_rank, ranks, *args, timeout=900.0, group_timeout=600.0)
            results.append(summary(name, layout, height, width, answers))
            print(line(results[-1]), flush=True)
    return results
