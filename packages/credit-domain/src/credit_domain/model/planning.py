"""What a model will send, worked out without data, process groups or GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from credit_domain.engine.footprint import Footprint
from credit_domain.engine.layer import Seen, record_of
from credit_domain.model.fates import Converter, fates_of
from credit_domain.model.granularity import granularity_of
from credit_domain.model.rules import decide
from credit_domain.model.trace import LayerCall, rows_of, trace
from credit_mesh import RowPartition


@dataclass(frozen=True)
class PlannedLayer:
    """What one call of a row-mixing layer sends.

    Attributes:
        name: Qualified name of the module.
        kind: Its class.
        rows: Global rows of its input.
        partition: Who holds which of them.
        target: Who holds which rows of its output; None for layers that keep the partition.
        halo: The most rows that a rank reads beyond its own, before and after.
        messages: Sent in one forward by the busiest rank.
        bytes: Sent in one forward by the busiest rank.
        total_bytes: Sent in one forward by all ranks.
        collective: ``exchange``, ``reduction``, or ``none``.
    """

    name: str
    kind: str
    rows: int
    partition: RowPartition
    target: RowPartition | None
    halo: tuple[int, int]
    messages: int
    bytes: int
    total_bytes: int
    collective: str


@dataclass(frozen=True)
class DomainPlan:
    """The calls of a model's row-mixing layers, in order; prints as a table.

    Attributes:
        partition: Partition of the model's input.
        layers: One entry for each call.
        notes: What may need a look.
    """

    partition: RowPartition
    layers: tuple[PlannedLayer, ...]
    notes: tuple[str, ...] = ()

    @property
    def messages(self) -> int:
        """Messages that the busiest rank sends in one forward."""
        return sum(layer.messages for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes that the busiest rank sends in one forward; a backward sends as many."""
        return sum(layer.bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan in dicts, lists, numbers and text."""
        out = asdict(self)
        out["partition"] = list(self.partition.sizes)
        for entry, layer in zip(out["layers"], self.layers, strict=True):
            entry["partition"] = list(layer.partition.sizes)
            entry["target"] = None if layer.target is None else list(layer.target.sizes)
        return {**out, "messages": self.messages, "bytes": self.bytes}

    def __str__(self) -> str:
        header = ("layer", "kind", "rows", "rows/rank", "halo", "messages", "KiB")
        table = [header]
        for layer in self.layers:
            sizes = layer.partition.sizes
            per_rank = f"{min(sizes)}-{max(sizes)}" if min(sizes) != max(sizes) else str(sizes[0])
            halo = f"{layer.halo[0]}+{layer.halo[1]}" if layer.collective == "exchange" else layer.collective
            kib = f"{layer.bytes / 1024:.1f}"
            table.append((layer.name, layer.kind, str(layer.rows), per_rank, halo, str(layer.messages), kib))
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = [f"{self.partition}"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        lines.append(f"busiest rank, one forward: {self.messages} messages, {self.bytes / 1024:.1f} KiB")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


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

    Raises:
        ValueError: If modules are refused; if the model cannot be run for its shapes; if the rows do not divide over
            the ranks; or if a layer cannot work on its rows: by name.
    """
    fates = fates_of(model, shard_dim, custom_converters, local)
    fates.raise_refused()
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


def traffic(footprint: Footprint) -> tuple[int, int, list[int], list[int]]:
    """The widest halo before and after, and for each rank the rows that it sends and to how many ranks.

    Each rank's missing rows are split by owner, so that the cost grows with the ranks and not with their square.
    """
    source = footprint.source
    sent, messages = [0] * source.ranks, [0] * source.ranks
    before = after = 0
    for rank, ((start, stop), need) in enumerate(zip(pairwise(source.offsets), footprint.needs, strict=True)):
        if not need:
            continue
        wanted: dict[int, set[int]] = {}
        if isinstance(need, tuple):
            missing = [range(row, row + 1) for row in set(need) if not start <= row < stop]
            own = [at for at, row in enumerate(need) if start <= row < stop]
            if own:
                before, after = max(before, own[0]), max(after, len(need) - 1 - own[-1])
        elif stop > start:
            before, after = max(before, start - need.start), max(after, need.stop - stop)
            missing = [range(need.start, min(need.stop, start)), range(max(need.start, stop), need.stop)]
        else:
            missing = [need]
        for part in missing:
            for span in footprint.edge.spans(part, source.rows):
                if span.row is None:
                    continue
                ends = sorted({span.row, span.row + (span.length - 1) * span.step})
                for piece in source.owners(ends[0], ends[-1] + 1):
                    if piece.rank != rank:
                        wanted.setdefault(piece.rank, set()).update(range(piece.start, piece.stop))
        for owner, rows in wanted.items():
            sent[owner] += len(rows)
            messages[owner] += 1
    return before, after, sent, messages
