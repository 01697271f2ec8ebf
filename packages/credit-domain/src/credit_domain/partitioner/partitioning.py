"""Partitioning a model: trace, decide for each operator how rows lie, write this rank's program, put it in place."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from credit_domain._torch_private import buffers_of
from credit_domain.engine.ranks import domain_of, new_layer, sizes_of
from credit_domain.model.trace import arguments_of, is_shape
from credit_domain.partitioner.capture import Arguments, Captured, Ghost, device_of, one_at_a_time
from credit_domain.partitioner.module_names import module_of
from credit_domain.partitioner.partition_report import PartitionReport
from credit_domain.partitioner.programs import Partitioned, Program, Writer, become, scopes_of
from credit_domain.partitioner.settings import classes_of, replaced, settings_key, settings_of
from credit_domain.partitioner.steps import Place, Planned
from credit_domain.partitioner.writing import Writing
from credit_halo.extend import agree, has_agreed
from credit_mesh import DomainParallelManager, RowPartition

logger = logging.getLogger(__name__)


_MANY = 16  # traces after which something may change that should not


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
        known: The arguments that it was partitioned with.
        classes: The classes of its modules, once it was partitioned.
        seen: Identities of the modules that were compared with them.
        captured: What was traced, by the shapes of the whole and the modes.
        traces: The programs that were written, by all that they depend on.
        by_shape: Those for tensors as positional arguments, by their shapes here and the mode of the model.
    """

    ghost: Ghost
    manager: DomainParallelManager
    shard_dim: int
    divided: frozenset[str]
    known: frozenset[str]
    classes: dict[str, type] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    traces: dict[Any, Trace] = field(default_factory=dict)
    by_shape: dict[Any, Trace] = field(default_factory=dict)
    captured: dict[Any, Captured] = field(default_factory=dict)
    numbers: int = 0
    layer: Any = field(default_factory=new_layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Partition:  # programs name no module
        known = {"traces": dict(self.traces), "by_shape": dict(self.by_shape), "captured": dict(self.captured)}
        return dataclasses.replace(self, **known, layer=new_layer())  # type: ignore[arg-type]

    def run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model on this rank's rows."""
        if torch.compiler.is_compiling():
            return self._run_compiled(model, args, kwargs)
        self._check_modules(model)
        arguments = Arguments.bound(self.ghost.signature, args, kwargs)
        sizes = self._sizes(arguments)
        trace = self.trace(model, arguments, sizes)
        if trace.draws:
            self._agree_on_seed(arguments.tensors[0].device)
        return self._run(model, trace, arguments.tensors)

    def _check_modules(self, model: nn.Module) -> None:
        """Refuse a model whose modules have been replaced; wrappers may be added."""
        modules = [id(module) for module in model.modules()]
        if modules == self.seen:
            return
        if others := replaced(model, self.classes):
            raise ValueError(
                f"{type(model).__name__} was changed after it was partitioned ({', '.join(others[:8])}): partition a "
                "new one, once its modules are those that it is to have"
            )
        self.seen = modules

    def _run_compiled(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Likewise while torch.compile traces, which cannot write a program meanwhile."""
        tensors = [*args, *kwargs.values()]
        key = (tuple([tuple(x.shape) for x in tensors if isinstance(x, Tensor)]), model.training)
        if kwargs or len(key[0]) < len(tensors) or key not in self.by_shape:
            raise ValueError(
                "no program is known for a compiled call with these shapes in this mode: call the model once before it "
                "is compiled, and pass tensors as positional arguments alone"
            )
        return self._run(model, self.by_shape[key], tensors)

    def _run(self, model: nn.Module, trace: Trace, tensors: Sequence[Tensor]) -> Any:
        outs = model._programs[trace.number](model, *tensors)  # type: ignore[index, operator]
        outs = outs if isinstance(outs, tuple) else (outs,)
        kept = len(outs) - len(trace.buffers)
        with torch.no_grad():
            for name, value in zip(trace.buffers, outs[kept:], strict=True):
                owner, _, last = name.rpartition(".")
                buffer = buffers_of(module_of(model, owner))[last]
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
            what = "random numbers of a partitioned model (seed all ranks of the domain alike)"
            agree(group, ("seed", seed), what, lambda: said, device)

    def _sizes(self, arguments: Arguments) -> tuple[int, ...]:
        for name, x in zip(arguments.names, arguments.tensors, strict=True):
            if name not in self.known and x.ndim >= 3:
                raise ValueError(
                    f"the argument {name} of shape {tuple(x.shape)} was not among the example inputs, so it is not "
                    "known whether its rows are divided: partition the model with all arguments of three dims or more"
                )
        for name, x in zip(arguments.names, arguments.tensors, strict=True):
            if name in self.divided:
                return sizes_of(x, self.shard_dim, domain_of(self.manager), "the model's input", None, self.layer)
        raise ValueError(f"the call has none of the arguments that had rows: {', '.join(sorted(self.divided))}")

    def trace(self, model: nn.Module, arguments: Arguments, sizes: tuple[int, ...]) -> Trace:
        """The program for a call; traced the first time.

        Raises:
            ValueError: If the model cannot be traced, or an operator cannot be divided.
        """
        modes = settings_key(model)
        shapes = tuple((tuple(x.shape), x.dtype, device_of(x), x.requires_grad) for x in arguments.tensors)
        rest = repr(arguments.filled(arguments.names))
        key = (arguments.names, shapes, rest, sizes, modes)
        if key not in self.traces:
            if len(self.traces) == _MANY:
                what = "%s has been traced %d times, for other shapes or attributes of its modules each time"
                logger.warning(what, type(model).__name__, _MANY)
            self.traces[key] = self._traced(model, self._whole(arguments, sizes), sizes)
            if not arguments.values[1] and len(arguments.names) == len(arguments.values[0]):
                self.by_shape[tuple(tuple(x.shape) for x in arguments.tensors), model.training] = self.traces[key]
        return self.traces[key]

    def local(self, arguments: Arguments, partition: RowPartition) -> Arguments:
        """Stand-ins for this rank's arguments; they hold no memory."""
        made = []
        for name, x in zip(arguments.names, arguments.tensors, strict=True):
            shape = list(x.shape)
            if name in self.divided:
                shape[self.shard_dim] = partition.sizes[self.manager.domain_rank]
            made.append(torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=x.requires_grad))
            made[-1].real_device = device_of(x)  # type: ignore[attr-defined]
        return Arguments(arguments.filled(made), arguments.names)

    def _whole(self, arguments: Arguments, sizes: tuple[int, ...]) -> Arguments:
        """Arguments with tensors of the full shape, without memory."""
        made = []
        for name, x in zip(arguments.names, arguments.tensors, strict=True):
            shape = list(x.shape)
            if name in self.divided:
                shape[self.shard_dim] = sum(sizes)
            made.append(torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=x.requires_grad))
            made[-1].real_device = device_of(x)  # type: ignore[attr-defined]
        return Arguments(arguments.filled(made), arguments.names)

    def _traced(self, model: nn.Module, whole: Arguments, sizes: tuple[int, ...]) -> Trace:
        start, settings = time.monotonic(), settings_of(model)
        domain = domain_of(self.manager)
        device = _where_to_agree(model, domain.process_group)
        what = f"partitioning {type(model).__name__}"
        if domain.process_group is not None:  # ranks that are threads must not run anything while one traces
            agree(domain.process_group, None, what, lambda: f"sizes {sizes}", device)
        problem = made = None
        try:
            with one_at_a_time:
                shapes = tuple((tuple(x.shape), x.dtype, device_of(x), x.requires_grad) for x in whole.tensors)
                kind = (shapes, repr(whole.filled(whole.names)), settings_key(model))
                if kind not in self.captured:
                    self.captured[kind] = self.ghost.capture(whole, settings)
                captured = self.captured[kind]
                place = Place(Planned(self.manager), self.manager.domain_rank, self.manager.domain_parallel_size)
                made = Writing(captured, model, place, self.shard_dim, sizes, self.divided, whole.names)
                builder, inputs, outputs = made.write()
        except ValueError as error:
            problem = str(error)
        if domain.process_group is not None:
            # Without source lines: the files may lie elsewhere on another machine.
            sent = [] if problem else [(m.kind, m.operation, m.module, m.bytes) for m in builder.moves]
            said = f"moves {sent}"
            agree(domain.process_group, None, what, lambda: said, device, problem)
        elif problem is not None:
            raise ValueError(problem)
        assert made is not None
        keep = functools.partial(self._keep, model)
        writer = Writer(made.held, captured.checkpoints, keep, self.ghost.presented)
        number = writer.write(scopes_of(builder.graph), inputs, outputs)
        operators = sum(node.op == "call_function" for node in captured.graph.nodes)
        blocks = math.lcm(*builder.blocks)
        granularity = blocks if blocks * len(sizes) <= sum(sizes) else 1
        moves, seconds = tuple(builder.moves), time.monotonic() - start
        done = (sum(captured.flops.values()), builder.repeated_flops)
        report = PartitionReport(moves, tuple(builder.repeated), operators, granularity, seconds, *done)
        logger.info("%s", report)
        return Trace(number, captured, tuple(captured.changed), builder.draws, report)

    def _keep(self, model: nn.Module, name: str, program: Program) -> int:
        module = module_of(model, name)
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


def partition_model(
    model: nn.Module,
    example_inputs: Any,
    manager: DomainParallelManager,
    *,
    shard_dim: int = -2,
) -> nn.Module:
    """Partition a model, in place, operation by operation, so that ranks with rows give the numbers of one rank.

    The model is traced once on tensors without memory, at the full shape. A rule for each operator of the trace decides
    how its rows lie, and writes its part of this rank's program. Each module of the model then runs its part of the
    program. So hooks, FSDP2, activation checkpoints and the state dict find what they know. A call with another batch,
    height or mode of the modules is traced again by itself.

    Args:
        model: The model. Parameters stay the same objects under the same names.
        example_inputs: Its arguments of the **whole**: a tensor, a shape, or a tuple or dict of them. An
            argument is a tensor, a shape or anything else that ``forward`` takes. Values of tensors are not read; those
            on the meta device hold no memory. An argument is sharded if it has three dims or more, and as many rows as
            the first such argument.
        manager: The domain-parallel manager. Where no partition is declared yet, its granularity is set so that
            windows of the model move no rows.
        shard_dim: The sharded dim; -2 is latitude in (B, C, H, W).

    Returns:
        The model. It takes and returns this rank's rows. A result without rows is the same on every rank, and counts
        once for each (see :mod:`credit_halo.collectives`).

    Raises:
        ValueError: On all ranks alike, if the model is partitioned already, or if torch cannot trace it. The message
            has torch's reason. The model is not changed then.

    Collectives:
        Two small all-gathers for each trace. In a call those of the report (:func:`partition_report`).
    """
    if getattr(model, "_partition", None) is not None:
        raise ValueError(f"{type(model).__name__} is partitioned already")
    ghost = Ghost(model)
    arguments, divided, rows = whole_arguments(model, ghost, example_inputs, shard_dim)
    partition = Partition(ghost, manager, shard_dim, divided, frozenset(arguments.names))
    declared = manager.partition
    if declared is None or declared.rows != rows:
        declared = RowPartition.even(rows, manager.domain_parallel_size, getattr(manager, "granularity", 1))
    model.__dict__["_partition"] = partition
    try:
        trace = partition.trace(model, partition.local(arguments, declared), declared.sizes)
        if manager.partition is None and trace.report.granularity > 1:
            # Nobody has divided rows yet: they can be divided so that the model's windows move none.
            manager.granularity = math.lcm(manager.granularity, trace.report.granularity)
            blocks = RowPartition.even(rows, manager.domain_parallel_size, manager.granularity)
            other = partition.trace(model, partition.local(arguments, blocks), blocks.sizes)
            trace = other if len(other.report.moves) < len(trace.report.moves) else trace
    except BaseException:
        del model.__dict__["_partition"]
        raise
    partition.classes = classes_of(model)
    model.__dict__["_partition_report"] = trace.report
    return model


def whole_arguments(
    model: nn.Module, ghost: Ghost, inputs: Any, shard_dim: int
) -> tuple[Arguments, frozenset[str], int]:
    """The arguments of the whole without memory, which of them have rows, and how many.

    Raises:
        ValueError: If none of them has rows.
    """
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

    args, kwargs = arguments_of(inputs, unreal)
    arguments = Arguments.bound(ghost.signature, args, kwargs)
    rows = next((x.shape[shard_dim] for x in arguments.tensors if x.ndim >= 3), None)
    if rows is None:
        raise ValueError("example_inputs must have a tensor with three dims or more, whose rows are to be sharded")
    named = zip(arguments.names, arguments.tensors, strict=True)
    return arguments, frozenset(name for name, x in named if x.ndim >= 3 and x.shape[shard_dim] == rows), rows


def _where_to_agree(model: nn.Module, group: ProcessGroup | None) -> torch.device:
    """A device whose tensors the group can move; the model may be on the meta device."""
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    return torch.device("cuda" if group is not None and "nccl" in dist.get_backend(group) else "cpu")


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
