"""Convolutions on sharded rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from credit_domain.functional.conv import conv, conv_transpose, padding_pairs
from credit_domain.layers.base import DomainParallelLayer, WeightedLayer, halo_of, spatial_dim
from credit_halo import HaloExchange
from credit_mesh import DomainParallelManager


class _Convolution(WeightedLayer):
    """What all convolutions share."""

    spatial: int

    def __init__(
        self,
        conv: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(conv, shard_dim, manager=manager, label=label)
        at = spatial_dim(conv, shard_dim, self.spatial)
        # Kept negative: a dim counted from the first would be another one where the batch dim is missing.
        self.__dict__["_dim"] = at - self.spatial
        before, after = self._halo(at)
        self.__dict__["_halo_rows"] = (max(0, before), max(0, after))

    def _halo(self, at: int) -> tuple[int, int]:
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
    def _halo(self, at: int) -> tuple[int, int]:
        m = self.wrapped
        before, _ = padding_pairs(m.padding, m.kernel_size, m.stride, m.dilation, self.spatial)[at]
        return before, m.dilation[at] * (m.kernel_size[at] - 1) - before - (m.stride[at] - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.

        Returns:
            The output rows whose first input row (``j * stride``) this rank owns.

        Raises:
            ValueError: As the function of the same kind in :mod:`credit_domain.functional`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        m = self.wrapped
        args = (m.stride, m.padding, m.dilation, m.groups, m.padding_mode)
        return conv(
            self.spatial, x, self.weight, self.bias, *args, self._dim, None, self.manager, self.label, layer=self._layer
        )


class DomainParallelConv1d(_Conv):
    """:class:`torch.nn.Conv1d` on a sharded tensor (B, C, L) or (C, L).

    Args:
        conv: The convolution to wrap.
        shard_dim: The sharded dim.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

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


class DomainParallelConv2d(_Conv):
    """:class:`torch.nn.Conv2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel, stride, padding, dilation and padding mode, on any partition.

    Args:
        conv: The convolution to wrap.
        shard_dim: The sharded dim; -2 is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.Conv2d,)
    spatial = 2


class DomainParallelConv3d(_Conv):
    """:class:`torch.nn.Conv3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :class:`DomainParallelConv2d`.

    Args:
        conv: The convolution to wrap.
        shard_dim: The sharded dim; 3, or -2, is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

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
    def _halo(self, at: int) -> tuple[int, int]:
        m = self.wrapped
        # Output row i reads the rows from (i + padding - reach) / stride to (i + padding) / stride; it is at i//stride.
        reach = m.dilation[at] * (m.kernel_size[at] - 1)
        return (reach - m.padding[at]) // m.stride[at], (m.stride[at] - 1 + m.padding[at]) // m.stride[at]

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Transposed convolution of the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.
            output_size: As in torch, with the **global** number of output rows.

        Returns:
            The output rows ``i`` whose input row ``i // stride`` this rank owns.

        Raises:
            ValueError: As the function of the same kind in :mod:`credit_domain.functional`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        m = self.wrapped
        output_padding, rows = m.output_padding, None
        if output_size is not None:
            wanted = list(output_size)[-self.spatial :]
            rows = int(wanted[self._dim])
            at = self._dim + self.spatial
            # torch works out the padding of the other dims; along the sharded one it is asked for what it takes.
            wanted[at] = (x.shape[self._dim] - 1) * m.stride[at] - 2 * m.padding[at]
            wanted[at] += m.dilation[at] * (m.kernel_size[at] - 1) + 1
            output_padding = m._output_padding(x, wanted, m.stride, m.padding, m.kernel_size, self.spatial, m.dilation)
        args = (m.stride, m.padding, tuple(output_padding), m.groups, m.dilation, self._dim, None, self.manager)
        return conv_transpose(
            self.spatial, x, self.weight, self.bias, *args, self.label, layer=self._layer, output_rows=rows
        )


class DomainParallelConvTranspose1d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose1d` on a sharded tensor (B, C, L) or (C, L).

    Args:
        conv: The transposed convolution to wrap.
        shard_dim: The sharded dim.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

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


class DomainParallelConvTranspose2d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Args:
        conv: The transposed convolution to wrap.
        shard_dim: The sharded dim; -2 is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.ConvTranspose2d,)
    spatial = 2


class DomainParallelConvTranspose3d(_ConvTranspose):
    """:class:`torch.nn.ConvTranspose3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    Args:
        conv: The transposed convolution to wrap.
        shard_dim: The sharded dim; 3, or -2, is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

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
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.

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
        self.__dict__["_modules"] = {**periodic_conv._modules, "conv": conv}

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution itself, as the wrapped module has it: without the padding around it."""
        inner: nn.Conv2d = self._padded.wrapped
        return inner

    @property
    def _padded(self) -> DomainParallelConv2d:
        """The convolution with the padding in it: the child that computes."""
        padded: Any = self._modules["conv"]
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
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

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

    def _halo(self, at: int) -> tuple[int, int]:
        padding = self.__dict__["_pad"]
        m = self.wrapped
        return padding, m.dilation[at] * (m.kernel_size[at] - 1) - padding - (m.stride[at] - 1)

    def forward(self, x: Tensor) -> Tensor:
        m = self.wrapped
        args = (m.stride, self.__dict__["_pad"], m.dilation, m.groups, "zeros", self._dim, None, self.manager)
        modes = ("reflect", "circular")
        return conv(2, x, self.weight, self.bias, *args, self.label, layer=self._layer, padding_modes=modes)
