"""How much arithmetic an operator of a trace is."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode


def flops_of(node: fx.Node) -> int:
    """Floating-point operations of an operator on the whole.

    Products, convolutions and attention are counted as :mod:`torch.utils.flop_counter` does, all else as one for each
    entry of the result. Views count nothing, and neither does what makes a tensor without reading one.
    """
    target: Any = node.target
    if node.op != "call_function" or not node.all_input_nodes or target is operator.getitem or _is_view(target):
        return 0
    entries = sum(x.numel() for x in _tensors(node.meta.get("val")))
    if getattr(target, "namespace", "") != "aten" or torch.Tag.pointwise in target.tags:
        return entries
    args: Any = fx.map_arg(node.args, lambda used: used.meta["val"])
    kwargs: Any = fx.map_arg(node.kwargs, lambda used: used.meta["val"])
    if target is torch.ops.aten.scaled_dot_product_attention.default:  # torch knows it by other names, not on CPUs
        query, key, value = args[:3]
        return int(2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
    with FlopCounterMode(display=False) as counter:
        target(*args, **kwargs)
    return counter.get_total_flops() or entries


def _is_view(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(made.alias_info is not None for made in schema.returns)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [x for item in value for x in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []
