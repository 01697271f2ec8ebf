"""Scaling to many ranks, worked out from the plan of a model and a stated network.

Nothing is measured here. Each step takes

- computing: the floating-point operations of the forward, counted by torch, times 3 for the backward, at a stated rate,
  for the rank with most rows;
- halos: for every row-mixing layer of the plan, forward and backward, a latency and the bytes of the busiest rank over
  the bandwidth; where they overlap with computing, only what exceeds the layer's own share of it;
- norms: a gather and a sum of a few numbers, log2(domain ranks) latencies each, which nothing hides;
- gradients: a ring over all ranks, 2 (n - 1) / n of the parameters' bytes over the bandwidth and 2 log2(n) latencies;
  hidden behind the backward as far as it goes.

    python -m benchmarks.simulate --plot scaling.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from credit_domain import DomainPlan, plan_domain_parallel
from credit_parallel.app.examples.unet import UNet


@dataclass(frozen=True)
class Machine:
    """What a simulation assumes; rates in 1/s, bytes and seconds."""

    flops: float = 2e14  # sustained in bfloat16 by a GPU of today, about a fifth of its peak
    bandwidth: float = 2.5e10  # a rank's share of a 200 Gbit/s network
    latency: float = 1e-5  # of a message between nodes, kernel launch included


@dataclass(frozen=True)
class Case:
    """A model on a grid."""

    height: int = 721
    width: int = 1440
    channels: int = 70
    features: int = 64
    element: int = 2  # bytes

    def model(self) -> UNet:
        with torch.device("meta"):
            return UNet(self.channels, self.channels, width=self.features, levels=3)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (1, self.channels, self.height, self.width)


@dataclass(frozen=True)
class Step:
    """Seconds of one step on one layout."""

    ranks: int
    dp: int
    domain: int
    compute: float
    halo: float
    halo_overlapped: float
    norms: float
    gradients: float

    def total(self, overlap: bool) -> float:
        """Seconds, with what can be hidden behind computing hidden or not."""
        hidden = 2 / 3 * self.compute if overlap else 0.0
        halo = self.halo_overlapped if overlap else self.halo
        return self.compute + halo + self.norms + max(0.0, self.gradients - hidden)


def forward_flops(case: Case) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"), torch.no_grad():
        case.model()(torch.empty(case.shape))
    return counter.get_total_flops()


def step_of(
    case: Case, plan: DomainPlan | None, flops: int, parameters: int, dp: int, samples: int, m: Machine
) -> Step:
    """A step of `samples` samples on each replica."""
    domain = 1 if plan is None else plan.partition.ranks
    rows = case.height if plan is None else max(plan.partition.sizes)
    compute = 3 * flops * samples * rows / case.height / m.flops
    halo = overlapped = 0.0
    norms = 0
    if plan is not None:
        exchanges = [layer for layer in plan.layers if layer.collective == "exchange"]
        norms = sum(layer.collective == "reduction" for layer in plan.layers)
        # The plan counts float32.
        times = [m.latency + layer.bytes * samples * case.element / 4 / m.bandwidth for layer in exchanges]
        share = compute / max(1, len(exchanges)) / 3
        halo = 2 * sum(times)
        overlapped = sum(max(0.0, time - share) + max(0.0, time - 2 * share) for time in times)
    n = dp * domain
    gradients = 2 * (n - 1) / n * parameters * case.element / m.bandwidth + 2 * math.log2(n) * m.latency
    reductions = 2 * norms * math.log2(domain) * m.latency
    return Step(n, dp, domain, compute, halo, overlapped, reductions, gradients)


def simulate(case: Case, machine: Machine, domains: Sequence[int], world: int, batch: int) -> dict[str, list[Step]]:
    """Strong scaling of one batch, and weak scaling of one sample on each replica, up to `world` ranks."""
    flops, parameters = forward_flops(case), sum(p.numel() for p in case.model().parameters())
    plans: dict[int, DomainPlan | None] = {1: None}
    for domain in domains:
        if domain > 1:
            plans[domain] = plan_domain_parallel(case.model(), case.shape, domain)
    found: dict[str, list[Step]] = {"strong": [], "weak": []}
    for domain, plan in plans.items():
        dp = 1
        while dp * domain <= world:
            if dp <= batch:
                found["strong"].append(step_of(case, plan, flops, parameters, dp, batch // dp, machine))
            found["weak"].append(step_of(case, plan, flops, parameters, dp, 1, machine))
            dp *= 2
    return found


def efficiency(kind: str, steps: Sequence[Step], step: Step, overlap: bool) -> float:
    """The time that perfect scaling would take, over that of a step: 1 is perfect."""
    alone = next(s for s in steps if s.ranks == 1).compute
    ideal = alone / step.ranks if kind == "strong" else alone / step.domain
    return ideal / step.total(overlap)


def draw(path: Path, found: dict[str, list[Step]], case: Case, machine: Machine, batch: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"strong": f"strong scaling: {batch} samples a step", "weak": "weak scaling: a sample on each replica"}
    for axis, (kind, steps) in zip(axes, found.items(), strict=True):
        for number, domain in enumerate(sorted({step.domain for step in steps})):
            line = sorted((s for s in steps if s.domain == domain), key=lambda s: s.ranks)
            for overlap, style in ((True, "-"), (False, ":")):
                values = [efficiency(kind, steps, step, overlap) for step in line]
                label = f"{domain} rank{'s' if domain > 1 else ''} a sample" if overlap else None
                axis.plot([s.ranks for s in line], values, style, marker="o", ms=3, color=f"C{number}", label=label)
        axis.set(xscale="log", xlabel="ranks", title=titles[kind], ylim=(0, 1.05))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency (1 is perfect)")
    axes[0].legend(fontsize=8, loc="lower left")
    assumed = (
        f"{machine.flops / 1e12:.0f} TFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s, {machine.latency * 1e6:.0f} \u00b5s"
    )
    figure.suptitle(
        f"Simulated, not measured: UNet, {case.channels} fields, {case.height} x {case.width}; a rank: {assumed}\n"
        "solid: halos and gradients overlap with computing; dotted: nothing does",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


DOMAINS = (1, 2, 4, 8, 16, 32)
WORLD, BATCH = 1024, 64


def line(kind: str, steps: Sequence[Step], step: Step) -> str:
    with_overlap, without = (efficiency(kind, steps, step, overlap) for overlap in (True, False))
    ms = {name: 1e3 * getattr(step, name) for name in ("compute", "halo", "norms", "gradients")}
    return (
        f"{kind:<8}{step.ranks:>6}{step.dp:>6}{step.domain:>8}{with_overlap:>10.2f}{without:>10.2f}"
        f"{ms['compute']:>12.2f}{ms['halo']:>10.2f}{ms['norms']:>10.2f}{ms['gradients']:>11.2f}"
    )


def results_of(
    case: Case, machine: Machine, domains: Sequence[int] = DOMAINS, world: int = WORLD, batch: int = BATCH
) -> tuple[dict[str, list[Step]], dict]:
    """Work it out and print a table; the steps, and the same as plain data."""
    found = simulate(case, machine, domains, world, batch)
    print("\nsimulated scaling of the example UNet: efficiency with and without overlap, and ms of a step's parts")
    print(
        f"{'scaling':<8}{'ranks':>6}{'dp':>6}{'domain':>8}{'overlap':>10}{'without':>10}"
        f"{'computing':>12}{'halos':>10}{'norms':>10}{'gradients':>11}"
    )
    content = {"machine": asdict(machine), "case": asdict(case), "batch": batch}
    for kind, steps in found.items():
        content[kind] = []
        for step in steps:
            print(line(kind, steps, step))
            shares = {"efficiency": efficiency(kind, steps, step, True)}
            shares["without_overlap"] = efficiency(kind, steps, step, False)
            content[kind].append({**asdict(step), **shares})
    return found, content


def run(*, quick: bool) -> dict:
    """Work it out for the default assumptions, print a table, and return its numbers."""
    return results_of(Case(), Machine(), DOMAINS[:2] if quick else DOMAINS)[1]


def main(arguments: list[str] | None = None) -> int:
    """Work it out, print a table, and draw it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, default=WORLD, help=f"largest number of ranks (default {WORLD})")
    parser.add_argument(
        "--domains", type=int, nargs="+", default=list(DOMAINS), help="ranks that share a sample (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples of a step in strong scaling ({BATCH})")
    for name, unit in (("flops", "floating-point operations/s"), ("bandwidth", "bytes/s"), ("latency", "seconds")):
        parser.add_argument(
            f"--{name}", type=float, default=getattr(Machine(), name), help=f"of a rank, {unit} (default %(default)s)"
        )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(arguments)
    case, machine = Case(), Machine(options.flops, options.bandwidth, options.latency)
    # One rank is what all others are compared with.
    domains = sorted({1, *options.domains})
    found, content = results_of(case, machine, domains, options.world, options.batch)
    if options.plot:
        draw(options.plot, found, case, machine, options.batch)
    if options.json:
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
