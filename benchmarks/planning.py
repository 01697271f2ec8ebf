"""What happens once, before the first step: conversion, planning and verification of the example models.

Seconds are medians of the repetitions, and each has something to be compared with:

- `convert`, on 2 ranks: building the model;
- `plan`, for up to 1024 ranks: running the model on the meta device, which every plan starts with;
- `layouts`, all layouts of a world: the same;
- `verify`, in float64 on 3 ranks: a forward and a backward of the whole in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from credit_domain import (
    convert_to_domain_parallel,
    initialize_domain_parallel,
    plan_domain_parallel,
    verify_domain_parallel,
)
from credit_halo.testing import run_processes
from credit_parallel.app.examples.transformer import Transformer
from credit_parallel.app.examples.unet import UNet
from credit_parallel.layouts import plan_layouts

CHANNELS = 8
SMALL = (1, CHANNELS, 65, 64)
RANKS = (2, 8, 64, 1024)
LARGE = (1, CHANNELS, 4 * max(RANKS) + 1, 4 * max(RANKS))  # 4 rows, the total stride of both models, for each rank


def unet() -> nn.Module:
    return UNet(CHANNELS, CHANNELS)


def transformer() -> nn.Module:
    return Transformer(CHANNELS, CHANNELS)


MODELS = {"unet": unet, "transformer": transformer}


def seconds_of(action: Callable[[], object], repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return median(times)


def convert_on_rank(rank: int, name: str, repetitions: int) -> tuple[float, float]:
    manager = initialize_domain_parallel(2, 2)
    build = MODELS[name]
    models = iter([build() for _ in range(repetitions + 1)])
    convert_to_domain_parallel(next(models), manager)  # the first use is not what is measured
    seconds = seconds_of(lambda: convert_to_domain_parallel(next(models), manager), repetitions)
    return seconds, seconds_of(build, repetitions)


def step(model: nn.Module) -> None:
    out = model(torch.randn(SMALL, dtype=torch.float64))
    out.backward(torch.randn_like(out))


def run_for_shapes(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"), torch.no_grad():
        build()(torch.empty(LARGE))


def run(*, quick: bool) -> list[dict]:
    """Measure, print a table, and return its rows."""
    repetitions = 1 if quick else 5
    print("\nbefore the first step: seconds, and ratios to what each is compared with")
    print(f"{'model':<12} {'what':<8} {'ranks':>6} {'s':>9} {'ratio':>8}  to")
    results = []

    def add(model: str, what: str, ranks: int, seconds: float, other: float, to: str) -> None:
        results.append({"model": model, "what": what, "ranks": ranks, "seconds": seconds, "ratio": seconds / other})
        print(f"{model:<12} {what:<8} {ranks:>6} {seconds:>9.3f} {seconds / other:>8.2f}  {to}", flush=True)

    for name, build in MODELS.items():
        answers = run_processes(convert_on_rank, 2, name, repetitions, timeout=300)
        add(name, "convert", 2, *max(answers), "building the model")
        run_for_shapes(build)
        shapes = seconds_of(lambda build=build: run_for_shapes(build), repetitions)
        model = build()
        for ranks in RANKS:
            seconds = seconds_of(lambda m=model, r=ranks: plan_domain_parallel(m, LARGE, r), repetitions)
            add(name, "plan", ranks, seconds, shapes, "running it for its shapes")
        seconds = seconds_of(
            lambda m=model: plan_layouts(m, input_shape=LARGE, world=max(RANKS), batch_size=64), repetitions
        )
        add(name, "layouts", max(RANKS), seconds, shapes, "running it for its shapes")
        verified = seconds_of(lambda m=model: verify_domain_parallel(m, SMALL, 3), repetitions)
        model.double()
        step(model)
        add(name, "verify", 3, verified, seconds_of(lambda m=model: step(m), repetitions), "a step of the whole")
    return results
