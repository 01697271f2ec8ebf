"""What a model sends, layer by layer, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from credit_mesh import RowPartition


@dataclass(frozen=True)
class PlannedLayer:
    """What one call of a row-mixing layer sends.

    Attributes:
        name: Qualified name of the module.
        kind: Its class; the operator, where the model is planned operation by operation.
        rows: Global rows of its input.
        partition: Who holds which of them.
        target: Who holds which rows of its output; None for layers that keep the partition.
        halo: The most rows that a rank reads beyond its own, before and after.
        messages: Sent in one forward by the busiest rank.
        bytes: Sent in one forward by the busiest rank.
        total_bytes: Sent in one forward by all ranks.
        collective: ``exchange``, ``reduction``, or ``none``; ``gather`` and ``transpose`` of operators.
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
