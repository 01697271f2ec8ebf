"""The layouts of a number of ranks and what each costs, as records and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from credit_domain import DomainPlan
from credit_mesh import RowPartition


@dataclass(frozen=True)
class Memory:
    """Memory of the rank that needs the most, in bytes."""

    parameters: int  #: its share of them
    gradients: int  #: its share of those; twice with ddp, which has a copy in its buckets
    optimizer: int  #: the optimizer's states of its share
    gathered: int  #: with fsdp2, parameters while they are used: of no block, of two blocks, and the gradients of one
    activations: int  #: what autograd keeps for the backward
    fields: int  #: the input, and for each step of a rollout the target and the error

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class LayoutPlan:
    """One layout, and what a step of the optimizer costs on its busiest rank."""

    data: str  #: how replicas are kept in step: ``fsdp2``, ``ddp`` or ``none``
    dp: int  #: replicas
    tensor: int  #: ranks that share the channels
    domain: int  #: ranks that share the rows
    samples: int  #: samples of each replica
    accumulate: int  #: micro-batches in which it works through them
    partition: RowPartition  #: rows of each domain rank
    halo_bytes: int  #: sent between domain ranks, forward and backward
    halo_messages: int  #: in which they are sent
    gradient_bytes: int  #: sent for gradients and parameters
    tensor_bytes: int  #: sent between tensor-parallel ranks
    memory: Memory  #: what it needs
    fits: bool | None  #: whether that fits; None where no memory was given
    #: The exchanges of a forward, layer by layer; None for a single domain rank.
    domain_plan: DomainPlan | None = field(repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """All that the rank sends."""
        return self.halo_bytes + self.gradient_bytes + self.tensor_bytes

    @property
    def name(self) -> str:
        """Such as ``fsdp2, dp 2 x tensor 1 x domain 4``."""
        return f"{self.data}, dp {self.dp} x tensor {self.tensor} x domain {self.domain}"

    def to_dict(self) -> dict[str, Any]:
        """In dicts, numbers and text, without the layers."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "domain_plan"}
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**plain, "partition": list(self.partition.sizes), "memory": memory, "bytes": self.bytes}


@dataclass(frozen=True)
class Skipped:
    """A degree, or a combination of them, that does not fit, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class LayoutPlans:
    """The layouts of a world; prints as a table."""

    model: str  #: class of the model
    parameters: int  #: how many it has
    input_shape: tuple[int, ...]  #: shape of one sample, (1, C, H, W), of the whole grid
    world: int  #: number of ranks
    batch_size: int  #: samples of a step, on all replicas together
    gpu_memory: int | None  #: bytes of memory of a rank; None where none were given
    granularity: int  #: rows in a block of the partition
    layouts: tuple[LayoutPlan, ...]  #: those that the model, the rows and the batch allow
    skipped: tuple[Skipped, ...]  #: what they do not allow
    chosen: LayoutPlan | None  #: the layout to take; None if none fits
    why: str  #: why that one
    notes: tuple[str, ...]  #: what is not counted

    def to_dict(self) -> dict[str, Any]:
        """In dicts, lists, numbers and text; the layers are those of the chosen layout."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        chosen = self.chosen
        layers = None if chosen is None or chosen.domain_plan is None else chosen.domain_plan.to_dict()["layers"]
        return {
            **plain,
            "input_shape": list(self.input_shape),
            "layouts": [layout.to_dict() for layout in self.layouts],
            "skipped": [asdict(each) for each in self.skipped],
            "chosen": None if chosen is None else {**chosen.to_dict(), "layers": layers},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.input_shape[1:]))
        have = "" if self.gpu_memory is None else f" of {size(self.gpu_memory)} each"
        lines = [
            f"{self.model}, {self.parameters / 1e6:.2f} M parameters; samples of {shape}, {self.batch_size} in a step; "
            f"{self.world} rank(s){have}; rows in blocks of {self.granularity}"
        ]
        if self.layouts:
            lines += ["", *_table(self)]
        if self.skipped:
            lines += ["", *(f"not {each.what}: {each.reason}" for each in self.skipped)]
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines.append(f"take: {self.chosen.name}: {self.why}" if self.chosen else f"take none of these: {self.why}")
        return "\n".join(lines)


_COLUMNS = (
    *("", "data", "dp", "tensor", "domain", "rows", "micro-batches", "halo", "messages", "gradients", "all-reduce"),
    "memory",
)


def _table(plans: LayoutPlans) -> Iterator[str]:
    table: list[tuple[str, ...]] = [_COLUMNS]
    for layout in plans.layouts:
        sizes = layout.partition.sizes
        rows = f"{min(sizes)}-{max(sizes)}" if min(sizes) != max(sizes) else str(sizes[0])
        mark = "->" if layout is plans.chosen else ""
        memory = size(layout.memory.total) + ("  out of memory" if layout.fits is False else "")
        numbers = map(str, (layout.dp, layout.tensor, layout.domain, rows, layout.accumulate))
        halo = (size(layout.halo_bytes), str(layout.halo_messages))
        table.append(
            (mark, layout.data, *numbers, *halo, size(layout.gradient_bytes), size(layout.tensor_bytes), memory)
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = zip(_COLUMNS, row, widths, strict=True)
        texts = ("", "data", "memory")
        yield "  ".join(cell.ljust(w) if name in texts else cell.rjust(w) for name, cell, w in cells).rstrip()


def size(number: float) -> str:
    """Bytes for people: ``1.50 GiB``."""
    power = 0
    while number >= 1023.5 and power < 4:
        number, power = number / 1024, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
