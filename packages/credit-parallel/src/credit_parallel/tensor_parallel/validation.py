"""What would run and give wrong numbers in silence, found where it can be seen from outside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from credit_domain.extend import parameters_of
from credit_parallel.tensor_parallel.declaration import Declaration, DividedLayer, declared, read_block
from credit_parallel.tensor_parallel.parameters import divided_parameters, unwrapped

_FUSED = re.compile(r"kv|in_proj|c_attn", re.IGNORECASE)
_HEADS = re.compile(r"(\w+_)?n?heads?")
_NOT_HEADS = re.compile(r"dim|size|channels|features")
_ACROSS_CHANNELS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.ChannelShuffle),
    *(nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d),
)


def read_blocks(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], size: int, native: bool
) -> tuple[list[Declaration], list[str]]:
    """What blocks declare for a tensor-parallel degree, and what is wrong with it; native if by a ``_tp_plan``."""
    declarations = [read_block(name, block, size, native) for name, block in blocks]
    problems = [problem for declaration in declarations for problem in _check_block(declaration, size)]
    return declarations, [*problems, *_check_model(model, declarations)]


def _check_block(declaration: Declaration, size: int) -> Iterator[str]:
    """What is wrong with a block at a tensor-parallel degree."""
    yield from declaration.problems
    for columns, rows in declaration.pairs:
        yield from _unclear_parts(declaration, columns, rows)
        for column in columns:
            yield from _mixed_between(declaration, column, rows)
    yield from _undeclared_heads(declaration)
    yield from _constraints(declaration, size)


def _unclear_parts(declaration: Declaration, columns: list[DividedLayer], rows: list[DividedLayer]) -> Iterator[str]:
    """Layers that may hold several parts side by side, whose slice would be of the wrong ones."""
    for layers, others in ((columns, rows), (rows, columns)):
        sizes = {part for other in others for part in other.parts}
        for layer in layers:
            name = next((part for part in reversed(layer.path.split(".")) if not part.isdecimal()), "")
            if layer.declared or not sizes:
                continue
            if layer.role == "column" and _FUSED.search(name):
                why = "is a fused projection by its name"
            elif layer.channels not in sizes:
                role = "row" if layer.role == "column" else "column"
                expected = " or ".join(map(str, sorted(sizes)))
                why = f"has {layer.argument}={layer.channels}, and its {role}-parallel layer {expected}"
            else:
                continue
            yield (
                f"{declaration.at(layer.path)} {why}: declare what it consists of, by _tp_parts = "
                f"{{{layer.path!r}: 3}} for equal parts (3: q, k and v; 2: the halves of a GLU), "
                f"{{{layer.path!r}: (64, 32, 32)}} for others, or {{{layer.path!r}: 1}} if it is one part"
            )


def _mixed_between(declaration: Declaration, column: DividedLayer, rows: list[DividedLayer]) -> Iterator[str]:
    """Modules between two layers of a Sequential that mix divided channels, or have undeclared parameters for them."""
    viewed = {(id(view.owner), view.name) for view in declaration.views}
    counted = {(id(owner), attribute) for owner, attribute, _ in declaration.counts}
    for path, found in _between(declaration.block, column.path, [row.path for row in rows]):
        module = unwrapped(found)
        label = f"{declaration.at(path)} ({type(module).__name__}), between the column- and the row-parallel layer,"
        if isinstance(module, _ACROSS_CHANNELS):
            yield f"{label} mixes channels of several ranks"
        elif isinstance(module, nn.GroupNorm) and (id(module), "num_groups") not in counted:
            yield f"{label} needs its num_groups declared in _tp_heads, and its parameters in _tp_shard"
        else:
            missing = [name for name, _ in module.named_parameters(recurse=False) if (id(module), name) not in viewed]
            if missing:
                yield f"{label} needs {' and '.join(missing)} declared, in _tp_shard or in _tp_partial"


def _between(block: nn.Module, column: str, rows: list[str]) -> Iterator[tuple[str, nn.Module]]:
    parent, _, first = column.rpartition(".")
    sequence = block.get_submodule(parent)
    names = [name for name, _ in sequence.named_children()] if isinstance(sequence, nn.Sequential) else []
    for row in rows:
        other, _, last = row.rpartition(".")
        if other == parent and first in names and last in names:
            for name in names[names.index(first) + 1 : names.index(last)]:
                start = f"{parent}.{name}" if parent else name
                yield from block.get_submodule(start).named_modules(prefix=start)


def _undeclared_heads(declaration: Declaration) -> Iterator[str]:
    """A block that splits its rank's channels into all the heads makes each of them narrower."""
    if any(declared(declaration.block, name) is not None for name in ("_tp_heads", "_tp_constraints")):
        return
    paths = {layer.path.rpartition(".")[0] for layer in declaration.layers.values() if layer.role == "column"}
    for path in sorted({"", *paths}):
        for name, value in vars(declaration.block.get_submodule(path)).items():
            counts = isinstance(value, int) and not isinstance(value, bool)
            if counts and _HEADS.fullmatch(name) and not _NOT_HEADS.search(name):
                where = f"{path}.{name}" if path else name
                yield (
                    f"{declaration.at()} has {where}={value}, and a rank only its share of the heads: declare "
                    f"_tp_heads = {where!r} to have it divided, or _tp_heads = () if forward does not use it"
                )


def _constraints(declaration: Declaration, size: int) -> Iterator[str]:
    check = vars(declaration.block).get("_tp_constraints", getattr(type(declaration.block), "_tp_constraints", None))
    if check is None:
        return
    try:
        found: Any = check(declaration.block, size)
    except ValueError as error:
        found = str(error)
    if found is False:
        found = f"its _tp_constraints do not hold at the tensor-parallel degree {size}"
    if isinstance(found, str):
        found = [found] if found else []
    for problem in found if isinstance(found, Iterable) else ():
        yield f"{declaration.at()}: {problem}"


def _check_model(model: nn.Module, declarations: list[Declaration]) -> Iterator[str]:
    """What is wrong between blocks, or with the model as a whole."""
    divided = divided_parameters(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and id(parameter) not in divided:
            yield f"{name} is a DTensor: tensor parallelism comes before fully_shard"
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, value in parameters_of(module).items():
            if value is not None:
                names.setdefault(id(value), []).append(f"{prefix}.{name}" if prefix else name)
    claimed: dict[tuple[int, str], str] = {}
    for declaration in declarations:
        layers = [(layer.layer, name) for layer in declaration.layers.values() for name in ("weight", "bias")]
        for owner, name in (*layers, *((view.owner, view.name) for view in declaration.views)):
            value = parameters_of(owner)[name]
            if value is None:
                continue
            called = names[id(value)]
            other = claimed.setdefault((id(owner), name), declaration.at())
            if other != declaration.at():
                yield f"{called[0]} is declared by {other} and by {declaration.at()}"
            if len(called) > 1:
                yield f"{' and '.join(called)} are the same parameter, which cannot be divided in one place alone"
