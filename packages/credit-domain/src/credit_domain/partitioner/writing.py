"""From a traced model to this rank's program: each operator by its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from credit_domain._torch_private import buffers_of
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.capture import Captured
from credit_domain.partitioner.module_names import module_of
from credit_domain.partitioner.row_layout import plain, scaled
from credit_domain.partitioner.rules import rule_for
from credit_domain.partitioner.rules.pointwise import is_pointwise, pointwise
from credit_domain.partitioner.rules.table import divide_again, divided
from credit_domain.partitioner.steps import Place, named

_COLLECTIVES = ("c10d.", "_c10d_functional", "_dtensor.", "symm_mem.", "credit_halo.")


@dataclass
class Writing:
    """A traced model, while it becomes a program.

    Attributes:
        captured: The trace.
        model: The model, whose buffers have the values of tables.
        place: Where the program will run.
        shard_dim: The sharded dim of arguments and results.
        sizes: Rows of each rank.
        divided: Names of the arguments that have rows.
        names: Names of all arguments that are tensors.
        held: The program's nodes of parameters and buffers, with their names.
    """

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
        builder = Builder(self.place, self.sizes, self._constant, self.captured.functions, self.captured.flops)
        inputs = []
        for name, node in zip(self.names, self.captured.inputs, strict=True):
            like = node.meta["val"]
            written = builder.graph.placeholder(node.name)
            inputs.append(written)
            layout = plain(self.shard_dim % like.ndim, self.sizes) if name in self.divided else None
            builder.values[node] = Value(like, layout, written)
        for node, name in self.captured.held.items():
            if name in self.captured.constants and not self._has(name):
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

    def _has(self, name: str) -> bool:
        """Whether a constant is an attribute of a module: a hook or the user may change it."""
        owner, _, last = name.rpartition(".")
        try:
            return isinstance(getattr(module_of(self.model, owner), last, None), Tensor)
        except AttributeError:
            return False

    def _written(self, builder: Builder, node: fx.Node) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: builder.values[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: builder.values[n])
        if getattr(node.target, "__name__", "") == "getitem":
            return args[0][args[1]]
        if str(node.target).startswith(_COLLECTIVES):
            raise ValueError(
                f"forward of {builder.module or 'the model'} sends tensors to other ranks itself ({node.target}, "
                f"{builder.line}): a model that is partitioned must be one for a single rank"
            )
        rule: Callable[..., Any] = pointwise if is_pointwise(node.target) else rule_for(node.target)
        repeated = len(builder.repeated)
        try:
            made = rule(builder, *args, **kwargs)
            divide_again(made, (args, kwargs))
            if len(builder.repeated) > repeated or not divided((args, kwargs)):
                builder.repeated_flops += builder.flops[node]
            return made
        except Exception as error:
            where = f"in {builder.module or 'the model'} ({builder.line})"
            raise ValueError(
                f"{node.target} {where} could not be divided: {type(error).__name__}: {error}. Please report it, and "
                "write this line of the model in another way until it is mended"
            ) from error

    def _result(self, b: Builder, value: Value) -> fx.Node:
        """How a result is given back: this rank's rows of it, wherever the model has put them; or whole."""
        layout, ndim, rows = value.layout, value.ndim, sum(self.sizes)
        if ndim < 3:
            return b.at(value, None)
        if layout is not None and layout.own and layout.outer == 1:
            return b.at(value, layout._replace(sizes=self.sizes) if layout.units == rows else layout)
        dim = self.shard_dim % ndim
        if value.shape[dim] == rows:
            return b.at(value, plain(dim, self.sizes))
        # A field on a grid of other rows, as a product with a matrix makes it, has the columns of the first argument.
        first = next(n for n, name in zip(self.captured.inputs, self.names, strict=True) if name in self.divided)
        like = tuple(first.meta["val"].shape)
        on_a_grid = layout is not None and ndim == len(like) and value.shape[dim + 1 :] == like[dim + 1 :]
        return b.at(value, plain(dim, scaled(self.sizes, value.shape[dim])) if on_a_grid else None)

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node that follows from constants alone."""
        if node.op == "placeholder":
            name = self.captured.held.get(node)
            if name is None or name in self.captured.changed:
                return None
            if name in self.captured.constants:
                return self.captured.constants[name]
            owner, _, last = name.rpartition(".")
            found = buffers_of(module_of(self.model, owner)).get(last)
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
