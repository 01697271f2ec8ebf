"""What becomes of each module of torch.nn: converted, left as it is, or refused, looked up by type.

Which modules are converted is said by the layers themselves (:data:`credit_domain.engine.layer.LAYERS`).

A module of torch.nn that is not in the table could mix rows in a way that nobody thought of, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

import credit_domain.layers  # noqa: F401 - its layers are in the table
from credit_domain._torch_private import computing_methods
from credit_domain.blocks.block import POINTWISE
from credit_domain.engine.layer import LAYERS, Decision


def decide(module: nn.Module, shard_dim: int) -> Decision:
    """What becomes of a module whose input is sharded along ``shard_dim`` (negative).

    A subclass of a torch layer is taken for that layer if it has the layer's own ``forward``.
    """
    kind = parametrize.type_before_parametrizations(module)
    tables = (LAYERS, _BY_SETTINGS, _LOCAL, _REFUSED)
    known = next((base for base in kind.__mro__ if any(base in table for table in tables)), None)
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
    if known in LAYERS:
        return LAYERS[known].fate(module, shard_dim)
    return _BY_SETTINGS[known](module, shard_dim)


def _overrides_forward(kind: type, base: type) -> bool:
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in computing_methods(base))


def _of_torch(kind: type) -> bool:
    return kind.__module__.startswith(("torch.nn.", "torch.ao.nn."))


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


_BY_SETTINGS: dict[type[nn.Module], Callable[[nn.Module, int], Decision]] = {
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU), _softmax),
    **{getattr(nn, name): _loss for name in dir(nn) if name.endswith("Loss")},
}

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
