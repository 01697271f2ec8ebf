"""The model's total stride and windows: what the boundaries between ranks should be multiples of."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import credit_domain.layers  # noqa: F401 - its layers are in the table
from credit_domain.engine.layer import layer_for, record_of
from credit_domain.engine.row_op import ratio_of
from credit_domain.model.trace import LayerCall, trace

logger = logging.getLogger(__name__)

RowStride = Callable[[nn.Module], tuple[int, int]]
"""How many rows a module makes one, and how many it makes of one."""

_known: dict[str, tuple[Callable[[nn.Module], bool], RowStride]] = {}


def know_stride(name: str, match: Callable[[nn.Module], bool], stride: RowStride) -> None:
    """Let :func:`stride_of` know modules that are no layers of torch; the last one of a name counts."""
    _known[name] = match, stride


@dataclass(frozen=True)
class Level:
    """A place in a model where rows are coarser than those of its input.

    Attributes:
        where: Name of the module.
        stride: Rows of the input for each row there.
        window: Rows in a window there; 0 for none.
    """

    where: str
    stride: int
    window: int = 0


def stride_of(module: nn.Module, shard_dim: int) -> tuple[int, int]:
    """How many rows become one, and how many one becomes; ``(1, 1)`` for layers that keep the rows."""
    if layer_for(module) is not None:
        return ratio_of(record_of(module, shard_dim))
    return next((stride(module) for match, stride in _known.values() if match(module)), (1, 1))


def granularity_of(
    model: nn.Module,
    shard_dim: int = -2,
    *,
    input_shape: Any = None,
    window_sizes: Sequence[int] | None = None,
    free: Collection[str] = (),
) -> int:
    """Rows that the boundaries between ranks should be multiples of: the total stride, times declared windows.

    Found by running the model for its shapes alone (:func:`credit_domain.model.trace.trace`). Where no shape of its
    input is given, a plausible one is tried; where that fails too the answer is 1, and said so in the log.

    Args:
        model: The model, not yet converted.
        shard_dim: The sharded dim, negative.
        input_shape: Global shape of its input, or its arguments.
        window_sizes: Rows in the windows of each level; None takes what modules declare.
        free: Names of modules whose windows may begin anywhere, like those of the modules that they hold.

    Raises:
        ValueError: If the model cannot be run with ``input_shape``.
    """
    levels: list[Level] | None = None
    for shape in [input_shape] if input_shape is not None else _plausible_shapes(model):
        try:
            levels = levels_of(model, shape, shard_dim, window_sizes, free)
            break
        except ValueError as error:
            if input_shape is not None:
                raise
            logger.debug("input of shape %s: %s", shape, error)
    if levels is None:
        if any(stride_of(module, shard_dim)[0] > 1 for module in model.modules()):
            logger.info(
                "the total stride of %s is not known: rows are divided without regard to it, and skip connections may "
                "not meet on one rank; pass input_shape=, or set manager.granularity",
                type(model).__name__,
            )
        return 1
    return math.lcm(*(level.stride * max(1, level.window) for level in levels), 1)


def levels_of(
    model: nn.Module,
    inputs: Any,
    shard_dim: int,
    window_sizes: Sequence[int] | None = None,
    free: Collection[str] = (),
) -> list[Level]:
    """The levels of a model, in the order in which it reaches them.

    Raises:
        ValueError: If the model cannot be run with these inputs.
    """
    calls = trace(model, inputs, lambda m: stride_of(m, shard_dim) != (1, 1) or bool(_declared_window(m)))
    stride_at: dict[int, int] = {}
    levels: list[Level] = []
    for call in calls:
        found = _levels_of_call(call, shard_dim, stride_at)
        anywhere = any(call.name == name or call.name.startswith(f"{name}.") for name in free)
        levels.extend(replace(level, window=0) if anywhere else level for level in found)
    if window_sizes is not None:
        strides = sorted({level.stride for level in levels} | {1})
        strides = strides[-len(window_sizes) :]
        levels = [Level(level.where, level.stride) for level in levels]
        levels += [Level(f"level {i}", s, w) for i, (s, w) in enumerate(zip(strides, window_sizes, strict=False))]
    return levels


def _levels_of_call(call: LayerCall, shard_dim: int, stride_at: dict[int, int]) -> Iterator[Level]:
    """Strides by the number of rows: tensors of as many rows have the same stride."""
    if len(call.input) < -shard_dim:
        return
    rows = _rows_into(call, shard_dim)
    stride = stride_at.setdefault(rows, 1) if not stride_at else stride_at.get(rows, 1)
    if window := _declared_window(call.module):
        yield Level(call.name, stride, window)
    down, up = stride_of(call.module, shard_dim)
    of_torch = not _is_known(call.module)
    if down > 1:
        stride *= down
        stride_at.setdefault(call.output[shard_dim] if of_torch else -(-rows // down), stride)
        yield Level(call.name, stride)
    elif up > 1:
        stride_at.setdefault(call.output[shard_dim] if of_torch else rows * up, max(1, stride // up))


def _rows_into(call: LayerCall, shard_dim: int) -> int:
    """Rows of a call's input: of tokens, those of the resolution that the module stores."""
    resolution = getattr(call.module, "input_resolution", None)
    if len(call.input) == 3 and isinstance(resolution, (tuple, list)):
        return int(resolution[0])
    if len(call.input) == 4 and _is_known(call.module):
        return call.input[shard_dim - 1]  # channels last
    return call.input[shard_dim]


def _is_known(module: nn.Module) -> bool:
    return any(match(module) for match, _ in _known.values())


def _declared_window(module: nn.Module) -> int:
    """Rows of the windows that a module declares as ``window_size``; 0 if it declares none."""
    size = getattr(module, "window_size", None)
    if isinstance(size, (tuple, list)):
        size = size[-2] if len(size) >= 2 else size[0] if size else None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 0


def _plausible_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes that the first layer would take."""
    first: Any = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    if first is None:
        return
    sizes = [_declared_size(model), (256, 512), (721, 1440), (241, 480), (181, 360), (224, 224)]
    frames = [getattr(model, "frames", None), first.kernel_size[0], 1, 2] if isinstance(first, nn.Conv3d) else [None]
    for height, width in filter(None, sizes):
        for time in dict.fromkeys(frames):
            yield (1, first.in_channels, *([] if time is None else [int(time)]), height, width)


def _declared_size(model: nn.Module) -> tuple[int, int] | None:
    for name in ("image_size", "img_size", "input_size"):
        size = getattr(model, name, None)
        if isinstance(size, (tuple, list)) and len(size) >= 2 and all(isinstance(s, int) for s in size):
            return int(size[-2]), int(size[-1])
        if isinstance(size, int):
            return size, size
    height, width = getattr(model, "image_height", None), getattr(model, "image_width", None)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def window_sizes_of(model: nn.Module, window_sizes: Sequence[int] | None = None) -> list[Level]:
    """Windows of each level by what modules declare alone, without running the model.

    Strides are those of the modules before, in the order in which they are registered; parallel branches over the same
    channels count once.
    """
    levels: list[Level] = []
    stride, windows = 1, list(window_sizes or ())
    branches: set[tuple[int, int]] = set()
    for name, module in model.named_modules():
        down, up = stride_of(module, -2)
        if down > 1:
            branch = (getattr(module, "in_channels", id(module)), down)
            if branch in branches:
                continue
            branches = {branch}
            stride *= down
            if window_sizes is not None:
                levels.append(Level(name, stride, windows.pop(0) if windows else 0))
            else:
                levels.append(Level(name, stride))
        elif up > 1:
            stride = max(1, stride // up)
        elif window_sizes is None and (window := _declared_window(module)):
            levels.append(Level(name, stride, window))
    levels.extend(Level(f"level {len(levels) + i}", stride, window) for i, window in enumerate(windows))
    return levels
