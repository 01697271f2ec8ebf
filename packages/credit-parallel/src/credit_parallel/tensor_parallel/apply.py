"""Making a model tensor-parallel: everything is checked on every rank first, then changed in place."""

from __future__ import annotations

import hashlib
import logging

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from credit_halo.extend import agree
from credit_parallel.tensor_parallel.declaration import Declaration, declares, makes_its_weight
from credit_parallel.tensor_parallel.layers import divide_layer
from credit_parallel.tensor_parallel.parameters import (
    add_property,
    broadcast_all,
    divide,
    group_property,
    present,
    tp_groups,
)
from credit_parallel.tensor_parallel.region import Region
from credit_parallel.tensor_parallel.validation import read_blocks

logger = logging.getLogger(__name__)


def apply_tensor_parallel(model: nn.Module, tp_mesh: DeviceMesh | None) -> nn.Module:
    """Make the blocks of a model that declare ``_tp_col`` and ``_tp_row`` tensor-parallel, in place.

    Outputs and gradients are those of one rank. What a block can declare is listed in
    :mod:`credit_parallel.tensor_parallel`. Call it before ``fully_shard`` or DDP, and build the optimizer after it.
    Blocks that are tensor-parallel already are left alone. Where ranks hold different values, those of the first tp
    rank count. The model has the tp group as ``_tp_group`` then.

    Args:
        tp_mesh: The 1-D mesh of the tp axis. With None, or a single rank, no block is changed.

    Raises:
        ValueError: On all ranks alike and before anything is changed, if a declaration is wrong, sizes do not divide, a
            layer cannot be divided, or the ranks have different models.

    Collectives: small all-gathers, then broadcasts of the parameters and buffers.
    """
    return _apply(model, tp_mesh, native=False)


def apply_native_tensor_parallel(model: nn.Module, tp_mesh: DeviceMesh | None) -> nn.Module:
    """Make the blocks of a model that declare a ``_tp_plan`` tensor-parallel, in place; ``_tp_native`` says so.

    Such as ``_tp_plan = {"to_q": "colwise", "to_k": "colwise", "to_v": "colwise", "to_out": "rowwise"}``, of
    :class:`torch.nn.Linear` alone. A block of which a layer makes its weight (spectral normalisation, parametrisations)
    stays whole on every rank, and a warning says so. All else is as in :func:`apply_tensor_parallel`; a model without a
    ``_tp_plan`` is a ValueError too (see :func:`supports_native_tp`).
    """
    return _apply(model, tp_mesh, native=True)


def supports_native_tp(model: nn.Module) -> bool:
    """Whether a block of the model declares a ``_tp_plan``."""
    return any(declares(module, native=True) for module in model.modules())


def _apply(model: nn.Module, mesh: DeviceMesh | None, native: bool) -> nn.Module:
    if mesh is None:
        return model
    if mesh.ndim != 1:
        raise ValueError(f"tp_mesh must be the 1-D mesh of the tp axis, such as mesh['tp']; got {mesh}")
    if native and not supports_native_tp(model):
        raise ValueError(
            f"apply_native_tensor_parallel: no block of {type(model).__name__} declares _tp_plan, so there is nothing "
            "to divide. Ask supports_native_tp(model) first, or declare _tp_col and _tp_row, for apply_tensor_parallel"
        )
    if mesh.size() > 1:
        _divide(model, mesh, native)
    model.__dict__["_tp_group_name"] = mesh.get_group().group_name
    if not hasattr(model, "_tp_group"):
        add_property(model, "_tp_group", group_property)
    model.__dict__["_tp_native"] = native or model.__dict__.get("_tp_native", False)
    return model


def _divide(model: nn.Module, mesh: DeviceMesh, native: bool) -> None:
    """Read, check and agree; then change."""
    group = mesh.get_group().group_name
    blocks = [(name, module) for name, module in model.named_modules() if declares(module, native)]
    whole = [name for name, module in blocks if native and makes_its_weight(module)]
    blocks = [(name, module) for name, module in blocks if name not in whole]
    new = [(name, module) for name, module in blocks if not hasattr(module, "_tp_applied")]
    elsewhere = [name for name, block in blocks if getattr(block, "_tp_applied", group) != group]
    declarations, problems = read_blocks(model, new, mesh.size(), native)
    problems = [*(f"{name} is tensor-parallel already, on another mesh" for name in elsewhere), *problems]
    _agree(model, mesh, declarations, problems)
    if whole:
        logger.warning(
            "%d of %d blocks that declare _tp_plan stay whole on each of %d tp ranks, since layers of theirs make "
            "their weights (such as by spectral normalisation): %s",
            *(len(whole), len(whole) + len(blocks), mesh.size(), ", ".join(name or "the model" for name in whole)),
        )
    if new or whole:
        broadcast_all(model, mesh)
        for declaration in declarations:
            _change(declaration, mesh, group)
    elif blocks:
        logger.info("every block that opts in is tensor-parallel already")
    else:
        logger.warning(
            "no block of %s declares _tp_col and _tp_row: all %d tp ranks compute the same, whole model",
            *(type(model).__name__, mesh.size()),
        )
    tp_groups.add(mesh.get_group())


def _agree(model: nn.Module, mesh: DeviceMesh, declarations: list[Declaration], problems: list[str]) -> None:
    """All ranks go on, or all raise the same error."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    text = "; ".join(f"{name} {t.dtype} {tuple(t.shape)} {t.is_meta}" for name, t in tensors)
    digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8]
    said = [*(problems or map(str, declarations)), f"{len(tensors)} parameters and buffers, checksum {digest}"]
    device = torch.device(mesh.device_type)
    agree(mesh.get_group(), None, "tensor parallelism", lambda: "; ".join(said), device)
    if problems:
        raise ValueError("this model cannot be made tensor-parallel:" + "".join(f"\n  {each}" for each in problems))


def _change(declaration: Declaration, mesh: DeviceMesh, group: str) -> None:
    region = Region()
    declaration.block.register_forward_pre_hook(region.open)
    declaration.block.register_forward_hook(region.close)
    for path, layer in declaration.layers.items():
        divide_layer(layer.layer, layer.role, layer.parts, mesh, region, declaration.at(path))
    for module, attribute, value in declaration.counts:
        setattr(module, attribute, value)
    for owner, name, dim in declaration.views:
        if dim is not None:
            divide(owner, name, mesh, dim)
        present(owner, name, mesh, declaration.at())
    declaration.block.__dict__["_tp_applied"] = group
