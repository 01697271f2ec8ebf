"""What is to become of each module of a model, worked out before any is changed."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from credit_domain.engine.layer import DomainParallelLayer, Fate
from credit_domain.model.rules import decide
from credit_domain.ops.interpolation.interpolation import DomainParallelInterpolate

logger = logging.getLogger(__name__)

ConverterKey = type[nn.Module] | str | Callable[[nn.Module], bool]
"""What a custom converter is for: a type, a class path such as ``"package.module.Class"``, or a predicate."""

Method = Literal["auto", "modules", "graph"]
"""How a model is converted: module by module, operation by operation, or as it can be."""

Converter = Callable[..., nn.Module]
"""Makes the module that stands in for another, which is its argument.

One that has parameters ``shard_dim`` or ``label`` is told the sharded dim and the module's name. For one with an
attribute ``visits_children`` that is true, as an :class:`credit_domain.adapters.Adapter` has, the children are
converted as well.
"""


@dataclass(frozen=True)
class ConvertedModule:
    """One line of a :class:`ConversionReport`: a module, what became of it, and why."""

    name: str
    kind: str
    fate: Fate
    reason: str


@dataclass
class Fates:
    """What is to become of the modules.

    Attributes:
        lines: Each module that was looked at.
        names: Its name, by identity.
        replace: What makes the replacement of a module, from its label; by identity.
        refused: What is refused, and why.
        skipped: Names of the modules that a converter replaces with their children, or that are declared local.
        free: Names of the modules whose windows may begin anywhere once they are converted.
    """

    lines: list[ConvertedModule] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    replace: dict[int, Callable[[str], nn.Module]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)

    def raise_refused(self) -> None:
        """Refuse the model if any module is.

        Raises:
            ValueError: With the names of all of them, and what to do.
        """
        if self.refused:
            listed = "\n  ".join(self.refused)
            raise ValueError(
                f"{len(self.refused)} modules may mix rows of different ranks and have no rule:\n  {listed}\n"
                "For each, pass a replacement in custom_converters={Type: function}, or, if it mixes no rows, name it "
                "in local=[...]. With input_shape=, the whole model is partitioned operation by operation instead. "
                "Nothing was changed."
            )


def fates_of(
    model: nn.Module,
    shard_dim: int,
    custom_converters: Mapping[Any, Converter] | None,
    local: Iterable[Any],
    known: bool = True,
) -> Fates:
    """What :func:`credit_domain.convert.convert_to_domain_parallel` is to do; arguments are those that it takes."""
    shard_dim = spatial_only(shard_dim)
    fates, choose, is_local = Fates(), _Chooser(custom_converters or {}, shard_dim), _Matcher(local)

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in fates.names:
            return
        fates.names[id(module)] = name
        kind = type(module).__name__

        def note(fate: Fate, reason: str) -> None:
            fates.lines.append(ConvertedModule(name, kind, fate, reason))

        declared_local = is_local(name, module) is not None
        chosen = choose(name, module, known=known and not declared_local)
        if chosen is not None:
            converter, fates.replace[id(module)], reason = chosen
            note("converted", reason)
            if getattr(converter, "any_rows", False):
                fates.free.append(name)
            if _visits_children(converter):
                visit_children(name, module)
            else:
                fates.skipped.append(name)
        elif declared_local:
            note("local", "declared local")
            fates.skipped.append(name)
        elif is_converted(module):
            note("converted", "was domain-parallel already")
        else:
            decision = decide(module, shard_dim)
            reason = "; ".join(filter(None, (decision.reason, choose.mistaken.get(id(module)))))
            note(decision.fate, reason)
            if decision.fate == "refused":
                fates.refused.append(f"{name or '(the model itself)'} ({kind}): {reason}")
            elif (wrap := decision.wrap) is not None:
                # What a layer of torch holds inside (parametrisations) acts on parameters.
                fates.replace[id(module)] = lambda label: wrap(module, shard_dim, label=label or kind)
            else:
                visit_children(name, module)

    def visit_children(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return fates


def is_converted(module: nn.Module) -> bool:
    """Whether a module works on sharded rows by itself."""
    return isinstance(module, (DomainParallelLayer, DomainParallelInterpolate))


def spatial_only(shard_dim: int) -> int:
    """A dim counted from the first is that of (B, C, H, W)."""
    dim = shard_dim - 4 if shard_dim >= 0 else shard_dim
    if not -3 <= dim <= -1:
        raise ValueError(f"shard_dim must be a spatial dim: -2 (latitude), -1 or -3; got {shard_dim}")
    return dim


class _Matcher:
    """Tells whether a module was meant: by type, class path, qualified name, predicate or identity."""

    def __init__(self, keys: Iterable[Any]) -> None:
        self.keys = list(keys)

    def __call__(self, name: str, module: nn.Module) -> Any:
        """The key that a module matches, the most specific type first; None if there is none."""
        for key in self.keys:
            if isinstance(key, nn.Module):
                if key is module:
                    return key
            elif isinstance(key, str) and key in (name, type(module).__name__, _path(type(module))):
                return key
        for base in type(module).__mro__:
            if base in self.keys:
                return base
        for key in self.keys:
            if callable(key) and not isinstance(key, (type, nn.Module)) and key(module):
                return key
        return None


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Chooser:
    """Which converter is for a module: the caller's own come first, then the known families."""

    def __init__(self, custom: Mapping[Any, Converter], shard_dim: int) -> None:
        from credit_domain.adapters.registry import known_converters  # whose families are made of what is here

        self._shard_dim = shard_dim
        self._custom, self._known = dict(custom), dict(known_converters())
        self._custom_key, self._known_key = _Matcher(self._custom), _Matcher(self._known)
        self.mistaken: dict[int, str] = {}

    def __call__(
        self, name: str, module: nn.Module, known: bool = True
    ) -> tuple[Converter, Callable[[str], nn.Module], str] | None:
        """The converter, what makes the replacement, and why; None if the rules are to decide."""
        kind = type(module).__name__
        key = self._custom_key(name, module)
        if key is not None:
            converter = self._custom[key]
            make = functools.partial(_call, converter, module, self._shard_dim)
            return converter, lambda label: make(label or kind), "by a custom converter"
        key = self._known_key(name, module) if known else None
        if key is None or is_converted(module):
            return None
        family: Any = self._known[key]
        try:
            made = _call(family, module, self._shard_dim, name or kind)
        except ValueError as error:  # it has the parts of the family and does something else
            self.mistaken[id(module)] = f"not converted as {family.name}: {error}"
            logger.info("%s (%s): %s", name or "(model)", kind, self.mistaken[id(module)])
            return None
        return family, lambda label: made, f"as {family.name}"


def _visits_children(converter: Converter) -> bool:
    made_by = _maker(converter)
    return bool(getattr(made_by.func if isinstance(made_by, functools.partial) else made_by, "visits_children", False))


def _maker(converter: Converter) -> Converter:
    """What a registered family converts by; any other converter itself."""
    maker: Converter = getattr(converter, "converter", converter)
    return maker


def _call(converter: Converter, module: nn.Module, shard_dim: int, label: str) -> nn.Module:
    """What a custom converter makes of a module."""
    try:
        known = inspect.signature(_maker(converter)).parameters
    except (TypeError, ValueError):  # some callables written in C
        return converter(module)
    given = {name: value for name, value in (("shard_dim", shard_dim), ("label", label)) if name in known}
    return _maker(converter)(module, **given)
