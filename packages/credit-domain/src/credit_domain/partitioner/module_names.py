"""Modules by name, whatever wrappers of torch stand around them."""

from __future__ import annotations

from torch import nn

from credit_domain._torch_private import ADDED_NAMES, CHECKPOINTED, COMPILED, children_of


def plain_name(name: str) -> str:
    """A qualified name without what wrappers add to it."""
    return ADDED_NAMES.sub("", f"{name}.").removesuffix(".")


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a plain name, without wrappers around it.

    Raises:
        AttributeError: If there is none.
    """
    module = model
    for part in ("", *name.split(".")) if name else ("",):
        if part:
            module = module.get_submodule(part)
        inner: nn.Module | None = module
        while inner is not None:
            module = inner
            children = children_of(module)
            inner = children.get(CHECKPOINTED.removesuffix(".")) or children.get(COMPILED.removesuffix("."))
    return module
