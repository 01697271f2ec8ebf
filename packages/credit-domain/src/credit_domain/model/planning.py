"""What a model will send, worked out without data, process groups or GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from credit_domain.engine.layer import Seen, record_of
from credit_domain.engine.traffic import traffic
from credit_domain.model.domain_plan import DomainPlan, PlannedLayer
from credit_domain.model.fates import Converter, Method, fates_of
from credit_domain.model.granularity import granularity_of
from credit_domain.model.rules import decide
from credit_domain.model.trace import LayerCall, rows_of, trace
from credit_domain.partitioner.program_plan import ProgramPlanner
from credit_mesh import RowPartition


def plan_domain_parallel(
    model: nn.Module,
    input_shape: Any,
    ranks: int,
    shard_dim: int = -2,
    *,
    custom_converters: Mapping[Any, Converter] | None = None,
    local: Iterable[Any] = (),
    partition: RowPartition | None = None,
    window_sizes: Sequence[int] | None = None,
    method: Method = "auto",
) -> DomainPlan:
    """Say what a model's row-mixing layers send when its rows are sharded, and raise what would fail later.

    Runs the model for its shapes alone, in this process, without data, process group or GPU.

    Args:
        model: The plain model; it is not touched.
        input_shape: Global shape of its input, or its arguments as :func:`credit_domain.model.trace.trace` takes them.
        ranks: Number of domain ranks.
        shard_dim: The sharded dim, negative.
        custom_converters: As for :func:`credit_domain.convert.convert_to_domain_parallel`; what they replace is left
            out.
        local: As for :func:`credit_domain.convert.convert_to_domain_parallel`.
        partition: How the rows of the input are divided; None divides them evenly in blocks of the total stride.
        window_sizes: Rows in the windows of each level, for models that do not declare them.
        method: As for :func:`credit_domain.convert.convert_to_domain_parallel`: with ``"auto"``, a model with modules
            that are refused is planned operation by operation. No trial takes place here: one that the trial refuses
            is planned by its modules, unless ``method`` is ``"graph"``.

    Raises:
        ValueError: If modules are refused, and the model cannot be traced either; if the model cannot be run for its
            shapes; if the rows do not divide over the ranks; or if a layer cannot work on its rows: by name.
    """
    local = list(local)
    if method == "graph":
        return ProgramPlanner(model, input_shape, shard_dim).plan(ranks, partition)
    fates = fates_of(model, shard_dim, custom_converters, local)
    try:
        fates.raise_refused()
    except ValueError as reason:
        if method == "modules" or custom_converters or local:
            raise
        try:
            return ProgramPlanner(model, input_shape, shard_dim).plan(ranks, partition)
        except ValueError as error:
            raise ValueError(f"{reason}\nIt cannot be partitioned operation by operation either: {error}") from reason
    calls = trace(model, input_shape, lambda module: decide(module, shard_dim).wrap is not None)
    calls = [call for call in calls if not any(_within(call.name, name) for name in fates.skipped)]
    if partition is None:
        granularity = granularity_of(
            model, shard_dim, input_shape=input_shape, window_sizes=window_sizes, free=fates.free
        )
        if not (rows := rows_of(input_shape, shard_dim)):
            raise ValueError("no input has rows to shard: expected a shape of three or more dims")
        partition = RowPartition.even(rows, ranks, granularity)
    at = {partition.rows: partition}
    layers, notes = [], []
    for call in calls:
        if len(call.input) < -shard_dim:
            continue
        rows = call.input[shard_dim]
        source = at.get(rows)
        if source is None:
            if rows == 1:
                continue  # pooled over all rows: every rank has the result
            few = RowPartition((rows, *[0] * (ranks - 1)), 1, True)
            source = few if rows < ranks else RowPartition.even(rows, ranks)
            notes.append(f"{call.name}: how its {rows} rows are divided is not known; an even division is shown")
        try:
            layer = _planned(call, source, shard_dim, partition)
        except ValueError as error:
            raise ValueError(f"{call.name} ({type(call.module).__name__}): {error}") from None
        layers.append(layer)
        target = layer.target
        if target is not None and target.rows > 1:
            if target.rows in at and at[target.rows] != target:
                notes.append(
                    f"{call.name}: its {target.rows} rows are divided as {target}, and elsewhere as {at[target.rows]}; "
                    "tensors that are added or concatenated must be divided alike"
                )
            at[target.rows] = target
    notes += [f"{name or 'the model'}: by a custom converter, or declared local; not planned" for name in fates.skipped]
    return DomainPlan(partition, tuple(layers), tuple(dict.fromkeys(notes)))


def _within(name: str, parent: str) -> bool:
    return name == parent or not parent or name.startswith(f"{parent}.")


def _planned(call: LayerCall, source: RowPartition, shard_dim: int, declared: RowPartition) -> PlannedLayer:
    kind = type(call.module).__name__
    op = record_of(call.module, shard_dim, Seen(call.input, call.output, declared))
    if op is None:
        collective = "reduction" if "Norm" in kind or "Adaptive" in kind else "none"
        return PlannedLayer(call.name, kind, source.rows, source, None, (0, 0), 0, 0, 0, collective)
    footprint = op.footprint(source)
    before, after, sent_rows, messages = traffic(footprint)
    row_bytes = call.dtype.itemsize * math.prod(call.input) // max(1, source.rows)
    return PlannedLayer(
        *(call.name, kind, source.rows, source, footprint.target, (before, after)),
        messages=max(messages, default=0),
        bytes=max(sent_rows, default=0) * row_bytes,
        total_bytes=sum(sent_rows) * row_bytes,
        collective="exchange" if any(messages) else "none",
    )
