"""Strong and weak scaling on the ranks of one machine, one thread each.

Each repetition times, one after the other and each forward and backward,

- `alone`: the net on one rank while the others wait; in strong scaling on the whole sample, in weak scaling on the rows
  that each rank has;
- `apart`: the net on every rank's own rows at once, without communication;
- `domain`: the converted net on every rank at once.

The cores allow n ranks the work of min(n, cores), whatever the communication. `domain` is the share of this that the
converted net reaches, and `apart` the share that is left of it without any communication, since cores share memory and
caches.
"""

from __future__ import annotations

import copy
import os
import time
from statistics import median, quantiles

import torch
import torch.distributed as dist

from benchmarks.nets import NETS, step
from credit_domain import convert_to_domain_parallel, initialize_domain_parallel
from credit_halo.testing import run_processes
from credit_mesh import RowPartition

KINDS = ("alone", "apart", "domain")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_rank(rank: int, ranks: int, name: str, scaling: str, rows: int, width: int, repetitions: int) -> dict:
    """Seconds of each kind in each repetition."""
    torch.manual_seed(0)
    plain = NETS[name]()
    manager = initialize_domain_parallel(ranks, ranks)
    net = convert_to_domain_parallel(copy.deepcopy(plain), manager)
    height = rows if scaling == "strong" else rows * ranks
    partition = manager.declare(RowPartition.even(height, ranks, manager.granularity or 1))

    def data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, 16, rows, width).requires_grad_(), torch.randn(1, 16, rows, width)

    whole, own = data(rows) if rank == 0 else None, data(partition.sizes[rank])
    work = {"alone": (plain, whole), "apart": (plain, own), "domain": (net, own)}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repetition in range(repetitions + 1):
        for kind, (each, tensors) in work.items():
            dist.barrier()
            started = time.perf_counter()
            if tensors is not None:
                step(each, *tensors)
            if repetition:  # the first use is not what is measured
                seconds[kind].append(time.perf_counter() - started)
    return seconds


def summary(name: str, scaling: str, rows: int, width: int, answers: list[dict]) -> dict:
    ranks, allowed = len(answers), min(len(answers), cores())
    work = 1 if scaling == "strong" else ranks  # samples of the size of the one that is run alone
    slowest = {kind: [max(times) for times in zip(*(a[kind] for a in answers), strict=True)] for kind in KINDS}
    result = {"net": name, "scaling": scaling, "ranks": ranks, "rows": rows, "width": width, "cores_allow": allowed}
    result["milliseconds"] = {kind: 1e3 * median(times) for kind, times in slowest.items()}
    for kind in ("apart", "domain"):
        shares = [work * one / all_ / allowed for one, all_ in zip(slowest["alone"], slowest[kind], strict=True)]
        result[kind] = dict(zip(("lower", "median", "upper"), quantiles(shares, n=4), strict=True))
    return result


def line(result: dict) -> str:
    def share(kind: str) -> str:
        q = result[kind]
        return f"{q['median']:.2f} ({q['lower']:.2f}-{q['upper']:.2f})"

    ms = "".join(f"{result['milliseconds'][kind]:>10.1f}" for kind in KINDS)
    return (
        f"{result['scaling']:<8}{result['net']:<7}{result['ranks']:>6}{result['rows']:>6} x {result['width']:<5}"
        f"{result['cores_allow']:>5}{ms}  {share('apart'):<18}{share('domain'):<18}"
    ).rstrip()


def run(worlds: list[int], *, quick: bool) -> list[dict]:
    """Measure, print a table, and return its rows."""
    rows, width, repetitions = (64, 64, 3) if quick else (256, 512, 11)
    print(
        f"\nscaling on {cores()} cores: ms of a step, and what is reached of what the cores allow: median (quartiles)"
    )
    print(
        f"{'scaling':<8}{'net':<7}{'ranks':>6}{'rows x columns':>14}{'max':>5}"
        f"{'alone':>10}{'apart':>10}{'domain':>10}  {'apart':<18}{'domain'}"
    )
    results = []
    for scaling in ("strong", "weak"):
        each = rows if scaling == "strong" else rows // 2
        for name in ("chain", "unet"):
            for ranks in worlds[:1] if quick else [1, *worlds]:
                args = (ranks, name, scaling, each, width, repetitions)
                answers = run_processes(on_rank, ranks, *args, timeout=600.0, group_timeout=120.0)
                results.append(summary(name, scaling, each, width, answers))
                print(line(results[-1]), flush=True)
    return results
