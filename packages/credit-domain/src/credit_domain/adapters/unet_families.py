"""Adapters for convolutional UNets: attention over all tokens, periodic convolutions, decoders, padded grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from credit_domain.adapters.adapter import Adapter, ProvedAdapter, is_candidate, partition_at, prove
from credit_domain.adapters.registry import register
from credit_domain.blocks.attention import attention, linear_attention, over_tokens
from credit_domain.engine.ranks import domain_of, normal_dim
from credit_domain.model.trace import trace
from credit_domain.ops.conv.conv_layers import DomainParallelPeriodicConv2d, padding_of
from credit_domain.ops.interpolation.interpolation import resample
from credit_domain.ops.padding.padding import pad
from credit_domain.ops.rearranging import crop
from credit_mesh import DomainParallelManager

# Attention over all tokens


def is_token_attention(module: nn.Module) -> bool:
    """Whether a module looks like the attention of diffusion UNets: ``to_qkv`` of each point, ``heads``, ``to_out``."""
    heads, to_qkv = getattr(module, "heads", None), getattr(module, "to_qkv", None)
    if type(heads) is not int or not isinstance(to_qkv, nn.Conv2d) or not is_candidate(module):
        return False
    weighted = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if not {"to_qkv", "to_out"} <= weighted <= {"to_qkv", "to_out", "norm"} or not own <= {"mem_kv"}:
        return False
    if type(getattr(module, "scale", 1.0)) is not float or hasattr(module, "window_size"):
        return False
    return to_qkv.kernel_size == (1, 1) and to_qkv.out_channels % (3 * heads) == 0


class DomainParallelTokenAttention(ProvedAdapter):
    """Full or linear attention over all tokens of a grid, with the parameters of the module that it stands in for.

    The module has 1 x 1 convolutions ``to_qkv`` and ``to_out`` (or a sequence with further layers), ``heads``, and may
    have ``scale``, a ``norm`` of its input and ``mem_kv``, keys and values that are learned. Linear attention is
    ``softmax(q) * scale @ (softmax(k)^T @ v)``. Which of the two it is, a run on random numbers tells.
    """

    def _prove(self) -> None:
        inputs = [[(2, self.to_qkv.in_channels, 4, 5)]]
        prove(self, "full or linear attention over all tokens", inputs, ("linear", "full"))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the tokens of all ranks; returns this rank's rows of (B, C, H, W).

        Errors and collectives are those of :func:`credit_domain.blocks.attention` or of
        :func:`credit_domain.blocks.linear_attention`.
        """
        m: Any = self.wrapped
        at = normal_dim(self.shard_dim, x.ndim, 2, self.label)
        norm = getattr(m, "norm", None)
        qkv = m.to_qkv(x if norm is None else norm(x))
        result: Tensor = m.to_out(over_tokens(qkv, m.heads, at, self._attend))
        return result

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        memory, scale = getattr(self.wrapped, "mem_kv", None), getattr(self.wrapped, "scale", None)
        if memory is not None:
            key, value = self._with_memory(key, value, memory)
        if self.form == "linear":
            return linear_attention(query, key, value, scale=scale, manager=self.manager, label=self.label)
        return attention(query, key, value, scale=scale, **self.sharding)

    def _with_memory(self, key: Tensor, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Learned keys and values before those of the first rank, where they count once; no rows of them elsewhere."""
        if self.form == "linear":  # (2, heads, channels, tokens)
            memory = memory.mT
        first = domain_of(self.manager).rank == 0
        keys, values = memory[:, None, :, : memory.shape[2] if first else 0].expand(-1, key.shape[0], -1, -1, -1)
        return torch.cat([keys, key], -2), torch.cat([values, value], -2)


register(
    is_token_attention,
    DomainParallelTokenAttention,
    name="Attention over all tokens",
    matches="convolutions of one point `to_qkv`, `heads` and `to_out`",
    notes="full or linear, (B, C, H, W); with learned keys and values `mem_kv`",
)


# Periodic convolutions


def is_periodic_conv(module: nn.Module) -> bool:
    """Whether a module looks like a convolution that pads by itself: ``conv`` without padding, a number ``padding``."""
    padding, children = getattr(module, "padding", None), dict(module.named_children())
    if type(padding) is not int or list(children) != ["conv"] or not is_candidate(module):
        return False
    conv = children["conv"]
    return isinstance(conv, nn.Conv2d) and padding > 0 and padding_of(conv) == {0}


def periodic_conv(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """A convolution whose longitude wraps around and whose rows reflect; a module that pads otherwise is refused."""
    layer = DomainParallelPeriodicConv2d(module, shard_dim, label=label)
    conv = layer.conv
    size = layer.padding + 3 + max(d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    prove(layer, "a convolution with circular columns and reflected rows", [[(1, conv.in_channels, size, size + 1)]])
    return layer


register(
    is_periodic_conv,
    periodic_conv,
    name="Periodic convolution",
    matches="an only child `conv` without padding, and a number `padding`",
    notes="longitude wraps around, rows reflect",
)


# Decoders


def is_decoder_block(module: nn.Module) -> bool:
    """Whether a module looks like the decoder of a UNet: ``conv1``, ``conv2``, and perhaps attention after each."""
    children = dict(module.named_children())
    if not {"conv1", "conv2"} <= set(children) <= {"conv1", "conv2", "attention1", "attention2"}:
        return False
    return is_candidate(module, 2) and _first_conv(children["conv1"]) is not None


class DomainParallelDecoderBlock(ProvedAdapter):
    """Rows and columns doubled, concatenated with those that skipped the levels below, and convolved twice.

    The module doubles by ``F.interpolate(x, scale_factor=2, mode=m.interpolation_mode)``, ``nearest`` where it has no
    such attribute; concatenates with ``skip`` and calls ``attention1``, unless ``skip`` is None; and calls ``conv1``,
    ``conv2`` and ``attention2``. Attention may be missing. Rows come out divided as those of ``skip``.
    """

    def _prove(self) -> None:
        conv = _first_conv(self.conv1)
        channels = 0 if conv is None else conv.in_channels
        inputs: list[list[tuple[int, ...] | None]] = [[(2, channels, 6, 8), None]]
        if channels > 1:
            inputs.append([(2, channels - 1, 6, 8), (2, 1, 12, 16)])
        prove(self, "a decoder that doubles rows and columns, and concatenates", inputs)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Decode this rank's rows of (B, C, H, W); returns (B, C, 2 H, 2 W).

        Errors and collectives are those of :func:`credit_domain.functional.interpolate` and of the layers within.
        """
        m: Any = self.wrapped
        target = None if skip is None else partition_at(self, skip, self.shard_dim, "skip")
        mode = getattr(m, "interpolation_mode", "nearest")
        x = resample(x, None, 2.0, mode, None, None, False, target, self.call)
        if skip is not None:
            x = torch.cat([x, skip], 1)
            x = m.attention1(x) if hasattr(m, "attention1") else x
        x = m.conv2(m.conv1(x))
        return m.attention2(x) if hasattr(m, "attention2") else x


def _first_conv(module: nn.Module) -> nn.Conv2d | None:
    return next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)


register(
    is_decoder_block,
    DomainParallelDecoderBlock,
    name="Decoder of a UNet",
    matches="`conv1`, `conv2`, perhaps `attention1` and `attention2`; takes a tensor and a skip",
    notes="doubles rows and columns, and concatenates",
)


# Grids that the model pads


class DomainParallelPadded(Adapter):
    """A model whose forward pads its input to multiples of a number, and crops its output to the grid it was given.

    The whole is padded and cropped here; the model's own forward then has nothing left to pad, since every rank holds
    whole blocks of ``multiple`` rows. It is no guess from the model's parts: name the model and how it pads, as
    ``custom_converters={MyUNet: functools.partial(DomainParallelPadded, multiple=32)}``.

    Args:
        module: The module; its forward takes one tensor and returns one of as many rows and columns.
        multiple: What rows and columns are padded to multiples of.
        mode: How: as in :func:`torch.nn.functional.pad`.
        both_sides: Whether half of it goes before the first row and column, rounded down, in place of all after the
            last.
        channels: Channels of the input; None takes those of the first convolution.

    Raises:
        ValueError: If the module pads otherwise.
    """

    def __init__(
        self,
        module: nn.Module,
        shard_dim: int = -2,
        *,
        multiple: int,
        mode: str = "constant",
        both_sides: bool = False,
        channels: int | None = None,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(module, shard_dim, manager=manager, label=label)
        self.__dict__.update(pad_multiple=multiple, pad_mode=mode, pad_both_sides=both_sides)
        first = _first_conv(module)
        channels = first.in_channels if channels is None and first is not None else channels
        what = f"a model that pads to multiples of {multiple} ({mode}, {'both sides' if both_sides else 'at the end'})"
        prove(self, what, [[(1, channels or 1, 2 * multiple - 3, 2 * multiple - 2)]])
        # On one rank it does not show if the module pads further by itself; on several, each would pad its own rows.
        for blocks in (5, 7):  # no other multiple gives both
            size = (blocks - 1) * multiple + 1
            found = _first_size(module, (2, channels or 1, size, size))
            if found != blocks * multiple:
                raise ValueError(
                    f"{self.label}: {type(module).__name__} was taken for {what}, and makes {found} rows of {size}"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Pad, run the module, and crop; returns this rank's rows.

        Raises:
            ValueError: On all ranks alike, if a rank's rows are no multiple after padding.

        Collectives:
            Those of :func:`credit_domain.functional.pad`, of the layers within, and of ``crop``.
        """
        dim = normal_dim(self.shard_dim, x.ndim, 2, self.label)
        given = partition_at(self, x, dim, "given")
        size = [given.rows if d == dim else x.shape[d] for d in (-2, -1)]
        pads = [self._amounts(n) for n in size]
        settings: dict[str, Any] = {"dim": dim, "manager": self.manager, "label": self.label}
        x = pad(x, (*pads[1], *pads[0]), self.pad_mode, partition=given, **settings)
        padded = partition_at(self, x, dim, "padded")
        if any(rows % self.pad_multiple for rows in padded.sizes):
            raise ValueError(
                f"{self.label}: the model pads to multiples of {self.pad_multiple}, and after padding the ranks hold "
                f"{', '.join(map(str, padded.sizes))} rows; divide the input in blocks of {self.pad_multiple} rows "
                "(manager.granularity)"
            )
        out: Tensor = self.wrapped.forward(x)
        for d, n, (before, _) in zip((-2, -1), size, pads, strict=True):
            if d != dim:
                out = out.narrow(d, before, n)
        before = pads[dim + 2][0]
        return crop(out, before, before + given.rows, target=given, partition=padded, **settings)

    def _amounts(self, size: int) -> tuple[int, int]:
        total = -size % self.pad_multiple
        before = total // 2 if self.pad_both_sides else 0
        return before, total - before


def _first_size(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Rows that the first child which a module calls is given, for an input of some shape."""
    called, holders = set(), [("", module)]
    while holders:
        prefix, holder = holders.pop()
        for name, child in holder.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                holders.append((f"{path}.", child))
            called.add(path)
    calls = trace(module, shape, lambda part: True)
    return next((call.input[-2] for call in calls if call.name in called), shape[-2])
