"""Nets on sharded rows against the limit: the same net on the local rows alone, without communication.

Each repetition times, one after the other and each forward and backward on all ranks at once, the `limit` and the
`domain` net, and lasts as long as its slowest rank took. The ratio is that of the medians over the repetitions. Kept
for the backward is what autograd saves, each storage once, parameters left out. Messages are those of one step of the
domain net on the rank that sends the most.

`graph` is the time of the same net partitioned operator by operator (`partition_model`), divided by that of the
converted net; the `kept` beside it likewise. Every other repetition runs them in the opposite order. The goal for
`graph` is 1.03.

With `--delay` the domain net is timed once more with every message of rows held back by so many milliseconds after it
was posted; `shown` is by how much of all the delays of a rank, one for each exchange, that makes the step longer.

    python -m benchmarks.nets --json nets.json
    python -m benchmarks.nets --nets chain --sizes 512x1024 --delay 10
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.traffic import recorded
from credit_domain import convert_to_domain_parallel, initialize_domain_parallel, partition_model
from credit_halo.testing import run_processes
from credit_mesh import RowPartition
from credit_parallel.app.examples.transformer import Transformer

SIZES = ((256, 512), (512, 1024))


def chain(channels: int = 16, layers: int = 9) -> nn.Module:
    """3x3 convolutions one after the other."""
    return nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)))


class UNet(nn.Module):
    """Two levels: GroupNorm, a strided and a transposed convolution, a skip connection."""

    def __init__(self, channels: int = 16):
        super().__init__()

        def block(before, after, **more):
            conv = nn.Conv2d(before, after, 3, padding=1, **more)
            return nn.Sequential(conv, nn.GroupNorm(4, after), nn.SiLU())

        self.first = block(channels, channels)
        self.down = block(channels, 2 * channels, stride=2)
        self.middle = block(2 * channels, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1)
        self.last = block(2 * channels, channels)
        self.head = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.up(self.middle(self.down(skip)))
        return self.head(self.last(torch.cat([skip, x], 1)))


class Embedding(nn.Module):
    """Four kernels over one tensor, as in a CrossFormer, and the way back by patches."""

    def __init__(self, channels: int = 16, stride: int = 4):
        super().__init__()
        kernels = (stride, 2 * stride, 4 * stride, 8 * stride)
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels // 4, kernel, stride, (kernel - stride) // 2) for kernel in kernels
        )
        self.back = nn.ConvTranspose2d(channels, channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.cat([branch(x) for branch in self.branches], 1))


def transformer(channels: int = 16) -> nn.Module:
    """The example of credit-parallel: two stages of shifted windows."""
    return Transformer(channels, channels, width=channels, heads=(2, 4))


NETS = {"chain": chain, "unet": UNet, "embedding": Embedding, "transformer": transformer}


# On each rank


def step(net: nn.Module, x: Tensor, grad: Tensor) -> None:
    net(x).backward(grad)
    net.zero_grad()
    x.grad = None


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """What autograd keeps of activations between forward and backward."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    del out
    return sum(seen.values())


class Late:
    """A message that is complete no sooner than at a time."""

    def __init__(self, work: dist.Work, at: float):
        self.work, self.at = work, at

    def wait(self) -> bool:
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return self.work.wait()


@contextmanager
def delayed(seconds: float):
    """Hold every batch of messages back; yields a list that grows by one for each."""
    batch, batches = dist.batch_isend_irecv, []

    def late(ops):
        batches.append(len(ops))
        at = time.perf_counter() + seconds
        return [Late(work, at) for work in batch(ops)]

    with mock.patch.object(dist, "batch_isend_irecv", late):
        yield batches


def on_rank(rank: int, ranks: int, name: str, height: int, width: int, repetitions: int, delay: float) -> dict:
    torch.manual_seed(0)
    limit = NETS[name]()
    manager = initialize_domain_parallel(ranks, ranks)
    net = convert_to_domain_parallel(copy.deepcopy(limit), manager)
    partition = RowPartition.even(height, ranks, manager.granularity or 1)
    manager.declare(partition)
    x = torch.randn(1, 16, partition.sizes[rank], width)
    grad = torch.randn(1, 16, partition.sizes[rank], width)
    whole = torch.empty(1, 16, height, width, device="meta", requires_grad=True)
    graph = partition_model(copy.deepcopy(limit), whole, manager)
    nets = {"limit": limit, "domain": net, "graph": graph}
    inputs = {kind: x.clone().requires_grad_() for kind in nets}  # readers of one tensor look for each other
    if delay:
        nets["delayed"], inputs["delayed"] = net, inputs["domain"]
    seconds: dict[str, list[float]] = {kind: [] for kind in nets}
    for repetition in range(repetitions + 2):
        for kind, each in [*nets.items()][:: -1 if repetition % 2 else 1]:
            with delayed(delay) if kind == "delayed" else nullcontext([]) as batches:
                dist.barrier()
                start = time.perf_counter()
                step(each, inputs[kind], grad)
                if repetition >= 2:
                    seconds[kind].append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "injected": delay * len(batches),
        "kept": {kind: kept_bytes(nets[kind], inputs[kind]) for kind in ("limit", "domain", "graph")},
        "messages": {kind: messages(nets[kind], inputs[kind], grad) for kind in ("domain", "graph")},
    }


def messages(net: nn.Module, x: Tensor, grad: Tensor) -> dict:
    """What a step sends and receives."""
    with recorded() as traffic:
        step(net, x, grad)
    answer = traffic.answer()
    return {"sent": len(answer["sent"]), "received": len(answer["received"]), "others": answer["others"]}


# Summaries


def summary(name: str, height: int, width: int, answers: list[dict]) -> dict:
    kinds = answers[0]["seconds"]
    slowest = {k: [max(t) for t in zip(*(a["seconds"][k] for a in answers), strict=True)] for k in kinds}
    most = {k: max((a["messages"][k] for a in answers), key=lambda m: m["sent"]) for k in ("domain", "graph")}
    result = {"net": name, "ranks": len(answers), "height": height, "width": width}
    result["milliseconds"] = {kind: 1e3 * median(times) for kind, times in slowest.items()}
    result["limit_ratio"] = median(slowest["limit"]) / median(slowest["domain"])
    ratios = [a / b for a, b in zip(slowest["limit"], slowest["domain"], strict=True)]
    result["quartiles"] = quantiles(ratios, n=4)
    result["kept_ratio"] = max(a["kept"]["domain"] / a["kept"]["limit"] for a in answers)
    result["messages"], result["messages_graph"] = most["domain"], most["graph"]
    result["graph_ratio"] = median(slowest["graph"]) / median(slowest["domain"])
    result["graph_kept_ratio"] = max(a["kept"]["graph"] / a["kept"]["domain"] for a in answers)
    if injected := max(answer["injected"] for answer in answers):
        longer = [a - b for a, b in zip(slowest["delayed"], slowest["domain"], strict=True)]
        result["injected_milliseconds"] = 1e3 * injected
        result["delay_shown"] = median(longer) / injected
    return result


def line(result: dict) -> str:
    ms, q = result["milliseconds"], result["quartiles"]
    sent, received = result["messages"]["sent"], result["messages"]["received"]
    others = ", ".join(f"{name} {count}" for name, count in sorted(result["messages"]["others"].items())) or "none"
    graph = result["messages_graph"]
    apart = "" if graph == result["messages"] else f" sends {graph['sent']}, {graph['others']}"
    size = f"{result['height']} x {result['width']}"
    return (
        f"{result['net']:<12}{size:>12}{result['ranks']:>6}{ms['limit']:>10.1f}{ms['domain']:>10.1f}"
        f"{result['limit_ratio']:>8.3f} ({q[0]:.2f}-{q[2]:.2f}){result['kept_ratio']:>8.3f}"
        f"{sent:>6}{received:>6}"
        f"{result['graph_ratio']:>8.3f}{result['graph_kept_ratio']:>8.3f}  {others}{apart}"
        + (
            f"; of {result['injected_milliseconds']:.0f} ms {result['delay_shown']:.2f} shown"
            if "delay_shown" in result
            else ""
        )
    )


def run(
    worlds: list[int], names: list[str], sizes: list[tuple[int, int]], repetitions: int, delay: float = 0.0
) -> list[dict]:
    """Run every net at every size on each number of ranks, printing a line for each."""
    print(f"{'net':<12}{'rows x cols':>12}{'ranks':>6}{'limit ms':>10}{'ms':>10}{'ratio (quartiles)':>20}", end="")
    print(f"{'kept':>8}{'sent':>6}{'recv':>6}{'graph':>8}{'kept':>8}  other calls", flush=True)
    results = []
    for ranks in worlds:
        for name in names:
            for height, width in sizes:
                args = (ranks, name, height, width, repetitions, delay)
                answers = run_processes(on_rank, ranks, *args, timeout=600.0, group_timeout=120.0)
                results.append(summary(name, height, width, answers))
                print(line(results[-1]), flush=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run them and print a table; no time is ever judged."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nets", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="N", help="processes (default: 2)")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS), help="default: all")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", help="default: 256x512 512x1024")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="of messages of rows, once more with it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(arguments)
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes] if options.sizes else list(SIZES)
    results = run(options.ranks, options.nets, sizes, options.repetitions, options.delay / 1e3)
    if options.json:
        about = {"torch": torch.__version__, "backend": "gloo", "threads": 1}
        options.json.write_text(json.dumps({**about, "nets": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
