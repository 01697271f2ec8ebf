"""Partitioning a model: trace, decide for each operator how rows lie, write this rank's program, put it in place."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from credit_domain._torch_private import buffers_of
from credit_domain.engine.ranks import domain_of, new_layer, sizes_of
from credit_domain.model.trace import arguments_of, is_shape
from credit_domain.partitioner.builder import Builder, Move, Repeated, Value
from credit_domain.partitioner.capture import Arguments, Captured, Ghost
from credit_domain.partitioner.layout import plain, scaled
from credit_domain.partitioner.programs import Partitioned, Program, Writer, become, scopes_of
from credit_domain.partitioner.rules import rule_for
from credit_domain.partitioner.rules.pointwise import is_pointwise, pointwise
from credit_domain.partitioner.steps import Place, Planned, named
from credit_halo.extend import agree, has_agreed
from credit_mesh import DomainParallelManager, RowPartition

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartitionReport:
    """What a program sends, and what it does on every rank; prints as a table.

    Attributes:
        moves: Everything that goes from rank to rank in a forward.
        repeated: Operators on rows that every rank does as a whole.
        operators: Operators of the traced model.
        seconds: What tracing and writing the program took.
    """

    moves: tuple[Move, ...]
    repeated: tuple[Repeated, ...]
    operators: int
    seconds: float

    @property
    def gathered(self) -> tuple[Move, ...]:
        """The values that every rank brings together as a whole."""
        return tuple(move for move in self.moves if move.kind == "gather")

    def __str__(self) -> str:
        lines = [
            f"{self.operators} operators; {len(self.moves)} messages, {len(self.gathered)} of which gather a whole value; "
            f"every rank repeats {len(self.repeated)} operators; traced in {self.seconds:.1f} s"
        ]
        for move in self.gathered:
            lines.append(f"  gathers  {move.module or '(model)'}: {move.operation}, {move.bytes} bytes  {move.line}")
        for each in self.repeated:
            lines.append(
                f"  repeats  {each.module or '(model)'}: {each.operation}, {each.entries} entries  {each.line}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Trace:
    """A program for one kind of call.

    Attributes:
        number: The number of the model's own program.
        captured: What the model computes.
        buffers: Names of the buffers that it changes; their values follow its results.
        draws: Whether it draws random numbers.
        report: What it sends.
    """

    number: int
    captured: Captured
    buffers: tuple[str, ...]
    draws: bool
    report: PartitionReport


@dataclass
class Partition:
    """What a partitioned model knows of itself.

    Attributes:
        ghost: The model as it was, without memory.
        manager: Its manager.
        shard_dim: The sharded dim.
        divided: Which of its arguments have rows, by name.
        traces: The programs that were written.
    """

    ghost: Ghost
    manager: DomainParallelManager
    shard_dim: int
    divided: frozenset[str]
    traces: dict[Any, Trace] = field(default_factory=dict)
    numbers: int = 0
    layer: Any = field(default_factory=new_layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Partition:
        return self  # programs name no module

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model on this rank's rows."""
        arguments = Arguments.of(args, kwargs)
        sizes = self._sizes(arguments)
        trace = self.trace(model, arguments, sizes)
        if trace.draws:
            self._agree_on_seed(arguments.tensors[0].device)
        outs = model._programs[trace.number](model, *arguments.tensors)  # type: ignore[index, operator]
        outs = outs if isinstance(outs, tuple) else (outs,)
        kept = len(outs) - len(trace.buffers)
        with torch.no_grad():
            for name, value in zip(trace.buffers, outs[kept:], strict=True):
                owner, _, last = name.rpartition(".")
                buffer = buffers_of(model.get_submodule(owner))[last]
                assert buffer is not None
                buffer.copy_(value)
        return trace.captured.returned(outs[:kept])

    def _agree_on_seed(self, device: torch.device) -> None:
        """Make sure, once for each seed, that all ranks draw the same random numbers."""
        group = domain_of(self.manager).process_group
        seed = torch.initial_seed() if device.type == "cpu" else torch.cuda.initial_seed()
        if group is not None and not has_agreed(group, ("seed", seed)):
            state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
            said = f"the state {hashlib.sha256(state.numpy().tobytes()).hexdigest()[:16]} of the random generator"
            what = "a model that draws random numbers; seed all ranks of the domain alike"
            agree(group, ("seed", seed), what, lambda: said, device)

    def _sizes(self, arguments: Arguments) -> tuple[int, ...]:
        for name, x in zip(arguments.names, arguments.tensors, strict=True):
            if name in self.divided:
                return sizes_of(x, self.shard_dim, domain_of(self.manager), "the model's input", None, self.layer)
        raise ValueError(f"the call has none of the arguments that had rows: {', '.join(sorted(self.divided))}")

    def trace(self, model: nn.Module, arguments: Arguments, sizes: tuple[int, ...]) -> Trace:
        """The program for a call; traced the first time.

        Raises:
            ValueError: If the model cannot be traced, or an operator cannot be divided.
        """
        training = {name: module.training for name, module in model.named_modules()}
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in arguments.tensors)
        others = repr(arguments.filled(arguments.names))
        key = (arguments.names, shapes, others, sizes, tuple(training.values()))
        if key not in self.traces:
            self.traces[key] = self._traced(model, self._whole(arguments, sizes), training, sizes)
        return self.traces[key]

    def _whole(self, arguments: Arguments, sizes: tuple[int, ...]) -> Arguments:
        """Arguments with tensors of the full shape, without memory."""
        made = []
        for name, x in zip(arguments.names, arguments.tensors, strict=True):
            shape = list(x.shape)
            if name in self.divided:
                shape[self.shard_dim] = sum(sizes)
            made.append(torch.empty(shape, dtype=x.dtype, device="meta"))
            made[-1].real_device = x.device  # type: ignore[attr-defined]
        return Arguments(arguments.filled(made), arguments.names)

    def _traced(
        self, model: nn.Module, whole: Arguments, training: Mapping[str, bool], sizes: tuple[int, ...]
    ) -> Trace:
        start = time.monotonic()
        domain = domain_of(self.manager)
        device = next((x.device for x in model.parameters()), torch.device("cpu"))
        what = f"partitioning {type(model).__name__}"
        if domain.process_group is not None:  # ranks that are threads must not run anything while one traces
            agree(domain.process_group, None, what, lambda: f"sizes {sizes}", device)
        problem = made = None
        try:
            captured = self.ghost.capture(whole, training)
            place = Place(Planned(self.manager), self.manager.domain_rank, self.manager.domain_parallel_size)
            made = Writing(captured, model, place, self.shard_dim, sizes, self.divided, whole.names)
            builder, inputs, outputs = made.write()
        except ValueError as error:
            problem = str(error)
        if domain.process_group is not None:
            said = f"{builder.moves}" if problem is None else ""
            agree(domain.process_group, None, what, lambda: said, device, problem)
        elif problem is not None:
            raise ValueError(problem)
        assert made is not None
        writer = Writer(made.held, lambda name, program: self._keep(model, name, program))
        number = writer.write(scopes_of(builder.graph), inputs, outputs)
        operators = sum(node.op == "call_function" for node in captured.graph.nodes)
        report = PartitionReport(tuple(builder.moves), tuple(builder.repeated), operators, time.monotonic() - start)
        logger.info("%s", report)
        return Trace(number, captured, tuple(captured.changed), builder.draws, report)

    def _keep(self, model: nn.Module, name: str, program: Program) -> int:
        module = model.get_submodule(name)
        become(module, PartitionedModel if module is model else Partitioned)
        module.__dict__.pop("forward", None)
        self.numbers += 1
        module.__dict__.setdefault("_programs", {})[self.numbers] = program
        return self.numbers


class PartitionedModel(Partitioned):
    """What the model itself is besides its class: it takes this rank's rows of its arguments."""

    _partition: Partition

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute this rank's rows of what the model returns."""
        model: Any = self
        return self._partition.run(model, args, kwargs)


@dataclass
class Writing:
    """One trace, while it becomes a program."""

    captured: Captured
    model: nn.Module
    place: Place
    shard_dim: int
    sizes: tuple[int, ...]
    divided: frozenset[str]
    names: tuple[str, ...]
    held: dict[fx.Node, str] = field(default_factory=dict)

    def write(self) -> tuple[Builder, list[fx.Node], list[fx.Node]]:
        """The program, its inputs and its results."""
        builder = Builder(self.place, self.sizes, self._constant)
        inputs = []
        for name, node in zip(self.names, self.captured.inputs, strict=True):
            like = node.meta["val"]
            written = builder.graph.placeholder(node.name)
            inputs.append(written)
            layout = plain(self.shard_dim % like.ndim, self.sizes) if name in self.divided else None
            builder.values[node] = Value(like, layout, written)
        for node, name in self.captured.held.items():
            if name in self.captured.constants:
                constant = self.captured.constants[name]
                written = builder.emit(named(lambda constant=constant: constant, "constant"))
            else:
                written = builder.graph.get_attr(name)
                self.held[written] = name
            builder.values[node] = Value(node.meta["val"], None, written)
        for node in self.captured.graph.nodes:
            if node.op == "call_function":
                builder.node = node
                builder.values[node] = self._written(builder, node)
        builder.node = self.captured.graph.output_node()
        outputs = [self._result(builder, builder.values[node]) for node in self.captured.outputs]
        outputs += [builder.at(builder.values[node], None) for node in self.captured.changed.values()]
        return builder, inputs, outputs

    def _written(self, builder: Builder, node: fx.Node) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: builder.values[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: builder.values[n])
        if getattr(node.target, "__name__", "") == "getitem":
            return args[0][args[1]]
        rule: Callable[..., Any] = pointwise if is_pointwise(node.target) else rule_for(node.target)
        return rule(builder, *args, **kwargs)

    def _result(self, b: Builder, value: Value) -> fx.Node:
        """How a result is given back: its rows, where it has them."""
        layout, ndim = value.layout, value.ndim
        dim = self.shard_dim % ndim if ndim >= 3 else None
        rows = sum(self.sizes)
        if dim is None:
            return b.at(value, None)
        if value.shape[dim] == rows:
            return b.at(value, plain(dim, self.sizes))
        if layout is None or (layout.dim == dim and layout.outer == 1):
            return b.at(value, layout)
        return b.at(value, plain(dim, scaled(self.sizes, value.shape[dim])))

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node that follows from constants alone."""
        if node.op == "placeholder":
            name = self.captured.held.get(node)
            if name is None or name in self.captured.changed:
                return None
            if name in self.captured.constants:
                return self.captured.constants[name]
            owner, _, last = name.rpartition(".")
            found = buffers_of(self.model.get_submodule(owner)).get(last)
            return None if found is None or found.is_meta else found.detach()
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        found_args = {used: self._constant(used) for used in node.all_input_nodes}
        if any(value is None for value in found_args.values()):
            return None
        args: Any = fx.map_arg(node.args, lambda n: found_args[n])
        target: Any = node.target
        made = target(*args, **fx.map_arg(node.kwargs, lambda n: found_args[n]))
        return made if isinstance(made, Tensor) else None


def partition_model(
    model: nn.Module,
    example_inputs: Any,
    manager: DomainParallelManager,
    *,
    shard_dim: int = -2,
) -> nn.Module:
    """Partition a model, in place, operation by operation, so that it works on sharded rows with the numbers of one rank.

    The model is traced once on tensors without memory, at the full shape. For each operator of the trace it is decided how
    its rows lie, and this rank's program is written. Each module of the model then runs its part of the program, so that
    hooks, FSDP2, activation checkpoints and the state dict find what they know. A call with another batch, mode or height
    is traced again by itself.

    Args:
        model: The model. Parameters stay the same objects under the same names.
        example_inputs: Its arguments of the **whole**: a tensor, a shape, or a tuple or dict of arguments, of which each
            is a tensor, a shape or anything else that ``forward`` takes. Values of tensors are not read; tensors on the
            meta device hold no memory. What has as many rows as the first tensor with three dims or more is sharded.
        manager: The domain-parallel manager.
        shard_dim: The sharded dim; -2 is latitude in (B, C, H, W).

    Returns:
        The model. It takes and returns this rank's rows. What it returns without rows is the same on every rank, and
        counts once for each (see :mod:`credit_halo.collectives`).

    Raises:
        ValueError: If the model cannot be traced, with what torch says, or an operator cannot be divided; for every rank
            alike. The model is not changed then.

    Collectives:
        None here; those of the report (:func:`partition_report`) in a call.
    """
    if getattr(model, "_partition", None) is not None:
        raise ValueError(f"{type(model).__name__} is partitioned already")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def unreal(value: Any) -> Any:
        if is_shape(value):
            made = torch.empty(tuple(value), dtype=_dtype_of(model), device="meta")
            made.real_device = device  # type: ignore[attr-defined]
            return made
        if isinstance(value, Tensor):
            value = value.detach()
            value.real_device = device if value.is_meta else value.device
        return value

    args, kwargs = arguments_of(example_inputs, unreal)
    arguments = Arguments.of(args, kwargs)
    rows = next((x.shape[shard_dim] for x in arguments.tensors if x.ndim >= 3), None)
    if rows is None:
        raise ValueError("example_inputs must have a tensor with three dims or more, whose rows are to be sharded")
    divided = frozenset(
        name
        for name, x in zip(arguments.names, arguments.tensors, strict=True)
        if x.ndim >= 3 and x.shape[shard_dim] == rows
    )
    partition = Partition(Ghost(model), manager, shard_dim, divided)
    declared = manager.partition
    if declared is None or declared.rows != rows:
        declared = RowPartition.even(rows, manager.domain_parallel_size, getattr(manager, "granularity", 1))
    training = {name: module.training for name, module in model.named_modules()}
    model.__dict__["_partition"] = partition
    try:
        trace = partition._traced(model, arguments, training, declared.sizes)
    except BaseException:
        del model.__dict__["_partition"]
        raise
    model.__dict__["_partition_report"] = trace.report
    return model


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def partition_report(model: nn.Module) -> PartitionReport:
    """What the program of a partitioned model sends.

    Raises:
        ValueError: If the model is not partitioned.
    """
    report = getattr(model, "_partition_report", None)
    if not isinstance(report, PartitionReport):
        raise ValueError(f"{type(model).__name__} is not partitioned: call partition_model first")
    return report
