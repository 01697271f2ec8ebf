"""Small state (numbers, text, containers of them) as JSON, with its tensors beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

DEEPEST = 64
"""How deep containers may be nested in one another."""


def pack(value: Any, path: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """What JSON can hold of None, bools, numbers, text, tensors, and dicts, lists and tuples of them.

    Tensors go into ``tensors``, named by the ``path`` that errors use too. A ValueError refuses other types, which
    could be restored only by running code, and what is nested more deeply than :data:`DEEPEST`.
    """
    if depth > DEEPEST:
        raise ValueError(f"{path[:80]}... is nested more than {DEEPEST} deep; a checkpoint holds no more")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, DTensor) or (isinstance(value, Tensor) and value.is_sparse):
        raise ValueError(f"{path} is a divided or sparse {type(value).__name__}: save full_tensor() or to_dense()")
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"tensor": path}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "dict"
        inner = depth + 1
        return {
            kind: [
                [pack(k, f"{path} key", tensors, inner), pack(v, f"{path}.{k}", tensors, inner)]
                for k, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{path}.{i}", tensors, depth + 1) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, (bool, int, float, str)) or getattr(value, "shape", None) == ():  # of a subclass, or numpy's
        plain = (
            value.item()
            if hasattr(value, "item")
            else next(t(value) for t in (int, float, str) if isinstance(value, t))
        )
        return pack(plain, path, tensors, depth)
    raise ValueError(
        f"{path} is of type {type(value).__name__}; a checkpoint holds None, bools, numbers, text, tensors, and "
        "dicts, lists and tuples of them"
    )


def unpack(packed: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    """The value that :func:`pack` was given; ``tensor_of`` returns a tensor by its name."""
    if isinstance(packed, list):
        return [unpack(item, tensor_of) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensor_of(content)
    if kind == "tuple":
        return tuple(unpack(content, tensor_of))
    pairs = {unpack(key, tensor_of): unpack(item, tensor_of) for key, item in content}
    return Counter(pairs) if kind == "counter" else pairs


def names_in(packed: Any) -> list[str]:
    """Names of the tensors of a packed value."""
    names: list[str] = []
    unpack(packed, names.append)  # type: ignore[arg-type]
    return names
