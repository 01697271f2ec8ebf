"""What adapters are made of: the forward of somebody else's module, written again for sharded rows, and a proof."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from credit_domain._torch_private import children_of
from credit_domain.blocks.block import Block, worked_out
from credit_domain.casts import cast_module
from credit_domain.engine.layer import DomainParallelLayer
from credit_domain.engine.ranks import domain_of, sizes_of
from credit_domain.model.trace import LONE_MANAGER
from credit_domain.ops.interpolation.interpolation import resampled_partition
from credit_mesh import DomainParallelManager, RowPartition

_Module = TypeVar("_Module", bound=nn.Module)


class Adapter(DomainParallelLayer):
    """A module of your own with another ``forward``: a converter for ``custom_converters`` is a subclass of this.

    Its ``forward`` finds the module as ``self.wrapped``, calls its children, and does with
    :mod:`credit_domain.functional` what mixes rows. The children are converted by the rules, and by your other
    converters. Parameters and their names stay as they are.

    .. code-block:: python

        class ShardedHead(Adapter):
            def forward(self, x):
                x = self.wrapped.conv(x)
                return credit_domain.functional.interpolate(x, scale_factor=2, dim=self.shard_dim)

        convert_to_domain_parallel(model, manager, custom_converters={Head: ShardedHead})

    It is made of the module to stand in for, as the layers of :mod:`credit_domain.layers` are.
    """

    visits_children = True
    """Tells the converter that the children are still called, and to convert them as well."""

    @property
    def sharding(self) -> dict[str, Any]:
        """The keyword arguments ``manager``, ``label`` and ``layer`` of :mod:`credit_domain.blocks`."""
        return {"manager": self.manager, "label": self.label, "layer": self._layer}


class ProvedAdapter(Adapter):
    """An adapter that is tried, when it is made, against the module that it stands in for; see :func:`prove`.

    Raises:
        ValueError: If the module computes something else.
    """

    def __init__(
        self,
        module: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(module, shard_dim, manager=manager, label=label)
        self._prove()

    def _prove(self) -> None:
        raise NotImplementedError


def is_candidate(module: nn.Module, inputs: int = 1) -> bool:
    """Whether a module is not converted yet, and its ``forward`` takes so many arguments and no more."""
    if isinstance(module, (DomainParallelLayer, Block)):
        return False
    try:
        kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    except (TypeError, ValueError):  # compiled to something that does not tell
        return False
    return kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * inputs


def prove(
    layer: DomainParallelLayer,
    what: str,
    inputs: Sequence[Sequence[Tensor | tuple[int, ...] | None]],
    forms: Sequence[str] = ("",),
    children: dict[str, nn.Module] | None = None,
    **attributes: Any,
) -> None:
    """Make sure that a layer computes on one rank what the module computes that it stands in for.

    Two modules with the same parts may still combine them differently, so both are run, on a copy in float64 with
    random parameters.

    Args:
        layer: The layer; its ``form`` becomes the first of ``forms`` that agrees.
        what: What the module was taken for.
        inputs: Arguments of each call: shapes are filled with random numbers.
        children: Stand-ins for children of the module, while it is tested.
        **attributes: Of the module, while it is tested: such as the size of the grid, where it is written into it.

    Raises:
        ValueError: If no form agrees.
    """
    problem = ""
    for form in forms:
        layer.__dict__["form"] = form
        problem = _difference(layer, inputs, children or {}, attributes)
        if not problem:
            return
    raise ValueError(
        f"{layer.label}: {type(layer.wrapped).__name__} has the parts of {what}, and {problem}. Pass a converter of "
        "your own in custom_converters={...}: a subclass of credit_domain.adapters.Adapter, with its forward for "
        "sharded rows"
    )


@torch.no_grad()
def _difference(
    layer: DomainParallelLayer,
    inputs: Sequence[Sequence[Tensor | tuple[int, ...] | None]],
    children: dict[str, nn.Module],
    attributes: dict[str, Any],
) -> str:
    """What differs between a layer on one rank and the module that it wraps, in words; empty if nothing."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        twin, generator = copy.deepcopy(layer), torch.Generator().manual_seed(0)
        for part in twin.modules():
            if isinstance(part, DomainParallelLayer):
                part.__dict__["manager"] = LONE_MANAGER
        plain = in_double(twin.wrapped, generator)
        children_of(plain).update(children)
        for name, value in attributes.items():
            setattr(plain, name, value)
        for listed in inputs:
            values = [
                torch.randn(value, dtype=torch.float64, generator=generator) if isinstance(value, tuple) else value
                for value in listed
            ]
            shapes = ", ".join("None" if value is None else str(tuple(value.shape)) for value in values)
            try:
                expected = plain.forward(*values)
            except Exception as error:
                return f"its forward does not take {shapes} ({type(error).__name__}: {error})"
            try:
                found = twin.forward(*values)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                return f"its parts do not fit together so ({type(error).__name__}: {error})"
            if not isinstance(expected, Tensor) or expected.shape != found.shape:
                return f"its forward gives something else for {shapes}"
            if not torch.allclose(expected, found, rtol=1e-9, atol=1e-9 * (float(expected.abs().max()) + 1e-30)):
                return f"its forward computes something else for {shapes}"
    return ""


@torch.no_grad()
def in_double(module: _Module, generator: torch.Generator) -> _Module:
    """Give a module random parameters in float64, on the CPU, in place; where it has no values, plausible buffers."""
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        module.to_empty(device="cpu")
        for buffer in module.buffers():
            buffer.fill_(1 if buffer.is_floating_point() else 0)
    cast_module(module, torch.float64, "cpu").eval()
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return module


def partition_at(layer: DomainParallelLayer, x: Tensor, dim: int, what: str = "") -> RowPartition:
    """Who holds which rows of a tensor that a layer meets in its forward; learned once for each ``what``."""
    sizes = sizes_of(x, dim, domain_of(layer.manager), layer.label, None, (layer._layer, what))
    return RowPartition(sizes, allow_empty=True)


def landing(layer: DomainParallelLayer, source: RowPartition, rows: int) -> RowPartition:
    """Who is to own so many rows that come of ``source``.

    They are divided as the model's input where it has as many rows, or as what a stride leaves of it, so that they meet
    what skipped the levels in between; otherwise as :func:`credit_domain.functional.interpolate` says.
    """
    return RowPartition(_landing(source.sizes, domain_of(layer.manager).declared, rows), allow_empty=True)


@worked_out
def _landing(sizes: tuple[int, ...], declared: str, rows: int) -> tuple[int, ...]:
    source = RowPartition(sizes, allow_empty=True)
    if declared:
        model = RowPartition(tuple(map(int, declared.split(","))))
        stride = -(-model.rows // rows)
        if -(-model.rows // stride) == rows:
            return model.strided(stride).sizes
    return resampled_partition(source, rows, None).sizes
