"""Which ways there are to lay a training out over ranks, and what each of them costs, without a GPU or data.

The formulas, for n = dp x domain ranks that average gradients, t tensor-parallel ranks, a rank's gradients of G bytes
and parameters of P bytes in the dtype that computes, all as a ring sends them from each rank:

- ``ddp`` and ``none`` sum the gradients, 2 (n - 1) / n G;
- ``fsdp2`` gathers parameters for the forward and again for the backward, (n - 1) / n P each, and scatters the sum of
  the gradients, (n - 1) / n G; what is in no block stays gathered between the two;
- tensor parallelism sums A bytes of activations in 2 (t - 1) / t A, and moves rows of fused weights (``_tp_parts``).

Halos are those of :func:`credit_domain.model.planning.plan_domain_parallel`, a bound: the busiest rank of each layer is
counted, and a backward as a forward. What norms sum is left out: a few numbers for each.

Ring collectives: P. Patarasuk and X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from credit_domain import DomainPlan, PlannedLayer, granularity_of, plan_domain_parallel
from credit_domain.blocks import Block, WindowAttention
from credit_domain.extend import LayerCall, Method, ProgramPlanner, fates_of, meta_copy, trace
from credit_mesh import RowPartition
from credit_parallel.blocks import blocks_of
from credit_parallel.layout_table import LayoutPlan, LayoutPlans, Memory, Skipped, size
from credit_parallel.memory import StepCost, step_cost
from credit_parallel.trainer_section import Conf

__all__ = ["LayoutPlan", "LayoutPlans", "Memory", "Skipped", "plan_layouts"]

_LAT = -2


@dataclass(frozen=True)
class _Request:
    """What is asked for."""

    world: int
    batch_size: int
    gpu_memory: int | None
    amp: bool
    recompute: bool
    states: int
    accumulate: int
    rollout: int
    method: Method


def plan_layouts(
    model: nn.Module,
    *,
    input_shape: Sequence[int],
    world: int,
    batch_size: int = 1,
    gpu_memory: int | None = None,
    amp: bool = False,
    activation_checkpoint: bool = False,
    optimizer_states: int = 2,
    accumulate: int = 1,
    rollout: int = 1,
    method: Method = "auto",
    conf: Conf = None,
) -> LayoutPlans:
    """List the layouts of a world that fit a model, its rows and a batch, what each costs, and which to take.

    The rule, of layouts whose estimate of memory fits:

    1. the fewest ranks for a sample (tensor x domain): whole samples on as many replicas as the batch allows;
    2. of those, the fewest bytes sent by the busiest rank;
    3. of those, the least memory.

    Args:
        model: The plain model; it is not touched, and never run but for its shapes.
        input_shape: Shape of a sample, (1, C, H, W), of the whole grid.
        world: Number of ranks.
        batch_size: Samples of a step, on all replicas together.
        gpu_memory: Bytes of memory of a rank; None does not ask whether layouts fit.
        amp: Compute in bfloat16.
        activation_checkpoint: Recompute blocks in the backward.
        optimizer_states: Numbers that the optimizer keeps for each parameter: 2 for AdamW, 0 for plain SGD.
        accumulate: Micro-batches in which a replica works through its samples, at least. Where memory is given and does
            not suffice, there are more.
        rollout: Steps of the model that a loss spans.
        method: As for :func:`credit_domain.model.planning.plan_domain_parallel`.

    Raises:
        ValueError: If an argument is out of range, or the model cannot be run for its shapes.
    """
    numbers = {"world": world, "batch_size": batch_size, "accumulate": accumulate, "rollout": rollout}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}")
    shape = (1, *input_shape[1:])
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"input_shape must be that of a sample, (1, C, H, W); got {tuple(input_shape)}")
    request = _Request(
        world, batch_size, gpu_memory, amp, activation_checkpoint, optimizer_states, accumulate, rollout, method
    )
    costs, skipped = _tensor_costs(model, shape, request, conf)
    splits = _RowSplits(model, shape, request, conf)
    partitions, unfit = splits.partitions()
    layouts = []
    no_batch: set[int] = set()
    for tensor, cost in costs.items():
        for degree, partition in partitions.items():
            if world % (tensor * degree):
                continue
            dp = world // (tensor * degree)
            if batch_size % (dp * accumulate):
                no_batch.add(dp)
                continue
            layouts += [
                _fitted(request, mode, dp, tensor, partition, cost, splits.domain_plans[degree], splits.again[degree])
                for mode in ("none", "ddp", "fsdp2")
                if (mode != "none" or dp == 1) and (mode == "none" or dp * degree > 1)
            ]
    skipped += unfit
    if no_batch:
        parts = f" in {accumulate} micro-batches each" if accumulate > 1 else ""
        reason = f"a batch of {batch_size} sample(s) does not divide over as many replicas{parts}"
        skipped.append(Skipped(f"dp {_listed(sorted(no_batch))}", reason))
    layouts.sort(key=lambda layout: (layout.tensor * layout.domain, layout.tensor))
    chosen, why = _choose(layouts, request)
    return LayoutPlans(
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        input_shape=shape,
        world=world,
        batch_size=batch_size,
        gpu_memory=gpu_memory,
        granularity=splits.granularity,
        layouts=tuple(layouts),
        skipped=tuple(skipped),
        chosen=chosen,
        why=why,
        notes=tuple(splits.notes),
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _tensor_costs(
    model: nn.Module, shape: tuple[int, ...], request: _Request, conf: Conf
) -> tuple[dict[int, StepCost], list[Skipped]]:
    """What a sample costs at each tensor-parallel degree that the model's declarations allow."""
    costs = {1: step_cost(model, shape, amp=request.amp, conf=conf)}
    reasons: dict[str, list[int]] = {}
    for tensor in _divisors(request.world)[1:]:
        try:
            costs[tensor] = step_cost(model, shape, tensor=tensor, amp=request.amp, conf=conf)
        except ValueError as error:
            reasons.setdefault(str(error).replace(f"degree {tensor}", "degree"), []).append(tensor)
    return costs, [Skipped(f"tensor {_listed(degrees)}", reason) for reason, degrees in reasons.items()]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


class _RowSplits:
    """The partitions of a model's rows and the exchanges that they take."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], request: _Request, conf: Conf) -> None:
        self.shape, self.world = shape, request.world
        self.ghost = meta_copy(model)
        if request.amp:
            self.ghost.to(torch.bfloat16)
        refused = request.method == "auto" and bool(fates_of(model, _LAT, None, ()).refused)
        self.planner, self.narrower, untraced = None, 2 if request.amp else 1, ""
        if request.method == "graph" or refused:
            try:
                self.planner = ProgramPlanner(model, shape, _LAT)
            except ValueError as error:
                if request.method == "graph":
                    raise
                untraced = f"it cannot be partitioned operation by operation either: {error}"
        if self.planner is not None:
            self.granularity = self.planner.granularity()
        else:
            self.granularity = granularity_of(self.ghost, _LAT, input_shape=shape)
        self.windows = trace(self.ghost, shape, lambda module: isinstance(module, WindowAttention))
        others = [
            n for n, m in self.ghost.named_modules() if isinstance(m, Block) and not isinstance(m, WindowAttention)
        ]
        self.notes = [f"what {', '.join(others)} send(s) is not counted"] if others else []
        self.notes += [untraced] if untraced else []
        self.blocks = tuple(blocks_of(model, conf)) if request.recompute else ()
        self.domain_plans: dict[int, DomainPlan | None] = {1: None}
        self.again: dict[int, tuple[int, int]] = {1: (0, 0)}

    def partitions(self) -> tuple[dict[int, RowPartition], list[Skipped]]:
        """Those of each degree that fits, and why others do not."""
        rows = self.shape[_LAT]
        found = {1: RowPartition.even(rows, 1)}
        reasons: dict[str, list[int]] = {}
        for degree in _divisors(self.world)[1:]:
            try:
                blocks = self.granularity
                if self.planner is not None and blocks * degree > rows:
                    blocks = 1  # windows move rows then
                partition = RowPartition.even(rows, degree, blocks)
            except ValueError:
                most = max(1, rows // self.granularity)
                reason = f"{rows} rows in blocks of {self.granularity} are enough for {most} ranks"
                reasons.setdefault(reason, []).append(degree)
                continue
            try:
                plan = self._domain_plan(degree, partition)
            except ValueError as error:
                reasons.setdefault(str(error), []).append(degree)
                continue
            found[degree], self.domain_plans[degree] = partition, plan
            again = [each for each in plan.layers if f"{each.name}.".startswith(tuple(f"{b}." for b in self.blocks))]
            self.again[degree] = (sum(layer.bytes for layer in again), sum(layer.messages for layer in again))
            self.notes += [note for note in plan.notes if note not in self.notes]
        return found, [Skipped(f"domain {_listed(degrees)}", reason) for reason, degrees in reasons.items()]

    def _domain_plan(self, degree: int, partition: RowPartition) -> DomainPlan:
        if self.planner is not None:
            plan = self.planner.plan(degree, partition)
            layers = (
                replace(layer, bytes=layer.bytes // self.narrower, total_bytes=layer.total_bytes // self.narrower)
                for layer in plan.layers
            )
            return replace(plan, layers=tuple(layers))
        plan = plan_domain_parallel(self.ghost, self.shape, degree, partition=partition, method="modules")
        at = {partition.rows: partition}
        for layer in plan.layers:
            at.update({each.rows: each for each in (layer.partition, layer.target) if each is not None})
        windows = []
        for call in self.windows:
            source = at.get(call.input[_LAT])
            window = None if source is None else window_layer(call, source)
            if window is not None:
                windows.append(window)
            elif (note := f"what {call.name} sends is not counted") not in self.notes:
                self.notes.append(note)
        return replace(plan, layers=(*plan.layers, *windows))


def window_layer(call: LayerCall, source: RowPartition) -> PlannedLayer | None:
    """What attention within windows sends: rows to the owner of their window's first row, and back.

    None where windows are dilated or wrap around along the rows, as no one needs who shards latitude.
    """
    module: Any = call.module
    at = len(module.window) + module.dim
    if (
        module.dilated
        or (module.cyclic is not None and module.cyclic[at])
        or (module.cyclic is None and module.dim == -1)
    ):
        return None
    window = module.window[at]
    front = -(module.shift if isinstance(module.shift, int) else module.shift[at]) % window
    sent, peers = [0] * source.ranks, [set[tuple[str, int]]() for _ in range(source.ranks)]
    before = after = moved = 0
    for row in range(source.rows):
        home, first = source.owner(row), max(0, (row + front) // window * window - front)
        host = source.owner(first)
        if home != host:
            own = source.interval(host)
            before, after = max(before, own.start - row), max(after, row - own.stop + 1)
            moved += 1
            for rank, way, peer in ((home, "to the window", host), (host, "home", home)):
                sent[rank] += 1
                peers[rank].add((way, peer))
    row_bytes = call.dtype.itemsize
    for dim, length in enumerate(call.input):
        row_bytes *= length if dim != len(call.input) + module.dim else 1
    return PlannedLayer(
        name=call.name,
        kind=type(call.module).__name__,
        rows=source.rows,
        partition=source,
        target=None,
        halo=(before, after),
        messages=max(map(len, peers)),
        bytes=max(sent) * row_bytes,
        total_bytes=2 * moved * row_bytes,
        collective="exchange" if moved else "none",
    )


def _fitted(request: _Request, mode: str, dp: int, *how: Any) -> LayoutPlan:
    """A layout in as few micro-batches as memory allows."""
    samples = request.batch_size // dp
    for parts in _divisors(samples):
        if parts >= request.accumulate:
            layout = _layout(replace(request, accumulate=parts), mode, dp, *how)
            if layout.fits is not False:
                break
    return layout


def _layout(
    request: _Request,
    mode: str,
    dp: int,
    tensor: int,
    partition: RowPartition,
    cost: StepCost,
    domain_plan: DomainPlan | None,
    again: tuple[int, int],
) -> LayoutPlan:
    """The formulas at the top of this module."""
    degree, samples = partition.ranks, request.batch_size // dp
    runs = request.accumulate * request.rollout  # forwards of a step, and as many backwards
    forwards = samples * request.rollout  # of one sample
    share = max(partition.sizes) / partition.rows
    ranks = dp * degree
    ring = (ranks - 1) / ranks
    halo = messages = 0
    if domain_plan is not None:
        halo = (2 * domain_plan.bytes + request.recompute * again[0]) * forwards
        messages = (2 * domain_plan.messages + request.recompute * again[1]) * runs
    narrower = 2 if request.amp else 1
    if mode == "fsdp2":
        gathers = (2 * cost.parameters - cost.root) / narrower * runs
        gradient_bytes = ring * (gathers + cost.parameters)
    else:
        gradient_bytes = 2 * ring * cost.parameters
    sums = cost.tensor_forward + cost.tensor_backward + request.recompute * cost.tensor_again
    tensor_bytes = (
        2 * (tensor - 1) / tensor * sums * share * forwards + (2 + request.recompute) * cost.fused_sent * runs
    )
    memory = _memory(request, mode, ranks, samples, share, cost, 0 if domain_plan is None else domain_plan.bytes)
    return LayoutPlan(
        data=mode,
        dp=dp,
        tensor=tensor,
        domain=degree,
        samples=samples,
        accumulate=request.accumulate,
        partition=partition,
        halo_bytes=halo,
        halo_messages=messages,
        gradient_bytes=round(gradient_bytes),
        tensor_bytes=round(tensor_bytes),
        memory=memory,
        fits=None if request.gpu_memory is None else memory.total <= request.gpu_memory,
        domain_plan=domain_plan,
    )


def _memory(request: _Request, mode: str, ranks: int, samples: int, share: float, cost: StepCost, halo: int) -> Memory:
    own = -(-cost.parameters // ranks) if mode == "fsdp2" else cost.parameters
    narrower = 2 if request.amp else 1
    at_once = samples // request.accumulate
    kept = (
        cost.recomputed if request.recompute else cost.kept
    ) * share + halo  # layers keep the rows that they were sent
    return Memory(
        parameters=own,
        gradients=own * (2 if mode == "ddp" else 1),
        optimizer=own * request.states,
        gathered=(cost.root + 3 * cost.largest) // narrower if mode == "fsdp2" else 0,
        activations=round(kept * at_once * request.rollout) + cost.fused,
        fields=round((cost.inputs + 2 * cost.outputs * request.rollout) * share * at_once),
    )


def _choose(layouts: Sequence[LayoutPlan], request: _Request) -> tuple[LayoutPlan | None, str]:
    """The rule of :func:`plan_layouts`, and the reason in words."""
    if not layouts:
        return None, "no layout fits this model, its rows and the batch; see above for what limits each degree"
    fitting = [layout for layout in layouts if layout.fits is not False]
    if not fitting:
        least = min(layouts, key=lambda layout: layout.memory.total)
        advice = "" if request.recompute else ", activation checkpointing"
        advice += "" if request.amp else ", bfloat16 (amp)"
        return None, (
            f"the least memory is {size(least.memory.total)} ({least.name}), more than "
            f"{size(request.gpu_memory or 0)}; try more ranks{advice}, or a smaller batch"
        )
    chosen = min(fitting, key=lambda each: (each.tensor * each.domain, each.bytes, each.memory.total))
    shared = chosen.tensor * chosen.domain
    why = [f"needs {size(chosen.memory.total)} a rank"]
    fewer = [layout for layout in layouts if layout.tensor * layout.domain < shared]
    most = max(layout.dp for layout in layouts)
    if chosen.dp == most and shared > 1:
        why.append(
            f"{chosen.dp} replica(s) are the most for {request.batch_size} sample(s), so {shared} ranks share one"
        )
    elif shared > 1:
        smallest = min(layout.memory.total for layout in fewer)
        why.append(f"with fewer than {shared} ranks for a sample each needs {size(smallest)} or more")
    else:
        why.append("each rank has whole samples")
    rivals = [each for each in fitting if each.tensor * each.domain == shared and each is not chosen]
    if rivals:
        second = min(rivals, key=lambda each: each.bytes)
        why.append(f"sends {size(chosen.bytes)} a step, {second.name} {size(second.bytes)}")
    return chosen, "; ".join(why)
