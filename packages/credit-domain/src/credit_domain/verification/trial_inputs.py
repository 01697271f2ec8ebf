"""What a trial is run on: the arguments of a call, with random numbers in place of what has rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from credit_domain.casts import cast_tensor
from credit_domain.containers import mapped, tensors_in
from credit_domain.model.trace import arguments_of, is_shape, rows_of
from credit_domain.verification.compare import has_rows, is_number
from credit_mesh import RowPartition

_COLUMNS = 64
_LARGEST = 2**24  # values in the inputs of a trial at full size
_LARGEST_IN_FLOAT64 = 2**28  # values in the weights, 2 GiB then
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}
"""What weights and inputs may be, best first, and the largest error that is rounding."""


@dataclass(frozen=True)
class Size:
    """One way to run a trial.

    Attributes:
        rows: Rows of the whole.
        columns: Size of the dim beside the sharded one; None leaves it.
        dtype: Of the weights and inputs.
    """

    rows: int
    columns: int | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Given:
    """The arguments of a model, of the whole.

    Attributes:
        values: Positional and keyword arguments. What is to be drawn at random is on the meta device.
        rows: Rows of the whole.
        shard_dim: The sharded dim, negative.
        sizes: Rows of each rank in the call; None where they are not known.
    """

    values: tuple[tuple[Any, ...], dict[str, Any]]
    rows: int
    shard_dim: int
    sizes: tuple[int, ...] | None = None

    @classmethod
    def of_shapes(cls, inputs: Any, shard_dim: int) -> Given:
        """From global shapes, or arguments, as they are given to the conversion."""
        rows = rows_of(inputs, shard_dim)

        def made(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _unreal(value, value.shape) if has_rows(value, rows, shard_dim) else value.detach().clone()
            return torch.empty(tuple(value), dtype=torch.float32, device="meta") if is_shape(value) else value

        return cls(arguments_of(inputs, made), rows, shard_dim)

    @classmethod
    def of_call(
        cls, values: tuple[Any, Any], shard_dim: int, declared: RowPartition | None, told: Callable[[Any], list[Any]]
    ) -> Given | None:
        """From the arguments of this rank; None where some have rows of another height.

        ``told`` gathers what each rank says.
        """
        sizes, rows_in = _agreed_rows([x for _, x in tensors_in(values)], shard_dim, declared, told)
        if rows_in is None:
            return None
        marks = iter(rows_in)

        def whole(_: str, x: Tensor) -> Tensor:
            if not next(marks):
                return x.detach().clone()
            shape = list(x.shape)
            shape[shard_dim] = sum(sizes)
            return _unreal(x, shape)

        return cls(mapped(values, whole), sum(sizes), shard_dim, tuple(sizes))

    def tries(self, ranks: int, block: int, weights: int) -> Iterator[Size]:
        """Ways to run a trial, small ones first; the model may insist on its full size, or on its own dtype.

        Small ones have ``ranks`` blocks of ``block`` rows. ``weights`` is the number of values in the weights.
        """
        sharded = [x.shape for _, x in tensors_in(self.values) if x.is_meta and has_rows(x, self.rows, self.shard_dim)]
        heights = [h for h in (ranks * block + self.rows % block, ranks * block) if h < self.rows]
        columns = max((shape[self._other] for shape in sharded), default=0)
        if max(map(math.prod, sharded), default=0) <= _LARGEST:
            heights.append(self.rows)
        sizes = [(h, c) for h, c in product(heights, (_COLUMNS, None)) if c is None or c < columns]
        dtypes = [dtype for dtype in TOLERANCES if dtype != torch.float64 or weights <= _LARGEST_IN_FLOAT64]
        for dtype, (height, width) in product(dtypes, dict.fromkeys(sizes)):
            yield Size(height, width, dtype)

    def filled(self, how: Size, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for one way to run a trial."""
        generator = torch.Generator("cpu").manual_seed(2)

        def fill(_: str, x: Tensor) -> Tensor:
            if not x.is_meta:
                return cast_tensor(x, how.dtype, device)
            shape, dtype = list(x.shape), cast_tensor(x, how.dtype).dtype
            if has_rows(x, self.rows, self.shard_dim):
                shape[self.shard_dim] = how.rows
                shape[self._other] = min(shape[self._other], how.columns or shape[self._other])
            if is_number(x):
                return torch.randn(shape, dtype=dtype, generator=generator, device="cpu").to(device)
            return torch.randint(0, 2, shape, generator=generator, device="cpu").to(device, dtype)

        filled: tuple[tuple[Any, ...], dict[str, Any]] = mapped(self.values, fill)
        return filled

    @property
    def _other(self) -> int:
        return -1 if self.shard_dim != -1 else -2


def _unreal(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=x.dtype, device="meta")


def _agreed_rows(
    tensors: Sequence[Tensor], dim: int, declared: RowPartition | None, told: Callable[[Any], list[Any]]
) -> tuple[list[int], list[bool] | None]:
    """Rows of each rank, and which tensors have them; None where some have rows of another height.

    Ranks hold a tensor whole if it is the same on all of them. Rows of different ranks are different, or at least those
    of the tensors with the most dims.
    """
    said = told([(tuple(x.shape), _digest(x)) for x in tensors])
    deep = [x.ndim >= 3 for x in tensors]
    most = max((x.ndim for x in tensors if x.ndim >= 3 and is_number(x)), default=0)
    sizes = [[shapes[i][0][dim] if deep[i] else 0 for shapes in said] for i in range(len(tensors))]
    apart = [len({shapes[i][1] for shapes in said}) > 1 for i in range(len(tensors))]
    main = [i for i, x in enumerate(tensors) if x.ndim == most > 0 and is_number(x)]
    main.sort(key=lambda i: (declared is None or sizes[i] != list(declared.sizes), not apart[i]))
    if not main:
        return [0], [False] * len(tensors)
    own = sizes[main[0]]
    rows_in = [deep[i] and sizes[i] == own and (apart[i] or x.ndim == most) for i, x in enumerate(tensors)]
    other = any(deep[i] and apart[i] and not rows_in[i] and is_number(x) for i, x in enumerate(tensors))
    return own, None if other else rows_in


def _digest(x: Tensor) -> str:
    """Some thousand of the values as text; of a tensor without values, nothing."""
    if x.is_meta:
        return ""
    values = x.detach().reshape(-1)
    return str(values[:: max(1, len(values) // 4096)].tolist())
