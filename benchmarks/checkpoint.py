"""Checkpoints: sizes, and the times of save and load against a plain torch.save and torch.load of the same state.

`plain` is what one rank writes with the model's and the optimizer's state dicts, flushed to the disk as ours is. Ratios
are medians of the repetitions, each of which does both, one after the other.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from credit_halo.testing import run_processes
from credit_parallel import parallelize
from credit_parallel.checkpoint import latest, load_checkpoint, save_checkpoint


def net(width: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(4)))


def on_rank(rank: int, folder: str, ranks: int, width: int, repetitions: int) -> list[dict[str, float]]:
    """Seconds of each repetition."""
    conf = {"trainer": {"parallelism": {"data": "fsdp2", "domain": ranks}}}
    context = parallelize(net(width), conf)
    optimizer = torch.optim.AdamW(context.model.parameters())
    context.mean(context.model(context.shard(torch.randn(1, width, 4 * ranks, 8))) ** 2).backward()
    context.step(optimizer)
    alone = net(width)
    other = torch.optim.AdamW(alone.parameters())
    sum(p.sum() for p in alone.parameters()).backward()
    other.step()
    found = []
    for step in range(repetitions):
        seconds = {}
        for name, action in {
            "save": lambda step=step: save_checkpoint(folder, context, optimizer, step=step, keep=1),
            "load": lambda: load_checkpoint(folder, context, optimizer),
            "plain_save": lambda: plain_save(folder, alone, other) if rank == 0 else None,
            "plain_load": lambda: plain_load(folder, alone, other) if rank == 0 else None,
        }.items():
            dist.barrier()
            started = time.perf_counter()
            action()
            dist.barrier()
            seconds[name] = time.perf_counter() - started
        found.append(seconds)
    return found


def plain_save(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with open(Path(folder) / "plain.pt", "wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def plain_load(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = torch.load(Path(folder) / "plain.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def run(rank_counts: list[int], *, quick: bool) -> list[dict]:
    """Measure, print a table, and return its rows."""
    print("\ncheckpoints: model and AdamW state; seconds, and ratios to one rank's torch.save and torch.load")
    print(
        f"{'ranks':>5} {'MiB':>7} {'plain MiB':>10} {'save s':>8} {'load s':>8} {'save/plain':>11} {'load/plain':>11}"
    )
    results = []
    for ranks in rank_counts:
        width, repetitions = (128, 3) if quick else (512, 5)
        with tempfile.TemporaryDirectory() as folder:
            answers = run_processes(on_rank, ranks, folder, ranks, width, repetitions, timeout=300)
            checkpoint = latest(folder)
            size = sum(file.stat().st_size for file in Path(checkpoint).rglob("*") if file.is_file())
            plain = (Path(folder) / "plain.pt").stat().st_size
        seconds = {name: [a[name] for a in answers[0]] for name in answers[0][0]}
        result = {"ranks": ranks, "bytes": size, "plain_bytes": plain}
        result |= {f"{name}_seconds": median(times) for name, times in seconds.items()}
        for name in ("save", "load"):
            pairs = zip(seconds[name], seconds[f"plain_{name}"], strict=True)
            result[f"{name}_over_plain"] = median(a / b for a, b in pairs)
        results.append(result)
        print(
            f"{ranks:5} {size / 2**20:7.1f} {plain / 2**20:10.1f} {result['save_seconds']:8.3f} "
            f"{result['load_seconds']:8.3f} {result['save_over_plain']:11.2f} {result['load_over_plain']:11.2f}",
            flush=True,
        )
    return results
