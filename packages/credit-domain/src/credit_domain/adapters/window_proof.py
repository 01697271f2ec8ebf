"""The proof that a module does on whole windows of some rows what it does on the whole grid."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from credit_domain.adapters.adapter import in_double
from credit_domain.adapters.window_shares import PADDING, Cutting, places, shares_of
from credit_domain.model.trace import meta_copy, plain_copy
from credit_mesh import RowPartition


@contextmanager
def as_if_whole(
    module: Any, name: str, resolution: tuple[int, int], windows: int, mine: Sequence[range]
) -> Iterator[None]:
    """Let a module take the rows of some of so many windows for the whole grid."""
    before = {}
    if name:
        before[name] = getattr(module, name)
        setattr(module, name, type(before[name])(resolution))
    mask = getattr(module, "attn_mask", None)
    if mask is not None:
        before["attn_mask"] = mask
        columns = mask.shape[0] // windows
        module.attn_mask = torch.cat([mask[part.start * columns : part.stop * columns] for part in mine])
    try:
        yield
    finally:
        for attribute, value in before.items():
            setattr(module, attribute, value)


def grid_of(tokens: Tensor, rows: int) -> Tensor:
    """Tokens (B, H * W, C) as (B, H, W, C)."""
    return tokens.reshape(tokens.shape[0], rows, -1, tokens.shape[2])


def rows_dim(out: Tensor, rows: int, channels_last: bool) -> int:
    """The dim of rows in what a module returns: an embedding may return (B, C, H, W) or (B, H, W, C)."""
    return -3 if channels_last and out.shape[-3] == rows else -2


class _Order(TorchFunctionMode):
    """Notes in which order padding and rolling are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.in_front = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.roll, Tensor.roll) and "roll" not in self.seen:
            self.seen.append("roll")
        if func is F.pad:
            amounts = args[1] if len(args) > 1 else kwargs["pad"]
            self.in_front |= any(amounts[::2])
            if any(amounts) and "pad" not in self.seen:
                self.seen.append("pad")
        return func(*args, **kwargs)


def padding_of(module: nn.Module, shapes: Sequence[tuple[int, ...]], rolls: bool) -> tuple[tuple[int, ...], str]:
    """The first of the shapes that a module takes, and how it pads rows that its window does not divide.

    Runs it for its shapes alone.

    Returns:
        The shape; and one of :data:`PADDING` if it pads, at the end alone, and rolls if it should; empty otherwise.

    Raises:
        ValueError: If it takes none of the shapes.
    """
    ghost = meta_copy(module)
    dtype = next((p.dtype for p in ghost.parameters()), torch.get_default_dtype())
    problem = ""
    for shape in shapes:
        order = _Order()
        try:
            with torch.no_grad(), torch.device("meta"), order:
                ghost(torch.empty(shape, dtype=dtype))
        except Exception as error:
            problem = problem or f"{shape} ({type(error).__name__}: {error})"
            continue
        found = " ".join(order.seen[:2])
        fits = found in PADDING and not order.in_front and ("roll" in found) == rolls
        return shape, found if fits else ""
    raise ValueError(f"{type(module).__name__} does not take {problem}; write a custom converter for it")


_proved: set[Hashable] = set()


@torch.no_grad()
def prove_cutting(module: nn.Module, cutting: Cutting, shape: tuple[int, ...], label: str) -> None:
    """Make sure that a module does on the windows of three ranks, one after the other, what it does on the whole.

    A module with the same parts may still do something else with rows. So a copy of it is run, in float64 with random
    parameters, on a grid of three windows. It is done once for modules that are alike.

    Raises:
        ValueError: If it does something else.
    """
    key = (cutting, shape, _signature(module))
    if key in _proved:
        return
    window, shift, kind, padding, channels_last, name = cutting
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        plain = in_double(plain_copy(module), generator)
        tokens = len(shape) == 3
        channels = shape[-1] if channels_last else shape[1]
        rows, columns = getattr(plain, name) if name else shape[1:3] if channels_last else shape[2:]
        size = 1 if kind == "expand" else window
        all_windows = -(-rows // size)
        rows = min(rows, 2 * size + (rows % size or size))
        last = min(3, all_windows)
        kept = [range(last - 1), range(all_windows - 1, all_windows)]
        for height in {rows, rows if name or not padding else 2 * size + 1}:
            x = torch.randn(1, height, columns, channels, dtype=torch.float64, generator=generator)
            with as_if_whole(plain, name, (height, columns), all_windows, kept):
                made = {"merge": -(-height // window), "expand": height * window}.get(kind, height)
                expected = _run(plain, x, made, tokens, channels_last)
                found = [
                    simulated(plain, x, sizes, cutting, tokens)
                    for sizes in ((1 + window // 2, height - 2 - window // 2, 1), (height - 1, 0, 1))
                    if min(sizes) >= 0
                ]
            for out in found:
                if out.shape != expected.shape or not (out - expected).abs().max() <= 1e-9 * expected.abs().max():
                    raise ValueError(
                        f"{label}: {type(module).__name__} was taken for a module that works on windows of {window} "
                        f"rows (shift {shift}, {kind}), and does something else with rows: write a custom converter "
                        "for it"
                    )
    _proved.add(key)


def simulated(plain: nn.Module, x: Tensor, sizes: tuple[int, ...], cutting: Cutting, tokens: bool) -> Tensor:
    """What ranks that hold so many rows of x (B, H, W, C) make of them, together; rows are dim 1."""
    window, shift, kind, padding, channels_last, name = cutting
    shares = shares_of(RowPartition(sizes, allow_empty=True), window, shift, kind, padding == "roll pad")
    x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)  # what lies beyond the edge is its last row
    outs = []
    for share in shares:
        rows, kept = share.result(window, kind)
        with as_if_whole(plain, name, (len(share.rows), x.shape[2]), share.windows, share.listed):
            outs.append(_run(plain, x[:, list(share.rows)], rows, tokens, channels_last)[:, :kept])
    out = torch.cat(outs, 1)
    if kind in ("merge", "expand"):
        return out
    place = places(shares)
    return out[:, [place[row] for row in range(sum(sizes))]]


def _run(plain: nn.Module, x: Tensor, rows: int, tokens: bool, channels_last: bool) -> Tensor:
    """Run a module on x (B, H, W, C); what comes out has its rows as dim 1 too."""
    out: Tensor = plain(x.flatten(1, 2) if tokens else x if channels_last else x.movedim(-1, 1))
    return grid_of(out, rows) if out.ndim == 3 else out.movedim(rows_dim(out, rows, channels_last), 1)


def _signature(module: nn.Module) -> Hashable:
    """What modules share that are alike but for the values of their parameters."""

    def plain(value: Any) -> bool:
        return value is None or isinstance(value, (int, float, str, tuple, list))

    parts = []
    for name, part in module.named_modules():
        state = {key: str(value) for key, value in vars(part).items() if plain(value) and key != "training"}
        shapes = [(key, tuple(value.shape)) for key, value in part.named_parameters(recurse=False)]
        parts.append((name, type(part), tuple(sorted(state.items())), tuple(shapes)))
    return tuple(parts)
