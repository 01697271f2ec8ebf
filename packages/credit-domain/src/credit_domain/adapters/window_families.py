"""Modules that cut the grid into windows of rows, run as they are on whole windows.

What a window holds does not depend on other windows. So each rank is brought the rows of whole windows, in an order in
which the module's own ``forward`` cuts them into these very windows, and its rows go home afterwards. The attention
itself, its biases and its norms stay the module's own code.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from credit_domain.adapters.stochastic import DomainParallelDropPath, is_drop_path
from credit_domain.casts import cast_module
from credit_domain.engine.driver import Step, bring
from credit_domain.engine.layer import DomainParallelLayer
from credit_domain.engine.ranks import Domain, constant, domain_of, sizes_of
from credit_domain.model.rules import decide
from credit_domain.model.trace import meta_copy, plain_copy
from credit_domain.ops.dropout.dropout_layers import DomainParallelDropout
from credit_halo import plan_rows
from credit_mesh import RowPartition

Kind = Literal["windows", "dilated", "merge", "expand"]
"""``windows``: consecutive rows, perhaps rolled; ``dilated``: every n-th row of n windows; ``merge``: each window
becomes one row; ``expand``: each row becomes several."""

PADDING = ("pad", "pad roll", "roll pad")
_NO_ROW = -1  # beyond the edge: the exchange fills it with zeros
_PAD = None  # padding that the module itself adds at the end


class Regrouping(NamedTuple):
    """What a rank is brought and sends back.

    Attributes:
        split: Brings the rows of this rank's windows.
        join: Brings its own rows back; of ``merge`` and ``expand`` the output stays, and this is None.
        rows: Rows that the module gets on this rank.
        out: Rows that it must return.
        kept: Those of them, from the first, that are this rank's, where nothing is brought back.
        windows: Windows of all ranks.
        own: This rank's windows ``[own[0], own[1])``.
        around: Windows of zeros before and after them.
    """

    split: Step
    join: Step | None
    rows: int
    out: int
    kept: int
    windows: int
    own: tuple[int, int]
    around: tuple[int, int]


class Share(NamedTuple):
    """What a rank works on: the rows that it gets, and windows as in :class:`Regrouping`."""

    rows: tuple[int, ...]
    windows: int
    own: tuple[int, int]
    around: tuple[int, int]

    def result(self, window: int, kind: Kind) -> tuple[int, int]:
        """Rows that come of them, and how many of these are kept where nothing is brought back."""
        if kind == "merge":
            return -(-len(self.rows) // window), self.own[1] - self.own[0]
        if kind == "expand":
            return len(self.rows) * window, (self.own[1] - self.own[0]) * window
        return len(self.rows), len(self.rows)


def _owners(source: RowPartition, window: int, shift: int, kind: Kind) -> list[int]:
    """Who works on each window: the owner of its first row; those with padding go to one rank."""
    windows = -(-source.rows // window)
    first = [k * window + (0 if kind == "dilated" else shift) for k in range(windows)]
    owners = [source.owner(min(row, source.rows - 1)) for row in first]
    if shift and windows > 1 and first[-1] > source.rows:
        owners[-1] = owners[-2]
    return owners


def _share(rank: int, source: RowPartition, window: int, shift: int, kind: Kind, roll_first: bool) -> Share:
    """The rows of a rank, in the order in which the module's own code cuts them into that rank's windows."""
    rows, owners = source.rows, _owners(source, window, shift, kind)
    windows = len(owners)
    mine = [k for k, owner in enumerate(owners) if owner == rank]
    own = (mine[0], mine[-1] + 1) if mine else (0, 0)
    if kind == "dilated":
        listed = [slot * windows + k for slot in range(window) for k in mine]
        return Share(
            tuple(row for row in listed if row < rows) or (_NO_ROW,) * window, windows, own, (0, int(not mine))
        )
    before = after = 0
    if not mine:
        after = 1
    elif shift and windows > 1:
        # Code that masks the last window, or does not roll a single one, is to find that here as in the whole.
        if mine[-1] != windows - 1:
            after = 1
        elif len(mine) == 1:
            before = 1
    period = rows if roll_first else windows * window
    slots: list[int | None] = []
    for k in mine:
        for slot in range(k * window, (k + 1) * window):
            row = (slot + shift) % period
            slots.append(row if row < rows and slot < period else _PAD)
    slots = [_NO_ROW] * (before * window) + slots + [_NO_ROW] * (after * window)
    if roll_first:
        while slots[-1] is _PAD:
            slots.pop()
    turn = len(slots) - shift % len(slots)
    slots = slots[turn:] + slots[:turn]  # which its own roll undoes
    while slots[-1] is _PAD:
        slots.pop()
    found = tuple(row for row in slots if row is not None)
    assert len(found) == len(slots), "padding must come last"
    return Share(found, windows, own, (before, after))


def shares_of(
    source: RowPartition, window: int, shift: int = 0, kind: Kind = "windows", roll_first: bool = False
) -> list[Share]:
    """What each rank works on.

    Args:
        source: Who holds which rows.
        window: Rows of a window; of ``expand``, rows that a row becomes.
        shift: Rows that the module rolls towards row 0 before it cuts.
        kind: What it does with windows.
        roll_first: Whether it rolls before it pads.
    """
    size = 1 if kind == "expand" else window
    return [_share(rank, source, size, shift, kind, roll_first) for rank in range(source.ranks)]


@constant
def _regroup(sizes: tuple[int, ...], rank: int, window: int, shift: int, kind: Kind, roll_first: bool) -> Regrouping:
    return _cached_regroup(sizes, rank, window, shift, kind, roll_first)


@lru_cache(maxsize=4096)
def _cached_regroup(
    sizes: tuple[int, ...], rank: int, window: int, shift: int, kind: Kind, roll_first: bool
) -> Regrouping:
    source = RowPartition(sizes, allow_empty=True)
    shares = shares_of(source, window, shift, kind, roll_first)
    held = RowPartition(tuple(len(share.rows) for share in shares), allow_empty=True)
    split = _step(source, held, [share.rows for share in shares], rank)
    join = None
    if kind not in ("merge", "expand"):
        place = {row: i for i, row in enumerate(row for share in shares for row in share.rows)}
        join = _step(held, source, [tuple(place[row] for row in source.interval(r)) for r in range(len(sizes))], rank)
    mine = shares[rank]
    out, kept = mine.result(window, kind)
    return Regrouping(split, join, len(mine.rows), out, kept, mine.windows, mine.own, mine.around)


def _step(source: RowPartition, target: RowPartition, needs: Sequence[tuple[int, ...]], rank: int) -> Step:
    local = all(need == tuple(source.interval(r)) for r, need in enumerate(needs))
    own = target.interval(rank)
    return Step(plan_rows(source, needs, rank=rank).key, local, own.start, len(own), own.start, len(own), target.rows)


class RegroupedModule(DomainParallelLayer):
    """A module on windows of rows, with its own ``forward``, on this rank's rows.

    Takes (B, C, H, W) where ``channels_last`` is false, otherwise (B, H, W, C), or tokens (B, H * W, C) of a module
    that stores its resolution. While the module runs, its stored resolution is that of the rows that it is given, and
    its mask that of their windows.

    Args:
        module: The module; its children must not mix rows but through its windows.
        window: Rows of a window; of ``expand``, rows that a row becomes.
        shift: Rows that the module rolls towards row 0 before it cuts.
        kind: What it does with windows.
        channels_last: Where its channels are.
        resolution: Name of the attribute that stores the resolution (H, W) of the whole input; empty if it has none.
        shapes: Shapes of an input, of which the first that it takes counts: it is tried on numbers of this size.
        takes: Names of children that mix rows within windows.
        shard_dim: The sharded dim, as of (B, C, H, W).
        label: What errors and traces call this layer; None takes the name of the class.

    Raises:
        ValueError: If a child mixes rows, the shift is not smaller than the window, other than rows are sharded, or the
            module does not do on whole windows what it does on the whole.
    """

    holds_other_rows = True
    """Inside, tensors hold other rows than those of this rank; verification looks at what comes out."""

    def __init__(
        self,
        module: nn.Module,
        window: int,
        shift: int = 0,
        kind: Kind = "windows",
        *,
        channels_last: bool = True,
        resolution: str = "",
        shapes: Sequence[tuple[int, ...]],
        takes: Sequence[str] = (),
        shard_dim: int = -2,
        label: str | None = None,
    ) -> None:
        kind_name = label or type(module).__name__
        if shard_dim != -2:
            raise ValueError(f"{kind_name}: rows are dim -2 of (B, C, H, W); got shard_dim={shard_dim}")
        if not 0 <= shift < max(window, 1):
            raise ValueError(f"{kind_name}: expected a shift smaller than the window of {window} rows; got {shift}")
        _check_children(module, takes)
        super().__init__(module, label=label)
        shape, padding = padding_of(module, shapes, shift > 0)
        self.__dict__["_settings"] = (window, shift, kind, padding)
        self.__dict__["_layout"] = (channels_last, resolution)
        _prove(self, shape)
        _replace_dropout(module)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """Run the module on whole windows; returns this rank's rows, in the layout that the module gives.

        Args:
            x: This rank's rows.
            more: Further arguments, of which none but None is taken.
            named: As ``more``.

        Raises:
            ValueError: On all ranks alike, if the rows are not those of the stored resolution, or their number is none
                that the module takes; if there are further arguments; and as :func:`credit_halo.exchange_rows`.

        Collectives:
            One message to and from each rank within reach, forward and backward, before and after the module; none
            where windows are not rolled and begin where ranks do.
        """
        m = self.wrapped
        if any(value is not None for value in (*more, *named.values())):
            raise ValueError(
                f"{self.label}: {type(m).__name__} was given more than its input, which may belong to other rows than "
                "the windows of this rank; write a custom converter for it"
            )
        domain = domain_of(self.manager)
        if domain.size == 1:
            out: Tensor = m.forward(x)
            return out
        channels_last, name = self.__dict__["_layout"]
        window, shift, kind, padding = self.__dict__["_settings"]
        resolution = tuple(getattr(m, name)) if name else ()
        tokens = x.ndim == 3
        if tokens and not resolution:
            raise ValueError(f"{self.label}: tokens of shape {tuple(x.shape)} need a module that stores its resolution")
        dim = -2 if tokens or not channels_last else -3
        sizes = sizes_of(x, dim, domain, self.label, None, self._layer)
        if tokens:
            sizes = self._rows_of_tokens(sizes, resolution)
        self._check_rows(sizes, resolution)
        plan = _regroup(sizes, domain.rank, window, shift, kind, padding == "roll pad")
        if tokens:
            x, dim = x.reshape(x.shape[0], sizes[domain.rank], resolution[1], x.shape[2]), -3
        width = x.shape[-2 if channels_last else -1]
        x = bring(x, dim, plan.split, domain, self.label)
        if tokens:
            x = x.flatten(-3, -2)
        with _as_if_whole(m, name, (plan.rows, width), plan.windows, _windows(plan)):
            out = m.forward(x)
        if out.ndim == 3:
            return self._home(_grid_of(out, plan.out), -3, plan, domain).flatten(-3, -2)
        return self._home(out, _rows_dim(out, plan.out, channels_last), plan, domain)

    def _home(self, out: Tensor, dim: int, plan: Regrouping, domain: Domain) -> Tensor:
        if plan.join is not None:
            return bring(out, dim, plan.join, domain, self.label)
        return out if plan.kept == plan.out else out.narrow(dim, 0, plan.kept)

    def _rows_of_tokens(self, sizes: tuple[int, ...], resolution: tuple[int, ...]) -> tuple[int, ...]:
        width = resolution[1]
        if any(size % width for size in sizes):
            raise ValueError(
                f"{self.label}: expected tokens of whole rows of {width}; the ranks have {', '.join(map(str, sizes))} "
                "tokens"
            )
        return tuple([size // width for size in sizes])

    def _check_rows(self, sizes: tuple[int, ...], resolution: tuple[int, ...]) -> None:
        rows, (window, _, kind, padding) = sum(sizes), self.__dict__["_settings"]
        kind_name = type(self.wrapped).__name__
        if resolution and rows != resolution[0]:
            raise ValueError(
                f"{self.label}: {kind_name} is for {resolution[0]} rows; the ranks have {', '.join(map(str, sizes))}, "
                f"{rows} in all"
            )
        if kind != "expand" and rows % window and not padding:
            raise ValueError(
                f"{self.label}: {rows} rows are no multiple of {window}, and {kind_name} is not known to pad them at "
                "their end; pad the input of the model"
            )


def _grid_of(tokens: Tensor, rows: int) -> Tensor:
    """Tokens (B, H * W, C) as (B, H, W, C)."""
    return tokens.reshape(tokens.shape[0], rows, -1, tokens.shape[2])


def _rows_dim(out: Tensor, rows: int, channels_last: bool) -> int:
    """The dim of rows in what a module returns: an embedding may return (B, C, H, W) or (B, H, W, C)."""
    return -3 if channels_last and out.shape[-3] == rows else -2


def _windows(share: Share | Regrouping) -> list[range]:
    """The windows of a rank; those of zeros count as the first."""
    before, after = share.around
    return [*[range(1)] * before, range(*share.own), *[range(1)] * after]


@contextmanager
def _as_if_whole(
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


# What may be inside


def _check_children(module: nn.Module, takes: Sequence[str]) -> None:
    """Refuse children that mix rows: they would see other rows than they should.

    Raises:
        ValueError: With the name of the child.
    """
    for name, child in module.named_modules():
        if child is module or name in takes or isinstance(child, (nn.Dropout, DomainParallelDropout)):
            continue
        if is_drop_path(child):
            continue
        decision = decide(child, -2)
        if decision.fate in ("refused", "converted") or isinstance(child, DomainParallelLayer):
            raise ValueError(
                f"{type(module).__name__} holds {name} ({type(child).__name__}), which may mix rows other than those "
                "of a window; write a custom converter for it, or leave this one out of custom_converters"
            )


def _replace_dropout(module: nn.Module) -> None:
    """Let ranks drop different positions, and the same samples, as the conversion does elsewhere."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Dropout:
                parent._modules[name] = DomainParallelDropout(child)
            elif child is not None and is_drop_path(child):
                parent._modules[name] = DomainParallelDropPath(child)


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
    """Whether a module pads rows that its window does not divide, and whether before or after it rolls.

    Runs it for its shapes alone.

    Args:
        module: The module; it is not touched.
        shapes: Shapes of an input.
        rolls: Whether it should roll.

    Returns:
        The first of the shapes that it takes, and one of :data:`PADDING` if it pads, at the end alone; empty otherwise.

    Raises:
        ValueError: If it takes none of them.
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


# The proof that it is what it was taken for

_proved: set[Hashable] = set()


@torch.no_grad()
def _prove(layer: RegroupedModule, shape: tuple[int, ...]) -> None:
    """Make sure that a module does on the windows of three ranks, one after the other, what it does on the whole.

    A module with the same parts may still do something else with rows. So a copy of it is run, in float64 with random
    parameters, on a grid of three windows. It is done once for modules that are alike.

    Raises:
        ValueError: If it does something else.
    """
    settings, layout = layer.__dict__["_settings"], layer.__dict__["_layout"]
    key = (settings, layout, shape, _signature(layer.wrapped))
    if key in _proved:
        return
    (window, shift, kind, padding), (channels_last, name) = settings, layout
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        plain, generator = _plain_copy(layer.wrapped), torch.Generator().manual_seed(0)
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
            with _as_if_whole(plain, name, (height, columns), all_windows, kept):
                made = {"merge": -(-height // window), "expand": height * window}.get(kind, height)
                expected = _run(plain, x, made, tokens, channels_last)
                found = [
                    _simulated(plain, x, sizes, settings, layout, tokens)
                    for sizes in ((1 + window // 2, height - 2 - window // 2, 1), (height - 1, 0, 1))
                    if min(sizes) >= 0
                ]
            for out in found:
                if out.shape != expected.shape or not (out - expected).abs().max() <= 1e-9 * expected.abs().max():
                    raise ValueError(
                        f"{layer.label}: {type(layer.wrapped).__name__} was taken for a module that works on windows "
                        f"of {window} rows (shift {shift}, {kind}), and does something else with rows: write a custom "
                        "converter for it"
                    )
    _proved.add(key)


def _simulated(
    plain: nn.Module,
    x: Tensor,
    sizes: tuple[int, ...],
    settings: tuple[int, int, Kind, str],
    layout: tuple[bool, str],
    tokens: bool,
) -> Tensor:
    """What ranks that hold so many rows of x (B, H, W, C) make of them, together; rows are dim 1."""
    window, shift, kind, padding = settings
    shares = shares_of(RowPartition(sizes, allow_empty=True), window, shift, kind, padding == "roll pad")
    x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)  # what lies beyond the edge is its last row
    outs = []
    for share in shares:
        rows, kept = share.result(window, kind)
        part = x[:, list(share.rows)]
        with _as_if_whole(plain, layout[1], (len(share.rows), x.shape[2]), share.windows, _windows(share)):
            outs.append(_run(plain, part, rows, tokens, layout[0])[:, :kept])
    out = torch.cat(outs, 1)
    if kind in ("merge", "expand"):
        return out
    place = {row: i for i, row in enumerate(row for share in shares for row in share.rows)}
    return out[:, [place[row] for row in range(sum(sizes))]]


def _run(plain: nn.Module, x: Tensor, rows: int, tokens: bool, channels_last: bool) -> Tensor:
    """Run a module on x (B, H, W, C); what comes out has its rows as dim 1 too."""
    out: Tensor = plain(x.flatten(1, 2) if tokens else x if channels_last else x.movedim(-1, 1))
    return _grid_of(out, rows) if out.ndim == 3 else out.movedim(_rows_dim(out, rows, channels_last), 1)


def _plain_copy(module: nn.Module) -> nn.Module:
    plain = plain_copy(module)
    generator = torch.Generator().manual_seed(0)
    if any(value.is_meta for value in (*plain.parameters(), *plain.buffers())):
        plain.to_empty(device="cpu")
        for buffer in plain.buffers():
            buffer.zero_()
    cast_module(plain, torch.float64, "cpu").eval()
    for parameter in plain.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return plain


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
