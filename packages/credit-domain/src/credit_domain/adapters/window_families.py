"""Modules that cut the grid into windows of rows, run as they are on whole windows.

What a window holds does not depend on other windows. So each rank is brought the rows of whole windows, in an order in
which the module's own ``forward`` cuts them into these very windows, and its rows go home afterwards. The attention
itself, its biases and its norms stay the module's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from credit_domain._torch_private import children_of
from credit_domain.adapters.stochastic import DomainParallelDropPath, is_drop_path
from credit_domain.adapters.window_proof import as_if_whole, grid_of, padding_of, prove_cutting, rows_dim
from credit_domain.adapters.window_shares import Cutting, Kind, Regrouping, regroup
from credit_domain.engine.driver import bring
from credit_domain.engine.layer import DomainParallelLayer
from credit_domain.engine.ranks import Domain, domain_of, sizes_of
from credit_domain.model.rules import decide
from credit_domain.ops.dropout.dropout_layers import DomainParallelDropout


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
        cutting = self.__dict__["_cutting"] = Cutting(window, shift, kind, padding, channels_last, resolution)
        prove_cutting(module, cutting, shape, self.label)
        _replace_dropout(module)

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """Run the module on whole windows; returns this rank's rows, in the layout that the module gives.

        Further arguments must be None.

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
        window, shift, kind, padding, channels_last, name = self.__dict__["_cutting"]
        resolution = tuple(getattr(m, name)) if name else ()
        tokens = x.ndim == 3
        if tokens and not resolution:
            raise ValueError(f"{self.label}: tokens of shape {tuple(x.shape)} need a module that stores its resolution")
        dim = -2 if tokens or not channels_last else -3
        sizes = sizes_of(x, dim, domain, self.label, None, self._layer)
        if tokens:
            sizes = self._rows_of_tokens(sizes, resolution)
        self._check_rows(sizes, resolution)
        plan = regroup(sizes, domain.rank, window, shift, kind, padding == "roll pad")
        if tokens:
            x, dim = x.reshape(x.shape[0], sizes[domain.rank], resolution[1], x.shape[2]), -3
        width = x.shape[-2 if channels_last else -1]
        x = bring(x, dim, plan.split, domain, self.label)
        if tokens:
            x = x.flatten(-3, -2)
        share = plan.share
        with as_if_whole(m, name, (len(share.rows), width), share.windows, share.listed):
            out = m.forward(x)
        if out.ndim == 3:
            return self._home(grid_of(out, plan.out), -3, plan, domain).flatten(-3, -2)
        return self._home(out, rows_dim(out, plan.out, channels_last), plan, domain)

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
        rows, cutting = sum(sizes), self.__dict__["_cutting"]
        kind_name = type(self.wrapped).__name__
        if resolution and rows != resolution[0]:
            raise ValueError(
                f"{self.label}: {kind_name} is for {resolution[0]} rows; the ranks have {', '.join(map(str, sizes))}, "
                f"{rows} in all"
            )
        if cutting.kind != "expand" and rows % cutting.window and not cutting.padding:
            raise ValueError(
                f"{self.label}: {rows} rows are no multiple of {cutting.window}, and {kind_name} is not known to pad "
                "them at their end; pad the input of the model"
            )


# What may be inside


def _check_children(module: nn.Module, takes: Sequence[str]) -> None:
    """Refuse children that mix rows: they would see other rows than they should."""
    for name, child in module.named_modules():
        dropping = isinstance(child, (nn.Dropout, DomainParallelDropout)) or is_drop_path(child)
        if child is module or name in takes or dropping:
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
        for name, child in list(children_of(parent).items()):
            if type(child) is nn.Dropout:
                children_of(parent)[name] = DomainParallelDropout(child)
            elif child is not None and is_drop_path(child):
                children_of(parent)[name] = DomainParallelDropPath(child)
