"""Padding layers; see :mod:`credit_domain.layers` for what all of them take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from credit_domain._torch_private import children_of, set_children
from credit_domain.engine.layer import Decision, DomainParallelLayer, Seen, known_layer
from credit_domain.engine.row_op import RowOp
from credit_domain.ops.conv.conv_layers import DomainParallelConv2d
from credit_domain.ops.conv.convolution import Geometry, geometry_of, padding_pairs
from credit_domain.ops.padding.padding import Padding, pad_rows
from credit_halo import HaloExchange
from credit_mesh import DomainParallelManager

_MODES: dict[str, tuple[type[nn.Module], ...]] = {
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


@known_layer
class DomainParallelPad(DomainParallelLayer):
    """Any of torch's padding layers on a sharded tensor: zeros, a constant, reflection, replication or circular.

    Who owns the output rows is said in :func:`credit_domain.functional.pad`. See :mod:`credit_domain.layers`;
    ``shard_dim`` may be a dim that the layer pads or not.
    """

    wraps = tuple(kind for kinds in _MODES.values() for kind in kinds)
    reason = "adds rows at the edges only"

    @classmethod
    def fate(cls, module: nn.Module, shard_dim: int) -> Decision:
        """Only the dims that it pads; see the base class."""
        padded = len(module.padding) // 2  # type: ignore[arg-type]
        if shard_dim < -padded:
            return Decision("refused", f"a {padded}-D layer does not have the sharded dim {shard_dim}")
        return super().fate(module, shard_dim)

    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp:
        """See the base class."""
        m: Any = module
        rows = m.padding[-2 - 2 * dim :][:2]
        mode = _mode_of(module)
        value = float(m.value).hex() if mode == "constant" else None
        return Padding(rows[0], rows[1], mode, value, dim, len(m.padding) // 2 + 2, len(m.padding))

    def forward(self, x: Tensor) -> Tensor:
        """Pad the whole of which ``x`` is this rank's part: :func:`credit_domain.functional.pad`."""
        m, mode, dim = self.wrapped, _mode_of(self.wrapped), self.shard_dim
        value = m.value if mode == "constant" else None
        if dim >= 0:
            dim -= max(x.ndim, len(m.padding) // 2 + 2)
        return pad_rows(x, m.padding, mode, value, self.call._replace(dim=dim))


def _mode_of(module: nn.Module) -> str:
    return next(mode for mode, kinds in _MODES.items() if isinstance(module, kinds))


class DomainParallelCrossEmbedBranch(DomainParallelLayer):
    """A :class:`torch.nn.ZeroPad2d` followed by a :class:`torch.nn.Conv2d`, as one layer on a sharded tensor.

    The padding becomes part of the convolution: zeros beyond an edge are not rows that anybody owns, so that output row
    ``j`` comes out on the owner of input row ``j * stride`` of what came in. Parameters keep their names
    (``1.weight``).

    Args:
        branch: The module to wrap: ``torch.nn.Sequential(ZeroPad2d, Conv2d)``.

    Raises:
        ValueError: If the module is no such pair, the padding crops, or the convolution pads by other than zeros.
    """

    wraps = (nn.Sequential,)

    def __init__(
        self,
        branch: nn.Sequential,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(branch, shard_dim, manager=manager, label=label)
        pad, inner = branch if len(branch) == 2 else (None, None)
        if not isinstance(pad, nn.ZeroPad2d) or not isinstance(inner, nn.Conv2d):
            kinds = ", ".join(type(child).__name__ for child in branch)
            raise ValueError(f"{self.label} wraps torch.nn.Sequential(ZeroPad2d, Conv2d); got Sequential({kinds})")
        left, right, top, bottom = pad.padding
        if min(pad.padding) < 0:
            raise ValueError(f"{self.label}: ZeroPad2d must not crop; its padding is {pad.padding}")
        if inner.padding_mode != "zeros" and inner.padding not in ((0, 0), "valid"):
            raise ValueError(
                f"{self.label}: the convolution must pad by zeros, as what is before it does; its padding_mode is "
                f"{inner.padding_mode!r}"
            )
        # The only child that differs from those of the wrapped module, which stays as it was.
        padded = _PaddedConv2d(inner, ((top, bottom), (left, right)), shard_dim, manager=manager, label=self.label)
        first, second = children_of(branch)
        set_children(self, {first: pad, second: padded})
        self.__dict__["_conv"] = second

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution itself, as the wrapped branch has it: without the padding around it."""
        inner: nn.Conv2d = self._padded.wrapped
        return inner

    @property
    def weight(self) -> Tensor:
        """The weight of the convolution."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the convolution."""
        return self.conv.bias

    @property
    def _padded(self) -> DomainParallelConv2d:
        """The convolution with the padding in it: the child that computes."""
        padded: Any = children_of(self)[self.__dict__["_conv"]]
        return padded  # type: ignore[no-any-return]

    @property
    def halo_width(self) -> int:
        """The most rows that a rank reads beyond either side of its own."""
        return self._padded.halo_width

    @property
    def halo_exchange(self) -> HaloExchange | None:
        """The exchange of that halo as a layer of its own; as that of DomainParallelConv2d."""
        return self._padded.halo_exchange

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve the whole of which ``x``, (B, C, H, W), is this rank's part.

        Raises:
            ValueError: As :func:`credit_domain.functional.conv2d`.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        out: Tensor = self._padded(x)
        return out


class _PaddedConv2d(DomainParallelConv2d):
    """A convolution with the zeros that were around its input."""

    def __init__(self, conv: nn.Conv2d, around: tuple[tuple[int, int], ...], shard_dim: int, **settings: Any) -> None:
        own = padding_pairs(conv.padding, conv.kernel_size, conv.stride, conv.dilation, 2)
        # Its halo is asked for while it is built.
        self.__dict__["_pads"] = tuple((a + c, b + d) for (a, b), (c, d) in zip(around, own, strict=True))
        super().__init__(conv, shard_dim, **settings)

    def _geometry(self) -> Geometry:
        m = self.wrapped
        return geometry_of(m.kernel_size, m.stride, self.__dict__["_pads"], m.dilation, m.groups, "zeros")
