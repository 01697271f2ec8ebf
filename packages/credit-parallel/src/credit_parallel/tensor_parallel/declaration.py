"""What blocks declare, read and checked before anything is changed; no communication, and no tensor is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from credit_domain.extend import parameters_of, pre_hooks_of
from credit_parallel.tensor_parallel.parameters import unwrapped

Paths = tuple[str, ...]


@dataclass
class DividedLayer:
    """A layer to divide."""

    path: str  #: where it is in its block
    layer: nn.Module  #: the layer
    role: str  #: ``column`` or ``row``
    #: Sizes of the parts that its divided channels consist of; empty where they are not known.
    parts: tuple[int, ...] = ()
    declared: bool = False  #: whether the block declares the parts

    @property
    def channels(self) -> int:
        """Number of channels that are divided."""
        weight = parameters_of(self.layer)["weight"]
        assert weight is not None
        return weight.shape[0 if self.role == "column" else 1]

    @property
    def argument(self) -> str:
        """What torch calls that number."""
        kind = "features" if isinstance(self.layer, nn.Linear) else "channels"
        return f"{'out' if self.role == 'column' else 'in'}_{kind}"


class View(NamedTuple):
    """A parameter that ``forward`` is to see this rank's slice of along ``dim``, or with a summed gradient if None."""

    owner: nn.Module
    name: str
    dim: int | None


@dataclass
class Declaration:
    """What one block declares."""

    name: str  #: its qualified name
    block: nn.Module  #: the block
    layers: dict[str, DividedLayer] = field(default_factory=dict)  #: the layers to divide, by path
    #: Column and row layers that belong together.
    pairs: list[tuple[list[DividedLayer], list[DividedLayer]]] = field(default_factory=list)
    #: Modules, their integer attributes and what those become.
    counts: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    views: list[View] = field(default_factory=list)  #: other parameters that go by channel, or are shared by channels
    problems: list[str] = field(default_factory=list)  #: why the block cannot be made tensor-parallel

    def at(self, path: str = "") -> str:
        """What errors call a module or attribute of the block."""
        return ".".join(part for part in (self.name, path) if part) or type(self.block).__name__

    def refuse(self, path: str, problem: str) -> None:
        """Note why the block cannot be made tensor-parallel, of the module or attribute at a path."""
        self.problems.append(f"{self.at(path)}{problem}")

    def __str__(self) -> str:
        layers = [f"{each.path} {each.role} {type(each.layer).__name__} {each.parts}" for each in self.layers.values()]
        counts = [f"{attribute}={value}" for _, attribute, value in self.counts]
        views = [f"{view.name} dim {view.dim}" for view in self.views]
        return f"{self.at()}: {', '.join((*layers, *counts, *views))}"


def declares(module: nn.Module, native: bool) -> bool:
    """Whether a module opts in, by ``_tp_plan`` (native), or by ``_tp_col`` and ``_tp_row``."""
    return any(declared(module, name) for name in (("_tp_plan",) if native else ("_tp_col", "_tp_row")))


def makes_its_weight(block: nn.Module) -> bool:
    """Whether a layer of a block's ``_tp_plan`` computes its weight, as spectral normalisation does."""
    for path in declared(block, "_tp_plan", ()):
        try:
            layer = block.get_submodule(path)
        except AttributeError:
            continue  # which is said where the block is read
        if hasattr(layer, "weight_orig") or is_parametrized(layer, "weight"):
            return True
    return False


def read_block(name: str, block: nn.Module, size: int, native: bool) -> Declaration:
    """Read what a block declares for a tensor-parallel degree; native if by a ``_tp_plan``."""
    declaration = Declaration(name, block)
    for groups in _native_groups(declaration) if native else _groups(declaration):
        layers = [
            [_read_layer(declaration, path, role, native) for path in paths]
            for role, paths in zip(("column", "row"), groups, strict=True)
        ]
        columns, rows = ([layer for layer in each if layer is not None] for each in layers)
        declaration.pairs.append((columns, rows))
    _read_parts(declaration, size)
    _read_counts(declaration, size)
    _read_views(declaration, size)
    return declaration


# Which layers


def _groups(declaration: Declaration) -> list[tuple[Paths, Paths]]:
    """Columns and rows that belong together."""
    columns, rows = (_entries(declaration, name) for name in ("_tp_col", "_tp_row"))
    if not columns or not rows:
        declaration.refuse("", ": both _tp_col and _tp_row must be a path, or a tuple of (tuples of) paths")
        return []
    if len(columns) == len(rows):
        return list(zip(columns, rows, strict=True))
    return [(sum(columns, ()), sum(rows, ()))]


def _entries(declaration: Declaration, name: str) -> list[Paths]:
    entries = [texts(entry) for entry in texts(declared(declaration.block, name, ()))]
    return entries if all(isinstance(path, str) for entry in entries for path in entry) else []


def _native_groups(declaration: Declaration) -> list[tuple[Paths, Paths]]:
    styles: Mapping[str, str] = declared(declaration.block, "_tp_plan")
    groups = tuple(
        tuple(path for path, style in styles.items() if style == wanted) for wanted in ("colwise", "rowwise")
    )
    if not all(groups) or len(groups[0]) + len(groups[1]) != len(styles):
        expected = "each layer 'colwise' or 'rowwise', and at least one of each"
        declaration.refuse("", f": _tp_plan must call {expected}; got {dict(styles)}")
    return [(groups[0], groups[1])]


def _read_layer(declaration: Declaration, path: str, role: str, native: bool) -> DividedLayer | None:
    layer = _module(declaration, path, f"the {role}-parallel layer")
    if layer is None:
        return None
    problem = "is named twice" if path in declaration.layers else unfit(layer, native)
    if problem:
        declaration.refuse(path, f" ({type(layer).__name__}) {problem}")
        return None
    declaration.layers[path] = DividedLayer(path, layer, role)
    return declaration.layers[path]


def unfit(layer: nn.Module, native: bool) -> str | None:
    """Why a layer cannot be divided, if it cannot; native if it is one of a ``_tp_plan``."""
    if is_parametrized(layer):
        modules = [module for name, module in layer.named_modules() if name.startswith("parametrizations.")]
        kinds = [type(module).__name__.strip("_") for module in modules if not isinstance(module, nn.ModuleList)]
        return f"has a parametrisation ({', '.join(kinds)}), which needs the whole weight: remove it first"
    weight = parameters_of(layer).get("weight")
    if weight is None and isinstance(layer, (nn.Linear, nn.Conv2d)):
        kinds = [type(hook).__name__ for hook in pre_hooks_of(layer).values()]
        return f"makes its weight in a hook ({', '.join(kinds)}), which needs the whole weight: remove it first"
    if isinstance(weight, DTensor):
        return "has a DTensor as its weight: apply tensor parallelism once, and before fully_shard"
    if native and type(layer) is not nn.Linear:
        return "must be a torch.nn.Linear, in a _tp_plan; 1x1 convolutions are for _tp_col and _tp_row"
    if type(layer) is nn.Conv2d:
        plain = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
        if plain and layer.padding in ((0, 0), "same", "valid"):
            return None
        return (
            "must be a 1x1 convolution with stride 1, groups 1 and padding 0; got "
            f"kernel_size={layer.kernel_size}, stride={layer.stride}, groups={layer.groups}, padding={layer.padding}"
        )
    if type(layer) is not nn.Linear:
        return "must be a torch.nn.Linear or a 1x1 torch.nn.Conv2d itself, not a subclass or another layer"
    return None


# What else


def _read_parts(declaration: Declaration, size: int) -> None:
    given: Mapping[str, Any] = declared(declaration.block, "_tp_parts", {})
    for path in [path for path in given if path not in declaration.layers]:
        declaration.refuse("", f": _tp_parts names {path!r}, which is none of its divided layers")
    for path, layer in declaration.layers.items():
        total, parts = layer.channels, given.get(path, 1)
        layer.declared = path in given
        if isinstance(parts, int):
            parts = (total // parts,) * parts if parts > 0 else ()
        if sum(parts) != total or min(parts) <= 0:
            declaration.refuse(path, f": {layer.argument}={total} does not consist of _tp_parts={given[path]}")
            continue
        layer.parts = tuple(parts)
        each = f", in parts of {', '.join(map(str, parts))}," if len(parts) > 1 else ""
        if any(part % size for part in parts):
            problem = f": {layer.argument}={total}{each} is not divisible by the tensor-parallel degree {size}"
            declaration.refuse(path, problem)


def _read_counts(declaration: Declaration, size: int) -> None:
    for path in texts(declared(declaration.block, "_tp_heads", ())):
        owner, attribute = _owner(declaration, path, "_tp_heads")
        if owner is None:
            continue
        value = getattr(owner, attribute, None)
        if isinstance(value, bool) or not isinstance(value, int):
            declaration.refuse(path, f": _tp_heads must name integers; got {value!r}")
        elif value % size:
            declaration.refuse(path, f"={value} is not divisible by the tensor-parallel degree {size}")
        else:
            declaration.counts.append((owner, attribute, value // size))


def _read_views(declaration: Declaration, size: int) -> None:
    divided = {id(layer.layer) for layer in declaration.layers.values()}
    partial = dict.fromkeys(texts(declared(declaration.block, "_tp_partial", ())))
    for path, dim in {**partial, **declared(declaration.block, "_tp_shard", {})}.items():
        what = "_tp_partial" if dim is None else "_tp_shard"
        owner, name = _owner(declaration, path, what)
        if owner is None:
            continue
        parameter = parameters_of(owner).get(name)
        if parameter is None or id(owner) in divided:
            declaration.refuse(path, f": {what} must name parameters, and none of the divided layers")
        elif dim is None:
            declaration.views.append(View(owner, name, None))
        elif not -parameter.ndim <= dim < parameter.ndim or parameter.shape[dim] % size:
            problem = f": dim {dim} of {tuple(parameter.shape)} is not divisible by the tensor-parallel degree {size}"
            declaration.refuse(path, problem)
        else:
            declaration.views.append(View(owner, name, dim % parameter.ndim))


# Finding things


def declared(block: nn.Module, name: str, default: Any = None) -> Any:
    """What a block declares under a name."""
    value = getattr(block, name, None)
    return default if value is None else value


def texts(value: Any) -> tuple[Any, ...]:
    """One text, or several of them, as a tuple."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _module(declaration: Declaration, path: str, what: str) -> nn.Module | None:
    try:
        return declaration.block.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in declaration.block.named_modules() if name) or "none"
        declaration.refuse("", f" has no module {path!r} ({what}); it has {names}")
        return None


def _owner(declaration: Declaration, path: str, what: str) -> tuple[nn.Module | None, str]:
    parent, _, name = path.rpartition(".")
    module = _module(declaration, parent, f"of {path!r} in {what}")
    return (None if module is None else unwrapped(module)), name
