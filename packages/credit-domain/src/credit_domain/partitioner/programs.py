"""From one list of operators to a program for each call of each module."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import fx, nn
from torch.distributed.tensor import DTensor

from credit_domain._torch_private import parameters_of
from credit_domain.partitioner.module_names import plain_name
from credit_domain.partitioner.recomputing import Calls, recomputed
from credit_domain.partitioner.steps import named

Program = Callable[..., Any]


@dataclass
class Scope:
    """A call of a module: what it computes, in order.

    Attributes:
        path: The keys of the calls that it is in, and its own.
        name: Qualified name of the module.
        checkpoint: The number of the call of ``torch.utils.checkpoint``, where it is one and not of a module.
        items: Nodes of the whole program, and calls of modules.
    """

    path: tuple[str, ...]
    name: str
    checkpoint: int | None = None
    items: list[fx.Node | Scope] = field(default_factory=list)

    def nodes(self) -> Iterable[fx.Node]:
        """Every node of the call, and of those within."""
        for item in self.items:
            if isinstance(item, Scope):
                yield from item.nodes()
            else:
                yield item


def scopes_of(graph: fx.Graph) -> Scope:
    """The calls that the nodes of a program are in; a call that was left is not entered again."""
    root = Scope((), "")
    open_scopes = [root]
    closed: set[tuple[str, ...]] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path: list[tuple[str, str, int | None]] = []
        outside = 0  # calls of modules that the checkpoint is in
        number, depth = node.meta.get("checkpoint") or (None, 0)
        for at, (key, (full_name, _)) in enumerate(node.meta.get("nn_module_stack", {}).items()):
            if at < 2:
                continue  # the model itself, and what it was traced in
            name = plain_name(full_name.removeprefix("model."))
            if path and path[-1][1] == name:
                path.pop()  # a wrapper, which calls what it wraps
            path.append((key, name, None))
            outside = len(path) if at < depth else outside
        if number is not None:
            at = outside
            path.insert(at, (f"checkpoint {number}", path[at - 1][1] if at else "", number))
        keys = tuple(key for key, _, _ in path)
        while open_scopes[-1].path != keys[: len(open_scopes[-1].path)]:
            closed.add(open_scopes.pop().path)
        for key, name, call in path[len(open_scopes[-1].path) :]:
            inner = (*open_scopes[-1].path, key)
            if inner in closed:
                break
            scope = Scope(inner, name, call)
            open_scopes[-1].items.append(scope)
            open_scopes.append(scope)
        open_scopes[-1].items.append(node)
    return root


_numbers = count()


class Writer:
    """Writes the programs of a trace for the modules of a model.

    Args:
        held: The nodes of parameters and buffers, by node, with their names.
        checkpoints: The keyword arguments of each call of ``torch.utils.checkpoint``.
        keep: Takes a module's name and a program, and gives the number that it is called by.
        presented: Parameters of which an attribute of the module shows something else than what is registered.
    """

    def __init__(
        self,
        held: dict[fx.Node, str],
        checkpoints: Calls,
        keep: Callable[[str, Program], int],
        presented: frozenset[str] = frozenset(),
    ) -> None:
        self.held, self.checkpoints, self.keep, self.presented = held, checkpoints, keep, presented

    def write(self, scope: Scope, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> int:
        """Write the program of a call, after those of the calls within.

        Args:
            scope: The call.
            inputs: The nodes that it is given.
            outputs: The nodes that it returns.

        Returns:
            The number of the program.
        """
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
        needed = self._needed_after(scope, outputs)

        def look_up(node: fx.Node) -> fx.Node:
            if node not in values:
                path = self.held[node]
                if path in self.presented:
                    owner, _, name = path.rpartition(".")
                    at = "this_module" if owner == scope.name else self._relative(scope.name, owner)
                    values[node] = graph.call_function(_registered, (graph.get_attr(at), name))
                else:
                    values[node] = graph.get_attr(self._relative(scope.name, path))
            return values[node]

        for at, item in enumerate(scope.items):
            if isinstance(item, Scope):
                given, made = self._interface(item, scope, needed[at])
                number = self.write(item, given, made)
                values_given = tuple(look_up(n) for n in given)
                if item.checkpoint is None:
                    path = self._relative(scope.name, item.name)
                    call = graph.call_module(path, values_given, {"program": number})
                else:
                    run = recomputed(number, self.checkpoints[item.checkpoint])
                    call = graph.call_function(named(run, "checkpoint"), (graph.get_attr("this_module"), *values_given))
                for place, node in enumerate(made):
                    values[node] = call if len(made) == 1 else graph.call_function(_item, (call, place))
            else:
                values[item] = graph.node_copy(item, look_up)
        results = [look_up(node) for node in outputs]
        graph.output(results[0] if len(results) == 1 else tuple(results))
        return self.keep(scope.name, compiled(graph, scope.name))

    @staticmethod
    def _relative(scope: str, name: str) -> str:
        return name if not scope else name.removeprefix(f"{scope}.")

    def _needed_after(self, scope: Scope, outputs: Sequence[fx.Node]) -> list[set[fx.Node]]:
        """For each item of a call, the nodes that what comes after it needs."""
        needed: list[set[fx.Node]] = [set()] * len(scope.items)
        later = set(outputs)
        for at in reversed(range(len(scope.items))):
            needed[at] = set(later)
            item = scope.items[at]
            for node in item.nodes() if isinstance(item, Scope) else (item,):
                later.update(node.all_input_nodes)
        return needed

    def _interface(self, item: Scope, parent: Scope, needed: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What a call is given, in the order of use, and what it returns."""
        inside = list(item.nodes())
        own = set(inside)
        given: dict[fx.Node, None] = {}
        for node in inside:
            for used in node.all_input_nodes:
                if used in own:
                    continue
                if used in self.held and self._within(item.name, self.held[used]):
                    continue
                given[used] = None
        return list(given), [node for node in inside if node in needed]

    @staticmethod
    def _within(scope: str, name: str) -> bool:
        return not scope or name.startswith(f"{scope}.")


def _registered(module: nn.Module, name: str) -> Any:
    """What this rank holds of a parameter."""
    parameter = parameters_of(module)[name]
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _item(values: Any, at: int) -> Any:
    return values[at]


def compiled(graph: fx.Graph, name: str) -> Program:
    """A function of the module and the values that it is given."""
    code = graph.python_code("self")
    file = f"<credit-domain program {next(_numbers)} of {name or 'the model'}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    space = dict(code.globals)
    exec(compile(code.src, file, "exec"), space)
    made: Program = space["forward"]
    return made


class Partitioned:
    """What a module is besides its class, once a model is partitioned: its forward runs programs."""

    _programs: dict[int, Program]

    @property
    def this_module(self) -> Any:
        """The module, for a program that names it."""
        return self

    def forward(self, *values: Any, program: int | None = None) -> Any:
        """Run a program on this rank's values."""
        if program is None:
            raise ValueError(
                f"this {type(self).__name__} is part of a partitioned model, and runs as part of its program: call the "
                "model itself, or partition what is to be called apart"
            )
        return self._programs[program](self, *values)


_classes: dict[tuple[type, type], type] = {}


def become(module: nn.Module, kind: type) -> None:
    """Give a module a class whose forward is that of ``kind``."""
    own = type(module)
    if issubclass(own, kind):
        return
    key = (own, kind)
    if key not in _classes:
        _classes[key] = type(
            own.__name__, (kind, own), {"__module__": own.__module__, "__qualname__": own.__qualname__}
        )
    module.__class__ = _classes[key]


__all__ = ["Partitioned", "Program", "Scope", "Writer", "become", "compiled", "scopes_of"]
