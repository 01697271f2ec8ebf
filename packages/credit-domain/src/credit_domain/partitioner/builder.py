"""Writing this rank's program: values, where their rows lie, and how they get elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from credit_domain.engine.footprint import Footprint
from credit_domain.engine.traffic import traffic
from credit_domain.ops.rearranging import Repartition
from credit_domain.partitioner import steps
from credit_domain.partitioner.autograd_functions import Applied
from credit_domain.partitioner.row_layout import Rows, evenly
from credit_domain.partitioner.steps import Place, partition
from credit_mesh import RowPartition

Layout = Rows | None
"""How a value lies: divided rows, or None where every rank has the whole."""


class Value:
    """A tensor of the model, and the nodes of this rank's program that hold it.

    Attributes:
        shape: Shape of the whole.
        dtype: Its dtype.
        device: Its device.
        layout: How it lies.
        nodes: The node for each layout that it has been brought to.
        fill: The number that all of its entries are, where nothing has been made of it yet; else None.
    """

    def __init__(self, like: Tensor, layout: Layout, node: fx.Node | None, fill: Any = None) -> None:
        self.shape = tuple(int(size) for size in like.shape)
        self.stride = tuple(like.stride())
        self.dtype, self.device = like.dtype, like.device
        self.layout, self.fill = layout, fill
        self.nodes: dict[Layout, fx.Node] = {} if node is None else {layout: node}
        self.node_of_factors: Any = None  # of a dropout

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"Value({list(self.shape)}, {self.layout})"


@dataclass(frozen=True)
class Move:
    """A value that goes from rank to rank.

    Attributes:
        kind: ``gather``, ``repartition``, ``transpose``, ``take``, ``halo`` or ``sum``.
        operation: Whose operand it is.
        module: Qualified name of the module whose call it is in.
        line: The line of the model's source.
        bytes: Sent in one forward by the busiest rank. Of a sum: of what is summed.
        total_bytes: Sent in one forward by all ranks.
        messages: Sent in one forward by the busiest rank; 0 of a sum.
        source: Who holds which rows before; None of a sum.
        target: Who holds which rows afterwards, if that is another partition.
        halo: The most rows that a rank reads beyond its own, before and after.
    """

    kind: str
    operation: str
    module: str
    line: str
    bytes: int
    total_bytes: int = 0
    messages: int = 0
    source: RowPartition | None = None
    target: RowPartition | None = None
    halo: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Repeated:
    """An operator on rows that every rank does as a whole.

    Attributes:
        operation: The operator.
        module: Qualified name of the module whose call it is in.
        line: The line of the model's source.
        entries: Entries of its result.
        flops: Its floating-point operations.
    """

    operation: str
    module: str
    line: str
    entries: int
    flops: int


@dataclass
class Builder:
    """This rank's program while it is written.

    Attributes:
        place: Where it runs.
        declared: Rows of each rank at the model's input.
        constant_of: Gives the value of a node of the traced model that follows from constants alone.
        functions: The calls of functions with a backward of their own.
        flops: Floating-point operations of each node of the traced model.
        graph: The program.
        values: What each node of the traced model became.
        moves: What goes from rank to rank.
        repeated: What every rank does as a whole.
        blocks: Rows of the model's input at whose multiples boundaries would have to be, so that views move no row.
        node: The node of the traced model that is being written.
        draws: Whether it draws random numbers.
        repeated_flops: Floating-point operations that every rank does: of those in ``repeated``, and of operators on
            values without rows.
        checkpoint: The call of ``torch.utils.checkpoint`` that the present operator is in, and how many calls of
            modules that call is in.
    """

    place: Place
    declared: tuple[int, ...]
    constant_of: Callable[[fx.Node], Tensor | None]
    functions: Sequence[Applied] = ()
    flops: Mapping[fx.Node, int] = field(default_factory=dict)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    repeated: list[Repeated] = field(default_factory=list)
    blocks: set[int] = field(default_factory=set)
    node: Any = None
    draws: bool = False
    repeated_flops: int = 0
    checkpoint: tuple[int, int] | None = None

    # What is written

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Write an operator or a step."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = {} if self.node is None else self.node.meta.get("nn_module_stack", {})
        node.meta["checkpoint"] = self.checkpoint
        return node

    def value(self, node: fx.Node, layout: Layout, like: Any = None) -> Value:
        """What a written node holds: the value of the present node of the traced model, or one like ``like``."""
        return Value(self.meta if like is None else like, layout, node)

    @property
    def meta(self) -> Any:
        """The present node's result, without memory."""
        return self.node.meta["val"]

    @property
    def label(self) -> str:
        """What errors and traces call the present operator."""
        return f"{self.module}:{self.node.name}" if self.module else str(self.node.name)

    @property
    def operation(self) -> str:
        """Name of the present operator."""
        if self.node.target is torch.ops.credit_domain.apply_function.default:
            return str(self.functions[self.node.args[1]].kind.__name__)
        return str(self.node.target)

    @property
    def module(self) -> str:
        """Qualified name of the module whose call the present operator is in."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        return str(stack[-1][0]).removeprefix("model").removeprefix(".") if stack else ""

    @property
    def line(self) -> str:
        """The line of the model's source."""
        trace = self.node.meta.get("stack_trace") or ""
        places = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
        return places[-1] if places else ""

    def sums(self, size: int) -> None:
        """Note that so many bytes are summed over the ranks."""
        self._note("sum", size, size * self.place.ranks)

    def brings(self, kind: str, value: Value, footprint: Footprint, share: float = 1.0) -> None:
        """Note that each rank brings the rows of a value, or a ``share`` of each, that a footprint lists."""
        if footprint.is_local:
            return
        before, after, rows, messages = traffic(footprint)
        if not any(messages):
            return  # what lies beyond the edges alone
        row = round(share * value.bytes / max(1, footprint.source.rows))
        target = None if footprint.target == footprint.source else footprint.target
        where = {"source": footprint.source, "target": target, "halo": (before, after)}
        self._note(kind, max(rows) * row, sum(rows) * row, max(messages), **where)

    def gathers(self, value: Value, rows: Rows) -> None:
        """Note that every rank brings the whole of a value."""
        others, unit = self.place.ranks - 1, value.bytes // max(1, rows.units)
        sent = [size * others * unit for size in rows.sizes]
        self._note("gather", max(sent), sum(sent), others, source=partition(rows.sizes))

    def transposes(self, value: Value, rows: Rows, other: Rows) -> None:
        """Note that another dim of a value is divided from now on."""
        unit = value.bytes // max(1, rows.units * other.units)
        sent = [a * (other.units - b) * unit for a, b in zip(rows.sizes, other.sizes, strict=True)]
        takers = sum(size > 0 for size in other.sizes)
        messages = [takers - (b > 0) if a else 0 for a, b in zip(rows.sizes, other.sizes, strict=True)]
        self._note("transpose", max(sent), sum(sent), max(messages), source=partition(rows.sizes))

    def _note(self, kind: str, size: int, total: int = 0, messages: int = 0, **where: Any) -> None:
        self.moves.append(Move(kind, self.operation, self.module, self.line, size, total, messages, **where))

    def repeats(self) -> None:
        """Note that every rank does the whole of the present operator."""
        made = self.meta if isinstance(self.meta, (tuple, list)) else (self.meta,)
        entries = sum(x.numel() for x in made if isinstance(x, Tensor))
        self.repeated.append(Repeated(self.operation, self.module, self.line, entries, self.flops.get(self.node, 0)))

    # Where values lie

    def at(self, value: Value, layout: Layout) -> fx.Node:
        """A value, brought to a layout."""
        if layout in value.nodes:
            return value.nodes[layout]
        if value.fill is not None:
            shape = value.shape if layout is None else layout.shape(value.shape, self.place.rank)
            make = torch.ops.aten.full.default
            node = self.emit(make, list(shape), value.fill, dtype=value.dtype, device=value.device)
        elif None in value.nodes and layout is not None:
            node = self.emit(steps.sliced(layout, self.place), value.nodes[None])
        else:
            node = self._brought(value, layout)
        value.nodes[layout] = node
        return node

    def _brought(self, value: Value, layout: Layout) -> fx.Node:
        source = value.layout
        assert source is not None
        if layout is None:
            self.gathers(value, source)
            return self.emit(steps.whole(source, self.place, self.label), value.nodes[source])
        if (source.dim, source.outer) == (layout.dim, layout.outer):
            self.brings("repartition", value, Repartition(layout.sizes).footprint(partition(source.sizes)))
            step = steps.repartitioned(source, layout.sizes, self.place, self.label)
            return self.emit(step, value.nodes[source])
        if source.dim != layout.dim:
            self.transposes(value, source, layout)
            return self.emit(steps.transposed(source, layout, self.place, self.label), value.nodes[source])
        self.gathers(value, source)  # kept whole for a moment only
        every = self.emit(steps.whole(source, self.place, self.label), value.nodes[source])
        return self.emit(steps.sliced(layout, self.place), every)

    def free(self, value: Value, dims: Iterable[int], prefer: Sequence[int] = ()) -> Layout:
        """A layout in which the named dims are whole. It divides another dim if the value's own layout divides one."""
        if value.layout is None or value.fill is not None:
            return None
        kept = {dim % value.ndim for dim in dims}
        if value.layout.dim not in kept:
            return value.layout
        found = self.divisible(value, kept, prefer)
        return None if found is None else evenly(found, value.shape[found], self.place.ranks)

    def divisible(self, value: Value, without: Iterable[int], prefer: Sequence[int] = ()) -> int | None:
        """A dim that can be divided: one with an entry for each rank at least."""
        ranks, size = self.place.ranks, value.shape
        others = [d for d in range(value.ndim) if d not in set(without) and size[d] >= ranks]
        first = [d % value.ndim for d in prefer if d % value.ndim in others]
        if first:
            return first[0]
        return max(others, key=lambda d: (size[d] % ranks == 0, size[d]), default=None)

    def spatial(self, value: Value) -> Rows | None:
        """A value's layout with rows that are a whole dim, as operators with a halo need them."""
        if value.layout is None or value.layout.outer == 1:
            return value.layout
        return evenly(value.layout.dim, value.shape[value.layout.dim], self.place.ranks)
