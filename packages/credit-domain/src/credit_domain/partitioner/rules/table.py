"""The table of rules, and the rule for what it does not have: every rank does the whole."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from credit_domain.partitioner import steps
from credit_domain.partitioner.builder import Builder, Layout, Value

Rule = Callable[..., Any]
"""Takes the builder and the operator's arguments, with values for tensors; returns values."""

RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a rule known for operators of aten, such as ``cat`` or ``mean.dim``; a torch may lack some of them.

    The operator whose name has an underscore before it, if there is one, does the same within torch.
    """

    def known(fn: Rule) -> Rule:
        for name in names:
            packet, _, overload = name.partition(".")
            for each in (packet, f"_{packet}"):
                found = getattr(torch.ops.aten, each, None)
                if found is not None and hasattr(found, overload or "default"):
                    RULES[getattr(found, overload or "default")] = fn
        return fn

    return known


def rule_for(target: Any) -> Rule:
    """The rule for an operator."""
    return RULES.get(target, replicated)


def replicated(b: Builder, *args: Any, **kwargs: Any) -> Any:
    """Every rank brings all operands together and does the whole; random numbers are the same on every rank."""
    if torch.Tag.nondeterministic_seeded in getattr(b.node.target, "tags", ()):
        b.draws = True
    if divided((args, kwargs)):
        b.repeats()
    return results(b, b.emit(b.node.target, *whole(b, args), **whole(b, kwargs)), None)


def divided(given: Any) -> list[Value]:
    """The values whose rows are divided."""
    if isinstance(given, Value):
        return [given] if given.layout is not None and given.fill is None else []
    if isinstance(given, dict):
        given = list(given.values())
    return [value for item in given for value in divided(item)] if isinstance(given, (tuple, list)) else []


def divide_again(made: Any, given: Any) -> None:
    """Divide results again that every rank holds whole, if they have as many rows as a divided operand."""
    rows = next((value for value in divided(given) if value.layout is not None and value.layout.outer == 1), None)
    if rows is None or rows.layout is None:
        return
    dim = rows.layout.dim
    for value in made if isinstance(made, tuple) else (made,):
        if not isinstance(value, Value) or value.layout is not None or value.fill is not None:
            continue
        if value.ndim == rows.ndim and value.shape[dim] == rows.shape[dim]:
            value.layout = rows.layout


def whole(b: Builder, value: Any) -> Any:
    """Arguments with every value brought together."""
    return nodes(b, value, lambda v: None)


def nodes(b: Builder, value: Any, layout: Callable[[Value], Any]) -> Any:
    """Arguments with a node for each value, in the layout that a function names."""
    if isinstance(value, Value):
        return b.at(value, layout(value))
    if isinstance(value, (tuple, list)):
        return type(value)(nodes(b, item, layout) for item in value)
    if isinstance(value, dict):
        return {key: nodes(b, item, layout) for key, item in value.items()}
    return value


def results(b: Builder, node: fx.Node, layout: Any) -> Any:
    """The values of an operator: one, or one for each of its results, all with one layout."""
    like = b.meta
    if isinstance(like, Tensor):
        return b.value(node, layout)
    if isinstance(like, (tuple, list)):
        return tuple(
            b.value(b.emit(operator.getitem, node, at), layout, item) if isinstance(item, Tensor) else None
            for at, item in enumerate(like)
        )
    return None


def local(b: Builder, layout: Any, *args: Any, **kwargs: Any) -> Any:
    """The same operator on this rank's part: arguments are nodes already."""
    return results(b, b.emit(able(b, b.node.target, layout), *args, **kwargs), layout)


_NEED_ROWS = ("aten.fft_", "aten.grid_sampler", "aten.std", "aten.var")  # or warn without


def able(b: Builder, target: Any, layout: Layout) -> Any:
    """An operator that also takes the part of a rank without rows, which some of torch's refuse."""
    if layout is None or layout.sizes[b.place.rank] or not str(target).startswith(_NEED_ROWS):
        return target
    return steps.on_no_rows(target, layout.dim)
