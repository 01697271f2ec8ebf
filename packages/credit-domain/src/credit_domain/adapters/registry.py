"""The families of modules that there is a converter for, by what they look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from credit_domain.model.fates import Converter, ConverterKey
from credit_domain.model.granularity import RowStride, know_stride


@dataclass(frozen=True)
class Family:
    """A converter, and what it is for, as :func:`register` is told. Calling it converts a module."""

    name: str
    match: ConverterKey
    converter: Converter
    matches: str
    notes: str = ""
    any_rows: bool = False

    def __call__(self, module: nn.Module, **settings: Any) -> nn.Module:
        """Convert a module; settings are those that the converter takes."""
        return self.converter(module, **settings)


_families: dict[str, Family] = {}


def register(
    match: ConverterKey,
    converter: Converter,
    *,
    name: str,
    matches: str = "",
    notes: str = "",
    any_rows: bool = False,
    stride: RowStride | None = None,
) -> Converter:
    """Make a converter known: conversion, planning and verification apply it from now on.

    Args:
        match: A type (subclasses too), a class path such as ``"package.module.Class"``, or a predicate on the module.
            It must be strict: what it matches is converted unseen.
        converter: Takes a module, and ``shard_dim`` and ``label`` if it has these parameters, and returns its
            replacement, with the same parameters under the same names; raises ``ValueError`` for a module that matches
            and is otherwise than expected.
        name: What documentation calls it; a second family of that name takes the place of the first.
        matches: What the match looks for, in words; None takes the type or path.
        notes: What is special about it.
        any_rows: Whether what it makes takes any partition; then the module's ``window_size`` does not count towards
            the granularity.
        stride: How many rows become one and one becomes how many, as a function of a module that matches, if any do.

    Returns:
        The converter.
    """
    words = matches or (match if isinstance(match, str) else getattr(match, "__name__", str(match)))
    _families[name] = Family(name, match, converter, words, notes, any_rows)
    if stride is not None and callable(match) and not isinstance(match, type):
        know_stride(name, match, stride)
    return converter


def known_converters() -> Mapping[ConverterKey, Callable[[nn.Module], nn.Module]]:
    """All that is registered. A conversion applies these by itself.

    Passed as ``custom_converters=known_converters()``, they refuse a module that only looks like its family.
    """
    return {family.match: family for family in _families.values()}


def known_families() -> tuple[Family, ...]:
    """The families, in the order in which they were registered."""
    return tuple(_families.values())


def table() -> str:
    """The families as a table in Markdown: name, what it matches, notes."""
    lines = ["| family | matches | notes |", "|---|---|---|"]
    lines += [f"| {family.name} | {family.matches} | {family.notes} |" for family in _families.values()]
    return "\n".join(lines)
