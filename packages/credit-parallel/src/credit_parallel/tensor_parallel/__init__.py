"""Tensor parallelism: the channels between two layers of a block are divided over the ranks of the tp axis.

A block opts in by naming its layers. The *column* layers' output channels are divided, and so are the input channels
of the *row* layers; what lies between them works on this rank's channels, and one sum at the end of a row layer makes
the result whole on every rank. Outputs, input gradients and parameter gradients are those of one rank.

=====================  ================================================================================================
declaration            meaning
=====================  ================================================================================================
``_tp_col``            path of the column layer, or a tuple of paths; :class:`torch.nn.Linear` or a 1x1 ``Conv2d``
``_tp_row``            path of the row layer, or a tuple. Of as many entries as ``_tp_col``, they are pairs; an entry
                       may be a tuple: ``_tp_col = (("to_q", "to_k", "to_v"), "up")``, ``_tp_row = ("to_out", "down")``
``_tp_parts``          layers whose divided channels are several parts side by side, each of which is divided:
                       ``{"qkv": 3}`` (equal parts) or ``{"qkv": (64, 64, 32)}`` (sizes); ``{"k": 1}`` says that a layer
                       of another size than its partner is one part
``_tp_heads``          integer attributes that ``forward`` reads and that count what is divided: ``"heads"``, or
                       ``("attn.heads", "norm.num_groups")``. They are divided by the degree; ``()`` if there are none
``_tp_shard``          other parameters between the layers, with the dim that goes by channel or head:
                       ``{"temperature": 0}``. ``forward`` sees this rank's slice of them
``_tp_partial``        other parameters between the layers that all channels share: ``("scale",)``. Each rank has part
                       of their gradient, and the backward sums it
``_tp_constraints``    ``f(block, tp_size)`` that raises ValueError, or returns what is wrong (a text or several). A
                       block that has ``heads`` must declare this or ``_tp_heads``
``_tp_plan``           instead of the first two: ``{"to_q": "colwise", "to_out": "rowwise"}``; see
                       :func:`apply_native_tensor_parallel`
=====================  ================================================================================================

Paths are dotted and relative to the block. Between the layers only what treats channels (or whole heads) apart is
right: activations, per-head attention, a depthwise convolution with its parameters in ``_tp_shard`` and its ``groups``
in ``_tp_heads``, a GroupNorm likewise. A LayerNorm or a softmax over the divided channels is not: it is refused inside
a ``Sequential``, where it can be seen. What ``forward`` itself does with all channels cannot be seen, nor can a number
of heads that something else was told (an einops ``Rearrange``). Dropout there draws a mask for this rank's channels
alone.

**One layer at a time.** :class:`TpColConv2d`, :class:`TpColLinear`, :class:`TpRowConv2d` and :class:`TpRowLinear` are
the same layers for blocks that put them in place themselves.

**Parameters.** Divided ones are DTensors, contiguous slices of the logical weight: names, logical shapes, optimizer
states and checkpoints know nothing of tp, and plain checkpoints load. Where a layer has parts, a rank's slice is not
what it works with; the rows of the weight then change places between the ranks at each forward, and their gradients
on the way back. That is a message of a rank's share of the weight; separate layers do without.

**Who counts what.** Every tp rank computes the same loss, which counts once. So the sum of a row layer passes gradients
on as they are, and the input of a column layer sums them; a row layer's bias is added once, after the sum.
"""

from credit_parallel.tensor_parallel.apply import (
    apply_native_tensor_parallel,
    apply_tensor_parallel,
    supports_native_tp,
)
from credit_parallel.tensor_parallel.gradients import sync_replicated_gradients
from credit_parallel.tensor_parallel.parameters import _is_tp_sharded_param
from credit_parallel.tensor_parallel.single import TpColConv2d, TpColLinear, TpRowConv2d, TpRowLinear

__all__ = [
    "TpColConv2d",
    "TpColLinear",
    "TpRowConv2d",
    "TpRowLinear",
    "_is_tp_sharded_param",
    "apply_native_tensor_parallel",
    "apply_tensor_parallel",
    "supports_native_tp",
    "sync_replicated_gradients",
]
