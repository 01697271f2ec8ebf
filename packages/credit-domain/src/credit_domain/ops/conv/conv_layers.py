"""Convolution layers; see :mod:`credit_domain.layers` for what all of them take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from credit_domain._torch_private import children_of, set_children
from credit_domain.engine.driver import per_dim
from credit_domain.engine.layer import (
    Decision,
    DomainParallelLayer,
    Seen,
    WeightedLayer,
    halo_of,
    known_layer,
    record_of,
)
from credit_domain.ops.conv.convolution import Convolution, Geometry, conv, geometry_of, padding_pairs
from credit_domain.ops.conv.transposed import TransposedConvolution, conv_transpose
from credit_halo import HaloExchange
from credit_mesh import DomainParallelManager


class _Convolution(WeightedLayer):
    """What all convolutions share.

    Attributes:
        may_share: Whether another layer may read the same tensor; see :mod:`credit_domain.ops.conv.sharing`.
    """

    spatial: int
    may_share = True
    reason = "reads rows of other ranks"

    def __init__(
        self,
        conv: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(conv, shard_dim, manager=manager, label=label)
        before, after = self._halo()
        self.__dict__["_halo_rows"] = (max(0, before), max(0, after))

    @classmethod
    def fate(cls, module: nn.Module, shard_dim: int) -> Decision:
        """Local where a rank needs nothing of others; see the base class."""
        m: Any = module
        if shard_dim < -cls.spatial and all(n == 1 for n in (*m.kernel_size, *m.stride)):
            # Rows may be among the positions of a sequence, or averaged away; only the model's author knows.
            return Decision("local", "its kernel is one position")
        if shard_dim >= -cls.spatial and not needs_halo(module, shard_dim):
            return Decision("local", "no row needs another")
        return super().fate(module, shard_dim)

    def _halo(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def conv(self) -> Any:
        """The wrapped convolution."""
        return self.wrapped

    @property
    def halo_width(self) -> int:
        """The most rows that a rank reads beyond either side of its own, where its rows divide by the stride."""
        return halo_of(*self.__dict__["_halo_rows"])

    @property
    def halo_exchange(self) -> HaloExchange | None:
        """The exchange of that halo as a layer of its own; None where nothing beyond a rank's own rows is read.

        The layer itself asks for exactly the rows that are missing, which may be fewer.
        """
        rows: tuple[int, int] = self.__dict__["_halo_rows"]
        return HaloExchange(rows, self._dim, manager=self.manager, label=self.label) if any(rows) else None


class _Conv(_Convolution):
    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> Convolution:
        """See the base class."""
        m: Any = module
        pads = padding_pairs(m.padding, m.kernel_size, m.stride, m.dilation, cls.spatial)[dim]
        return Convolution(m.kernel_size[dim], m.stride[dim], *pads, m.dilation[dim], m.padding_mode)

    def _geometry(self) -> Geometry:
        m = self.wrapped
        return geometry_of(m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode)

    def _halo(self) -> tuple[int, int]:
        op = self._geometry().along(self._dim)
        return op.before, op.span - 1 - op.before - (op.stride - 1)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's output rows: :func:`credit_domain.functional.conv2d`, or that of 1 or 3 dims."""
        return conv(x, self.weight, self.bias, self._geometry(), self.call, self.may_share)


@known_layer
class DomainParallelConv1d(_Conv):
    """:class:`torch.nn.Conv1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.Conv1d,)
    spatial = 1

    def __init__(
        self,
        conv: nn.Conv1d,
        shard_dim: int = -1,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(conv, shard_dim, manager=manager, label=label)


@known_layer
class DomainParallelConv2d(_Conv):
    """:class:`torch.nn.Conv2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel, stride, padding, dilation and padding mode, on any partition.
    """

    wraps = (nn.Conv2d,)
    spatial = 2


@known_layer
class DomainParallelConv3d(_Conv):
    """:class:`torch.nn.Conv3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W), as Conv2d."""

    wraps = (nn.Conv3d,)
    spatial = 3

    def __init__(
        self,
        conv: nn.Conv3d,
        shard_dim: int = 3,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(conv, shard_dim, manager=manager, label=label)


class _ConvTranspose(_Convolution):
    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> TransposedConvolution:
        """See the base class; ``output_size`` shows in the rows that came out."""
        m: Any = module
        values = (m.kernel_size, m.stride, m.padding, m.output_padding, m.dilation)
        kernel, stride, padding, more, dilation = (per_dim(value, cls.spatial)[dim] for value in values)
        op = TransposedConvolution(kernel, stride, padding, more, dilation)
        if seen is None:
            return op
        return op._replace(output_padding=seen.output[dim] - op.least_rows(seen.input[dim]))

    def _halo(self) -> tuple[int, int]:
        # Output row i reads the rows from (i + padding - reach) / stride to (i + padding) / stride; it is at i//stride.
        op = self.record(self.wrapped, self._dim)
        reach = op.dilation * (op.kernel - 1)
        return (reach - op.padding) // op.stride, (op.stride - 1 + op.padding) // op.stride

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """This rank's output rows: :func:`credit_domain.functional.conv_transpose2d`, or that of 1 or 3 dims.

        Args:
            x: This rank's rows.
            output_size: As in torch, with the **global** number of output rows.
        """
        m, dim = self.wrapped, self._dim
        output_padding, rows = m.output_padding, None
        if output_size is not None:
            wanted = list(output_size)[-self.spatial :]
            output_padding, rows = self._padding_for(wanted, x), int(wanted[dim])
        args = (m.stride, m.padding, tuple(output_padding), m.groups, m.dilation)
        return conv_transpose(self.spatial, x, self.weight, self.bias, *args, self.call, rows, self.may_share)

    def _padding_for(self, wanted: Sequence[int], x: Tensor) -> list[int]:
        """The output padding for an output of that size; along the sharded dim none, as the rows are asked for."""
        m, dims = self.wrapped, range(-self.spatial, 0)
        if len(wanted) < self.spatial:
            raise ValueError(f"{self.label}: output_size must have {self.spatial} sizes; got {tuple(wanted)}")
        least = [self.record(m, dim).least_rows(x.shape[dim]) for dim in dims]
        more = [0 if dim == self._dim else int(wanted[dim]) - least[dim] for dim in dims]
        if not all(0 <= more[dim] < m.stride[dim] for dim in dims):
            most = [least[dim] + m.stride[dim] - 1 for dim in dims]
            raise ValueError(f"{self.label}: output_size {tuple(wanted)} is not within {least} and {most}")
        return more


@known_layer
class DomainParallelConvTranspose1d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.ConvTranspose1d,)
    spatial = 1

    def __init__(
        self,
        conv: nn.ConvTranspose1d,
        shard_dim: int = -1,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(conv, shard_dim, manager=manager, label=label)


@known_layer
class DomainParallelConvTranspose2d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose2d` on a sharded tensor (B, C, H, W) or (C, H, W)."""

    wraps = (nn.ConvTranspose2d,)
    spatial = 2


@known_layer
class DomainParallelConvTranspose3d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.ConvTranspose3d,)
    spatial = 3

    def __init__(
        self,
        conv: nn.ConvTranspose3d,
        shard_dim: int = 3,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(conv, shard_dim, manager=manager, label=label)


class DomainParallelPeriodicConv2d(DomainParallelLayer):
    """A convolution of a global grid: rows reflect at the poles, longitude is circular.

    Wraps a module that has a convolution without padding as ``conv`` and pads by ``padding`` itself: reflecting rows,
    wrapping columns around. Parameters keep their names (``conv.weight``).

    Args:
        periodic_conv: The module to wrap.
        shard_dim: The sharded dim: -2, rows, or -1, longitude.

    Raises:
        ValueError: If the module has no such ``conv`` and ``padding``.
    """

    def __init__(
        self,
        periodic_conv: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        inner, padding = getattr(periodic_conv, "conv", None), getattr(periodic_conv, "padding", None)
        if not isinstance(inner, nn.Conv2d) or not isinstance(padding, int) or padding_of(inner) != {0}:
            raise ValueError(
                "DomainParallelPeriodicConv2d wraps a module with a torch.nn.Conv2d without padding as .conv and an "
                f"integer .padding; got {type(periodic_conv).__name__} with conv={inner!r}, padding={padding!r}"
            )
        super().__init__(periodic_conv, shard_dim, manager=manager, label=label)
        # The only child that differs from those of the wrapped module, which stays as it was.
        conv = _PeriodicConv2d(inner, padding, shard_dim, manager=manager, label=self.label)
        set_children(self, {**children_of(periodic_conv), "conv": conv})

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution itself, as the wrapped module has it: without the padding around it."""
        inner: nn.Conv2d = self._padded.wrapped
        return inner

    @property
    def _padded(self) -> DomainParallelConv2d:
        """The convolution with the padding in it: the child that computes."""
        padded: Any = children_of(self)["conv"]
        return padded  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The weight of the convolution."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the convolution."""
        return self.conv.bias

    @property
    def halo_width(self) -> int:
        """The most rows that a rank reads beyond either side of its own."""
        return self._padded.halo_width

    @property
    def halo_exchange(self) -> HaloExchange | None:
        """The exchange of that halo as a layer of its own; as that of DomainParallelConv2d."""
        return self._padded.halo_exchange

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the whole of which ``x``, (B, C, H, W), is this rank's part.

        Raises:
            ValueError: If there are too few rows to reflect, or as :func:`credit_domain.functional.conv2d`.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        out: Tensor = self._padded(x)
        return out


def padding_of(conv: nn.Conv2d) -> set[int]:
    """The numbers of rows and columns that a convolution pads by itself."""
    pairs = padding_pairs(conv.padding, conv.kernel_size, conv.stride, conv.dilation, 2)
    return {amount for pair in pairs for amount in pair}


class _PeriodicConv2d(DomainParallelConv2d):
    """The convolution of a periodic one, with the padding that was around it."""

    def __init__(self, conv: nn.Conv2d, padding: int, shard_dim: int, **settings: Any) -> None:
        self.__dict__["_pad"] = padding  # its halo is asked for while it is built
        super().__init__(conv, shard_dim, **settings)

    def _geometry(self) -> Geometry:
        m, pad = self.wrapped, self.__dict__["_pad"]
        return geometry_of(m.kernel_size, m.stride, pad, m.dilation, m.groups, ("reflect", "circular"))


def needs_halo(conv: nn.Module, shard_dim: int = -2) -> bool:
    """Whether a convolution or a transposed one does anything along the sharded dim that a rank cannot do alone.

    A kernel of one row, without stride and padding, works on any rows. So does a transposed kernel as high as its
    stride, without padding. Anything else depends on where the rows lie in the whole.
    """
    m: Any = conv
    if shard_dim < -len(m.kernel_size):
        return False  # the channels, or the batch: no spatial dim of this layer is sharded
    op = record_of(conv, shard_dim)
    if isinstance(op, TransposedConvolution):
        return bool(op.kernel != op.stride or op.padding or op.output_padding or (op.dilation > 1 and op.kernel > 1))
    assert isinstance(op, Convolution)
    return op.kernel > 1 or op.stride > 1 or bool(op.before or op.after)
