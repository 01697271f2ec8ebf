"""What becomes of each module of torch.nn: converted, left as it is, or refused. One table, looked up by type.

A module of torch.nn that is not in the table could mix rows in a way that nobody thought of, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

from credit_domain import layers
from credit_domain.blocks.base import POINTWISE
from credit_domain.functional.conv import padding_pairs, per_dim

Fate = Literal["converted", "local", "refused", "own code"]


@dataclass(frozen=True)
class Decision:
    """What becomes of a module.

    Attributes:
        fate: ``converted``; ``local``, since it mixes no rows; ``refused``; or ``own code``: no module of torch.nn, so
            that its children decide.
        reason: Why.
        wrap: For ``converted``: makes the converted module, as ``wrap(module, shard_dim, label=...)``.
    """

    fate: Fate
    reason: str
    wrap: Callable[..., nn.Module] | None = None


def decide(module: nn.Module, shard_dim: int) -> Decision:
    """What becomes of a module whose input is sharded along ``shard_dim`` (negative).

    A subclass of a torch layer is taken for that layer if it has the layer's own ``forward``.
    """
    kind = parametrize.type_before_parametrizations(module)
    known = next((base for base in kind.__mro__ if base in _RULES or base in _LOCAL or base in _REFUSED), None)
    if known is None:
        if kind.__module__.startswith("torch.nn.utils."):
            return Decision("local", "acts on parameters")
        if _of_torch(kind):
            return Decision("refused", f"torch.nn.{kind.__name__} has no rule")
        return Decision("own code", "its children decide; its own forward is not looked into")
    if kind is not known and _overrides_forward(kind, known):
        if known in _LOCAL:
            return Decision("own code", f"a {known.__name__} with a forward of its own, which is not looked into")
        return Decision("refused", f"{kind.__name__} is a {known.__name__} with a forward of its own")
    if known in _LOCAL:
        return Decision("local", _LOCAL[known])
    if known in _REFUSED:
        return Decision("refused", _REFUSED[known])
    return _RULES[known](module, shard_dim)


_METHODS = ("forward", "__call__", "_conv_forward")


def _overrides_forward(kind: type, base: type) -> bool:
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in _METHODS)


def _of_torch(kind: type) -> bool:
    return kind.__module__.startswith(("torch.nn.", "torch.ao.nn."))


# Which layers need the rows of others


def needs_halo(conv: nn.Module, shard_dim: int = -2) -> bool:
    """Whether a convolution or a transposed one does anything along the sharded dim that a rank cannot do alone.

    A kernel of one row, without stride and padding, works on any rows. So does a transposed kernel as high as its
    stride, without padding. Anything else depends on where the rows lie in the whole.
    """
    m: Any = conv
    spatial = len(m.kernel_size)
    if shard_dim < -spatial:
        return False  # the channels, or the batch: no spatial dim of this layer is sharded
    kernel, stride = m.kernel_size[shard_dim], m.stride[shard_dim]
    if m.transposed:
        padding = per_dim(m.padding, spatial)[shard_dim], per_dim(m.output_padding, spatial)[shard_dim]
        return bool(kernel != stride or any(padding) or (m.dilation[shard_dim] > 1 and kernel > 1))
    pads = padding_pairs(m.padding, m.kernel_size, m.stride, m.dilation, spatial)[shard_dim]
    return bool(kernel > 1 or stride > 1 or any(pads))


def _convolution(wrap: Callable[..., nn.Module]) -> Callable[[nn.Module, int], Decision]:
    def rule(module: nn.Module, shard_dim: int) -> Decision:
        m: Any = module
        spatial = len(m.kernel_size)
        if shard_dim < -spatial:
            # Rows may be among the positions of a sequence, or averaged away; only the model's author knows.
            trivial = all(kernel == 1 for kernel in m.kernel_size) and all(stride == 1 for stride in m.stride)
            if trivial:
                return Decision("local", "its kernel is one position")
            return Decision("refused", f"a {spatial}-D layer does not have the sharded dim {shard_dim}")
        if not needs_halo(module, shard_dim):
            return Decision("local", "no row needs another")
        return Decision("converted", "reads rows of other ranks", wrap)

    return rule


def _spatial(wrap: Callable[..., nn.Module], spatial: int, reason: str) -> Callable[[nn.Module, int], Decision]:
    """A layer that acts on its last ``spatial`` dims."""

    def rule(module: nn.Module, shard_dim: int) -> Decision:
        if shard_dim < -spatial:
            return Decision("refused", f"a {spatial}-D layer does not have the sharded dim {shard_dim}")
        return Decision("converted", reason, wrap)

    return rule


def _always(wrap: Callable[..., nn.Module], reason: str) -> Callable[[nn.Module, int], Decision]:
    return lambda module, shard_dim: Decision("converted", reason, wrap)


def _group_norm(module: nn.Module, shard_dim: int, label: str | None = None) -> nn.Module:
    """The statistics are over all positions, whichever dim is sharded."""
    assert isinstance(module, nn.GroupNorm)
    return layers.DomainParallelGroupNorm(module, label=label)


def _norm_over(wrap: Callable[..., nn.Module]) -> Callable[[nn.Module, int], Decision]:
    def rule(module: nn.Module, shard_dim: int) -> Decision:
        m: Any = module
        if len(m.normalized_shape) < -shard_dim:
            return Decision("local", "normalises dims after the sharded one")
        return Decision("converted", "statistics over the rows of all ranks", wrap)

    return rule


def _softmax(module: nn.Module, shard_dim: int) -> Decision:
    m: Any = module
    # A dim counted from the first is the sharded one for 4-D or for 5-D tensors.
    if m.dim in (shard_dim, 4 + shard_dim, 5 + shard_dim):
        return Decision("refused", f"it normalises over dim {m.dim}, which may be the sharded one")
    return Decision("local", "normalises over another dim")


def _loss(module: nn.Module, shard_dim: int) -> Decision:
    if getattr(module, "reduction", None) == "none":
        return Decision("local", "element by element")
    return Decision("refused", "its reduction is over this rank's rows alone")


_RULES: dict[type[nn.Module], Callable[[nn.Module, int], Decision]] = {
    nn.Conv1d: _convolution(layers.DomainParallelConv1d),
    nn.Conv2d: _convolution(layers.DomainParallelConv2d),
    nn.Conv3d: _convolution(layers.DomainParallelConv3d),
    nn.ConvTranspose1d: _convolution(layers.DomainParallelConvTranspose1d),
    nn.ConvTranspose2d: _convolution(layers.DomainParallelConvTranspose2d),
    nn.ConvTranspose3d: _convolution(layers.DomainParallelConvTranspose3d),
    nn.GroupNorm: _always(_group_norm, "statistics over the rows of all ranks"),
    nn.LayerNorm: _norm_over(layers.DomainParallelLayerNorm),
    nn.RMSNorm: _norm_over(layers.DomainParallelRMSNorm),
    nn.Upsample: _always(layers.DomainParallelUpsample, "interpolates between rows"),
    nn.UpsamplingNearest2d: _always(layers.DomainParallelUpsample, "copies rows"),
    nn.UpsamplingBilinear2d: _always(layers.DomainParallelUpsample, "interpolates between rows"),
    nn.PixelShuffle: _always(layers.DomainParallelPixelShuffle, "torch's own has no gradient where there are no rows"),
    nn.PixelUnshuffle: _always(layers.DomainParallelPixelUnshuffle, "gathers blocks of rows"),
    nn.Softmax: _softmax,
    nn.LogSoftmax: _softmax,
    nn.Softmin: _softmax,
    nn.GLU: _softmax,
}
for _n in (1, 2, 3):
    for _name, _reason in {
        "BatchNorm": "statistics over the rows of all ranks",
        "InstanceNorm": "statistics over the rows of all ranks",
    }.items():
        _RULES[getattr(nn, f"{_name}{_n}d")] = _always(getattr(layers, f"DomainParallel{_name}{_n}d"), _reason)
    _wrap = getattr(layers, f"DomainParallelDropout{_n}d")
    _RULES[getattr(nn, f"Dropout{_n}d")] = _spatial(_wrap, _n, "whole channels drop alike on all ranks")
    for _name in ("MaxPool", "AvgPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
        _wrap = getattr(layers, f"DomainParallel{_name}{_n}d")
        _RULES[getattr(nn, f"{_name}{_n}d")] = _spatial(_wrap, _n, "pools rows of other ranks")
    for _name in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        _RULES[getattr(nn, f"{_name}{_n}d")] = _spatial(layers.DomainParallelPad, _n, "adds rows at the edges only")
_RULES[nn.SyncBatchNorm] = _always(layers.DomainParallelBatchNorm2d, "statistics over the rows of all ranks")
for _name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout"):
    _RULES[getattr(nn, _name)] = _always(getattr(layers, f"DomainParallel{_name}"), "ranks drop different positions")
for _name in dir(nn):
    if _name.endswith("Loss"):
        _RULES[getattr(nn, _name)] = _loss

_ELEMENTWISE = """CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU RReLU
ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"""
_CHANNELS = "ChannelShuffle CrossMapLRN2d LocalResponseNorm Softmax2d"
_LAST_DIM = "Bilinear Embedding EmbeddingBag GRUCell LSTMCell Linear RNNCell"
_CONTAINERS = "ModuleDict ModuleList ParameterDict ParameterList Sequential"

_LOCAL: dict[type[nn.Module], str] = {
    **{getattr(nn, name): "element by element" for name in _ELEMENTWISE.split()},
    **{getattr(nn, name): "mixes channels only" for name in _CHANNELS.split()},
    **{getattr(nn, name): "acts on each position alone" for name in _LAST_DIM.split()},
    **{getattr(nn, name): "holds others" for name in _CONTAINERS.split()},
    nn.Flatten: "reshapes",
    nn.Unflatten: "reshapes",
    **dict.fromkeys(POINTWISE, "acts on each point alone"),
}

_ATTENTION = "it attends over positions of all ranks; see credit_domain.blocks"
_REFUSED: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: _ATTENTION,
    nn.Transformer: _ATTENTION,
    nn.TransformerEncoder: _ATTENTION,
    nn.TransformerDecoder: _ATTENTION,
    nn.TransformerEncoderLayer: _ATTENTION,
    nn.TransformerDecoderLayer: _ATTENTION,
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), "it runs along a sequence that may hold rows"),
    nn.Fold: "it has no rule",
    nn.Unfold: "it has no rule",
    nn.MaxUnpool1d: "its indices are those of the whole",
    nn.MaxUnpool2d: "its indices are those of the whole",
    nn.MaxUnpool3d: "its indices are those of the whole",
    nn.FractionalMaxPool2d: "its windows are drawn at random on each rank",
    nn.FractionalMaxPool3d: "its windows are drawn at random on each rank",
    nn.CosineSimilarity: "its dim may be the sharded one",
    nn.PairwiseDistance: "it has no rule",
    nn.AdaptiveLogSoftmaxWithLoss: "its loss is over this rank's rows alone",
}
