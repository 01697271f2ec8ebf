"""What a model computes, as a graph of torch's operators: traced on tensors without memory, at the full shape.

The trace is that of :func:`torch.export.export`, without in-place changes: those become operators that return something
new, and buffers that change are results of the graph. Each node knows the modules whose call it is in.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.export.graph_signature import InputKind, OutputKind

from credit_domain._torch_private import buffers_of, drop_hooks, fake_mode, parameters_of
from credit_domain.containers import mapped, tensors_in
from credit_domain.model.trace import managers_of
from credit_domain.partitioner import autograd_functions, known_values
from credit_domain.partitioner.arithmetic import flops_of
from credit_domain.partitioner.autograd_functions import Applied, marked_functions
from credit_domain.partitioner.known_values import KnownValues
from credit_domain.partitioner.module_names import plain_name
from credit_domain.partitioner.recomputing import Calls, marked_checkpoints
from credit_domain.partitioner.settings import Settings, changed, restore, settings_of, tensors_of
from credit_mesh.extend import set_aside

logger = logging.getLogger(__name__)

one_at_a_time = threading.RLock()
"""While torch traces, it changes what all threads of a process see; ranks may be threads."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call: its tensors in order, and all else.

    Attributes:
        values: Positional and keyword arguments.
        names: Where each tensor stands.
    """

    values: tuple[tuple[Any, ...], dict[str, Any]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """From the arguments of a call."""
        values = (tuple(args), dict(kwargs))
        return cls(values, tuple(name for name, _ in tensors_in(values)))

    @classmethod
    def bound(cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Likewise; an argument has the same name whether it is given by position or by keyword.

        Raises:
            TypeError: If the signature does not take them.
        """
        found = signature.bind(*args, **kwargs)
        return cls.of(found.args, found.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors."""
        return [x for _, x in tensors_in(self.values)]

    def filled(self, tensors: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors."""
        new = iter(tensors)
        filled: tuple[tuple[Any, ...], dict[str, Any]] = mapped(self.values, lambda _, x: next(new))
        return filled


Stored = dict[tuple[str, str], Tensor]
"""Tensors that a forward stores in attributes, by module and attribute."""


class _Flat(nn.Module):
    """A model that takes tensors alone, and returns tensors alone."""

    def __init__(self, model: nn.Module, arguments: Arguments, tell: Callable[[Any, Settings, Stored], None]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.tell = tell

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.arguments.filled(tensors)
        before = tensors_of(self.model)
        buffers = [(buffers_of(m), name, x) for m in self.model.modules() for name, x in buffers_of(m).items()]
        with KnownValues():
            out = self.model(*args, **kwargs)
        for held, name, buffer in buffers:
            new = held.get(name)
            if new is buffer or buffer is None or new is None:
                continue
            if new.requires_grad:
                raise ValueError(f"forward assigns a tensor with a gradient to the buffer {name}; detach() it first")
            buffer.copy_(new)  # what is assigned becomes a change in place
            held[name] = buffer
        stored = {at: value for at, value in tensors_of(self.model).items() if before.get(at) is not value}
        places: list[Tensor] = []
        place: Any = lambda _, x: _Place(places, x)  # noqa: E731
        self.tell(mapped(out, place), settings_of(self.model), stored)  # attributes are put back after the trace
        return tuple(places)


class _Place:
    """Where a tensor stands in what a model returns."""

    def __init__(self, places: list[Tensor], x: Tensor) -> None:
        self.at = len(places)
        places.append(x)


@dataclass(frozen=True)
class Captured:
    """A traced model.

    Attributes:
        graph: Its operators, whose inputs are placeholders.
        inputs: The placeholder of each tensor among the arguments.
        held: Placeholders of parameters, buffers and constants, by the name in the model.
        constants: Values of tensors that are neither, by name.
        outputs: The node of each tensor in what the model returns.
        changed: The node that is the new value of a buffer, by the buffer's name.
        result: What the model returns, with places instead of tensors.
        checkpoints: The keyword arguments of each call of ``torch.utils.checkpoint`` within.
        functions: The calls of functions with a backward of their own.
        flops: Floating-point operations of each operator on the whole.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    held: dict[fx.Node, str]
    constants: dict[str, Tensor]
    outputs: tuple[fx.Node, ...]
    changed: dict[str, fx.Node]
    result: Any
    checkpoints: Calls
    functions: tuple[Applied, ...] = ()
    flops: Mapping[fx.Node, int] = field(default_factory=dict)

    def returned(self, tensors: Any) -> Any:
        """What the model returns, with tensors at their places."""
        return _fill(self.result, tensors)


def _fill(value: Any, tensors: Any) -> Any:
    if isinstance(value, _Place):
        return tensors[value.at]
    if isinstance(value, dict):
        return type(value)((key, _fill(item, tensors)) for key, item in value.items())
    if isinstance(value, tuple):
        made = [_fill(item, tensors) for item in value]
        return value._make(made) if hasattr(value, "_make") else type(value)(made)
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    if hasattr(value, "__dict__"):
        held = {key: _fill(item, tensors) for key, item in vars(value).items()}
        if any(held[key] is not item for key, item in vars(value).items()):
            new = copy.copy(value)
            for key, item in held.items():
                object.__setattr__(new, key, item)
            return new
    return value


class Ghost:
    """A copy of a model whose tensors hold no memory, to be traced again when the model itself has been changed."""

    def __init__(self, model: nn.Module) -> None:
        with one_at_a_time:
            self._copy(model)

    def _copy(self, model: nn.Module) -> None:
        self.mode = fake_mode()
        memo = managers_of(model)
        with self.mode:
            for module in model.modules():
                for _name, parameter in parameters_of(module).items():
                    if parameter is not None and id(parameter) not in memo:
                        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                        memo[id(parameter)] = nn.Parameter(_like(part), requires_grad=parameter.requires_grad)
                for name, buffer in buffers_of(module).items():  # noqa: B007 - a pair
                    if buffer is not None:
                        memo[id(buffer)] = _like(buffer)
                for value in vars(module).values():
                    if isinstance(value, Tensor) and not value.is_leaf:  # a hook computes it, and will again
                        memo[id(value)] = value.detach().clone()
        # Parameters that forward does not see as they are registered: tensor parallelism shows it a part.
        self.presented = frozenset(
            f"{plain_name(name)}.{parameter}".removeprefix(".")
            for name, module in model.named_modules()
            for parameter, value in parameters_of(module).items()
            if isinstance(value, DTensor) or hasattr(type(module), parameter)
        )
        self.model = copy.deepcopy(model, memo)
        self.dtype: torch.dtype | None = None  # of the first argument, when the model was traced first
        self._dtypes: dict[int, dict[str, torch.dtype]] = {}
        self._harmless: set[str] = set()  # attributes that forward stores, and does not depend on
        for module in self.model.modules():
            drop_hooks(module)  # the modules themselves call them when they run

    @property
    def signature(self) -> inspect.Signature:
        """What the model takes."""
        return inspect.signature(self.model.forward)

    def capture(self, arguments: Arguments, settings: Settings) -> Captured:
        """Trace the model.

        Args:
            arguments: Its arguments, with tensors of the full shape; their values are not read.
            settings: The attributes of its modules, of which ``training`` is one.

        Raises:
            ValueError: If it cannot be traced, with what torch says; if forward depends on what it stores itself.
        """
        with one_at_a_time:
            return self._checked(arguments, settings)

    def _checked(self, arguments: Arguments, settings: Settings) -> Captured:
        captured, after, tensors = self._capture(arguments, settings)
        stored = [name for name in changed(settings_of(self.model), after) if name not in self._harmless]
        kept = [".".join(filter(None, at)) for at in tensors]
        if stored or set(kept) - self._harmless:
            with self._holding(tensors):
                again, _, _ = self._capture(arguments, after)
            held = set(captured.held.values())
            if str(again.graph) != str(captured.graph) or held.intersection(kept):
                raise ValueError(
                    f"forward of {type(self.model).__name__} changes {', '.join([*stored, *kept][:8])}, and what it "
                    "does depends on that: each call would be another program. Change such an attribute outside of "
                    "forward, or make it a buffer"
                )
            if kept:
                logger.warning(
                    "forward of %s stores tensors in %s. A program does not: return them, to use them in a loss",
                    *(type(self.model).__name__, ", ".join(kept[:8])),
                )
            self._harmless.update(stored, kept)
        return captured

    @contextmanager
    def _holding(self, tensors: Stored) -> Iterator[None]:
        """While this lasts, modules hold stand-ins for tensors that forward has stored."""
        modules = {plain_name(name): module for name, module in self.model.named_modules()}
        before = [(vars(modules[name]), attribute, vars(modules[name]).get(attribute)) for name, attribute in tensors]
        with self.mode:
            for (name, attribute), value in tensors.items():
                vars(modules[name])[attribute] = _like(value)
        try:
            yield
        finally:
            for held, attribute, value in before:
                held[attribute] = value

    def _cast(self, dtype: torch.dtype | None) -> None:
        """Let parameters have the dtype of the first argument, where they had it first: FSDP2 casts both."""
        self.dtype = self.dtype or dtype
        with self.mode:
            for module in self.model.modules():
                for name, parameter in parameters_of(module).items():
                    if parameter is None or dtype is None:
                        continue
                    first = self._dtypes.setdefault(id(module), {}).setdefault(name, parameter.dtype)
                    wanted = dtype if first == self.dtype else first
                    if parameter.dtype != wanted and wanted.is_floating_point:
                        cast = nn.Parameter(_like(parameter).to(wanted), requires_grad=parameter.requires_grad)
                        parameters_of(module)[name] = cast

    def _capture(self, arguments: Arguments, settings: Settings) -> tuple[Captured, Settings, Stored]:
        """The trace, the attributes after a forward, and the tensors that it stored in some."""
        restore(self.model, settings)
        drawn = _drawn()
        numbers = [x.dtype for x in arguments.tensors if x.is_floating_point()]
        self._cast(numbers[0] if numbers else None)
        with self.mode:
            tensors = tuple(_like(x, device_of(x)).requires_grad_(x.requires_grad) for x in arguments.tensors)
        results: list[Any] = []
        flat = _Flat(self.model, arguments, lambda *told: results.append(told))
        try:
            device = next((x.device.type for x in tensors if not x.is_meta), "cpu")
            apart = torch.autocast(device, enabled=False)  # what casts there is done when the program runs
            with warnings.catch_warnings(), set_aside(), torch.enable_grad(), apart:
                warnings.simplefilter("ignore")  # torch warns of its own code
                with marked_checkpoints(self.model) as checkpoints, marked_functions() as functions:
                    exported = torch.export.export(flat, tensors, strict=False)
                    _detach_without_grad(exported.graph_module)
                    exported = exported.run_decompositions({})
                    if drew := [name for name, state in _drawn().items() if state != drawn.get(name, state)]:
                        raise ValueError(
                            f"forward draws random numbers with {' and '.join(drew)}, which a program would keep: draw "
                            "them with torch, or outside of forward and pass them"
                        )
                    result, after, stored = results[-1]
                    return _read(exported, result, checkpoints, tuple(functions)), after, stored
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} cannot be traced: {type(error).__name__}: {_short(error)}"
            ) from error


def _drawn() -> dict[str, Any]:
    """The states of the generators that are not torch's."""
    states: dict[str, Any] = {"random": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        states["numpy.random"] = (state[1].tobytes(), *state[2:])
    return states


def device_of(x: Tensor) -> torch.device:
    """Where a tensor is, or will be: one on the meta device may stand for one elsewhere."""
    found: torch.device = getattr(x, "real_device", x.device)
    return found


def _like(x: Tensor, device: torch.device | None = None) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)


def _short(error: Exception) -> str:
    """What torch says, without its hints for those who work on torch."""
    hints = ("For ", "If you ", "Caused by", "consider using", "The error above")
    text = str(error)
    for mode in (known_values, autograd_functions):  # torch names who called it last, which a mode of ours may be
        own = re.compile(rf'^  File "{re.escape(str(mode.__file__))}".*\n.*$', re.MULTILINE)
        text = own.sub(lambda _: _place(error), text)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(hints)]
    return "\n".join(lines[:12])


def _place(error: Exception) -> str:
    """The last line of the model, or of what it calls, that an error came through."""
    aside = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(aside)]
    return f'  File "{frames[-1].filename}", line {frames[-1].lineno}, in {frames[-1].name}\n    {frames[-1].line}'


def _detach_without_grad(module: fx.GraphModule) -> None:
    """Put what was computed under ``torch.no_grad`` where it was called, on inputs without gradients.

    The next step of torch would put it there with gradients.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        enabled, inner, *args = node.args
        body = getattr(module, inner.target)
        if enabled:
            raise ValueError("torch.enable_grad within torch.no_grad cannot be traced")
        changed = _changed_inputs(body.graph)
        values: dict[fx.Node, Any] = {}
        with graph.inserting_before(node):
            for placeholder, arg in zip((n for n in body.graph.nodes if n.op == "placeholder"), args, strict=True):
                if placeholder in changed and arg.op != "placeholder":
                    raise ValueError("a tensor is changed in place under torch.no_grad; use detach() or a new tensor")
                values[placeholder] = arg
                if placeholder not in changed and isinstance(arg, fx.Node) and isinstance(arg.meta["val"], Tensor):
                    values[placeholder] = graph.call_function(torch.ops.aten.detach.default, (arg,))
                    values[placeholder].meta = dict(
                        arg.meta, **{"nn_module_stack": node.meta.get("nn_module_stack", {})}
                    )
            out = graph.graph_copy(body.graph, values)
        results = out if isinstance(out, (tuple, list)) else (out,)
        for user in list(node.users):
            assert user.target is not None
            assert user.args[0] is node
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def _changed_inputs(graph: fx.Graph) -> set[fx.Node]:
    changed = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        named = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed.add(named.get(argument.name))
    return {node for node in changed if isinstance(node, fx.Node) and node.op == "placeholder"}


def _check_shape(node: fx.Node) -> None:
    """Refuse a shape that depends on data."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    if all(isinstance(size, int) for x in values if isinstance(x, Tensor) for size in x.shape):
        return
    place = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File" in line]
    raise ValueError(f"the shape of what {node.target} returns depends on data ({place[-1] if place else node.name})")


def _read(exported: Any, result: Any, checkpoints: Calls, functions: tuple[Applied, ...]) -> Captured:
    graph, signature = exported.graph, exported.graph_signature
    nodes = {node.name: node for node in graph.nodes}
    inputs, held = [], {}
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            held[node] = plain_name(spec.target.removeprefix("model."))
        else:
            raise ValueError(f"an input of the kind {spec.kind.name} ({spec.target}) cannot be partitioned")
    for node in graph.nodes:
        _check_shape(node)
    outputs, changed = [], {}
    for spec, node in zip(signature.output_specs, graph.output_node().args[0], strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            outputs.append(node)
        elif spec.kind is OutputKind.BUFFER_MUTATION:
            changed[plain_name(spec.target.removeprefix("model."))] = node
        else:
            raise ValueError(f"forward changes {spec.target} in place; change a copy of it instead")
    constants = {
        plain_name(name.removeprefix("model.")): x for name, x in exported.constants.items() if isinstance(x, Tensor)
    }
    found = (graph, tuple(inputs), held, constants, tuple(outputs), changed, result, checkpoints, functions)
    return Captured(*found, {node: flops_of(node) for node in graph.nodes})
