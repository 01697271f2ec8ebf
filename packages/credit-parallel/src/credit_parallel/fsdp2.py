"""Fully sharded data parallelism: parameters, gradients and optimizer states divided over the data axis.

The domain axis may be folded in (``fold_domain``): parameters are then sharded over dp x domain, and one
reduce-scatter averages gradients over both. That is right because of the convention of losses: the loss of each rank is
its rows' share, scaled so that the mean over the domain ranks is the loss of one rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_domain.extend import children_of
from credit_mesh import AXES, RankLayout
from credit_parallel._torch_private import flatten, is_view
from credit_parallel.blocks import (
    BLOCK_CLASSES,
    _apply_activation_checkpointing,
    _has_fsdp2_shard,
    blocks_of,
    is_sharded,
)
from credit_parallel.collectives import start_equal
from credit_parallel.domain import get_raw_model, manager_of
from credit_parallel.mesh import covers_domain, fold_domain
from credit_parallel.reducer import GradientReducer
from credit_parallel.state_dicts import (
    fsdp2_load_optimizer_state_dict,
    fsdp2_load_state_dict,
    fsdp2_optimizer_state_dict,
    fsdp2_state_dict,
)
from credit_parallel.trainer_section import Conf, flag, trainer_of

__all__ = [
    "BLOCK_CLASSES",
    "_apply_activation_checkpointing",
    "_build_mp_policy",
    "_has_fsdp2_shard",
    "apply_fsdp2",
    "fold_domain",
    "fsdp2_is_applied",
    "fsdp2_load_optimizer_state_dict",
    "fsdp2_load_state_dict",
    "fsdp2_optimizer_state_dict",
    "fsdp2_state_dict",
]

logger = logging.getLogger(__name__)


def apply_fsdp2(model: nn.Module, dp_mesh: DeviceMesh | None, conf: Conf = None) -> nn.Module:
    """Shard a model's parameters over data-parallel ranks, in place: blocks one by one, then what is left.

    Apply it after domain and tensor parallelism, and make the optimizer after it. All ranks start with the weights of
    the first one. Gradients are averaged over the ranks of the mesh. Complex parameters stay whole on every rank, since
    fully_shard does not take them, and their gradients are averaged as under DDP. ``_fsdp2_folds_domain`` of the model
    says whether gradients are averaged over the domain ranks too.

    ``conf["trainer"]`` is asked for:

    - ``amp``: True computes in bfloat16 and reduces gradients in float32; outputs of the model are float32.
    - ``fsdp2_mp_policy``: instead, the dtypes one by one; see ``_build_mp_policy``.
    - ``activation_checkpoint``: True recomputes blocks in the backward; see ``_apply_activation_checkpointing``.
    - ``fsdp2_blocks``: more blocks, by class names or by dotted names of modules.
    - ``cpu_offload``: True keeps parameters, gradients and optimizer states of a GPU in the memory of the host.

    Args:
        model: The model; blocks are its modules of ``BLOCK_CLASSES``, those with ``_fsdp2_shard = True``, and those
            that conf names.
        dp_mesh: The dp axis; dp x domain as one axis (``fold_domain``); or two axes, to replicate over the first and
            shard over the second. None is all ranks that do not differ in their tp coordinate.

    Raises:
        ValueError: If torch.distributed is not initialised, the model is sharded already or is a
            DistributedDataParallel, the mesh has more axes or spans tp ranks or a part of the domain ranks, conf names
            blocks that are not there, two blocks share a parameter, or a block has parameters of several dtypes.

    Collectives: broadcasts of the weights over the mesh.
    """
    if not dist.is_initialized():
        raise ValueError("apply_fsdp2 needs torch.distributed: call torch.distributed.init_process_group() first")
    if is_sharded(model) or isinstance(model, DistributedDataParallel):
        raise ValueError(f"apply_fsdp2: {type(model).__name__} is sharded, or wrapped by DDP, already")
    trainer, policy, blocks = trainer_of(conf), _build_mp_policy(conf), blocks_of(model, conf)
    _refuse_shared(model, blocks)
    _refuse_mixed(model, blocks)
    mesh = _default_mesh(model) if dp_mesh is None else dp_mesh
    folds = _checked(mesh, model)
    if flag(trainer, "activation_checkpoint"):
        _apply_activation_checkpointing(model, conf)
    on_host = flag(trainer, "cpu_offload") and mesh.device_type != "cpu"
    offload = CPUOffloadPolicy() if on_host else OffloadPolicy()

    groups = [mesh.get_group(axis) for axis in reversed(range(mesh.ndim))]
    start_equal(model, groups, [manager_of(model).data_parallel_group] if folds else None)
    for p in model.parameters():
        if not p.is_contiguous():  # channels_last, which fully_shard does not take
            p.data = p.data.contiguous()
    for unit in (*blocks.values(), model):
        unit.register_forward_hook(_owning_outputs)
    kept = {name: p for name, p in model.named_parameters() if p.is_complex()}
    ignored = set(kept.values())
    for block in blocks.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=ignored)
    if trainer.get("fsdp2_mp_policy") is None and flag(trainer, "amp"):
        policy = replace(policy, output_dtype=torch.float32)  # so that losses are not computed in bfloat16
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, ignored_params=ignored)
    for module in model.modules():
        if isinstance(module, FSDPModule) and dist.get_backend(groups[0]) != "nccl":
            module.set_force_sum_reduction_for_comms(True)  # gloo has no average; the sum is divided afterwards
    if kept:
        whole = mesh if mesh.ndim == 1 else flatten(mesh, "_".join(mesh.mesh_dim_names or ("replicate", "shard")))
        GradientReducer(model, kept, whole.get_group())
        size = sum(p.numel() * p.element_size() for p in kept.values()) / 2**20
        logger.info(
            "%d complex parameters (%.1f MiB) stay whole on every rank, as under DDP: fully_shard takes real ones only",
            *(len(kept), size),
        )
    model._fsdp2_folds_domain = folds  # type: ignore[assignment]
    what = ", the domain axis folded in" if folds else ""
    logger.info("parameters sharded over %d ranks: %d blocks, and the rest%s", mesh.size(), len(blocks), what)
    return model


def fsdp2_is_applied(model: nn.Module) -> bool:
    """Whether :func:`apply_fsdp2`, or ``fully_shard``, sharded the model or a part of it."""
    return is_sharded(get_raw_model(model))


def _refuse_shared(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Refuse parameters that two blocks have: fully_shard would train them apart."""
    inside = {id(block) for block in blocks.values()}
    seen: dict[int, tuple[int, str]] = {}

    def visit(module: nn.Module, path: str, block: int) -> None:
        block = id(module) if id(module) in inside else block
        for name, p in module.named_parameters(recurse=False):
            first, at = seen.setdefault(id(p), (block, path + name))
            if first != block:
                raise ValueError(
                    f"the parameters {at} and {path + name} are one and the same, in different blocks of FSDP2: make a "
                    "module that holds both a block (trainer.fsdp2_blocks), or untie them"
                )
        for name, child in children_of(module).items():
            if child is not None:
                visit(child, f"{path}{name}.", block)

    visit(model, "", id(model))


def _refuse_mixed(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Refuse parameters of several real dtypes in one unit: fully_shard sends them as one tensor."""
    done: set[int] = set()
    for unit, block in {**blocks, "": model}.items():  # inner blocks come first
        found: dict[torch.dtype, str] = {}
        for name, p in block.named_parameters():
            if id(p) not in done and p.requires_grad and not p.is_complex():
                found.setdefault(p.dtype, f"{unit}.{name}" if unit else name)
            done.add(id(p))
        if len(found) > 1:
            listed = " and ".join(f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in found.items())
            raise ValueError(
                "FSDP2 takes trained parameters of one dtype in each block; "
                f"{unit or type(model).__name__} has {listed}: cast the model to one dtype, make what "
                "differs a block of its own (trainer.fsdp2_blocks), or use ddp"
            )


def _owning_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: outputs that are views get memory of their own.

    The backward gathers parameters when it reaches a unit's output, and an operation in place on a view, such as
    ``x += skip``, takes torch's hook for that away: the gradient would be wrong, or an error.
    """
    if isinstance(output, torch.Tensor):
        return output.clone() if output.requires_grad and is_view(output) else output
    if isinstance(output, tuple):
        parts = [_owning_outputs(module, args, part) for part in output]
        return output._make(parts) if hasattr(output, "_make") else type(output)(parts)
    if isinstance(output, list):
        return [_owning_outputs(module, args, part) for part in output]
    if isinstance(output, dict):
        return {key: _owning_outputs(module, args, part) for key, part in output.items()}
    return output


# The mesh


def _default_mesh(model: nn.Module) -> DeviceMesh:
    """All ranks that do not differ in their tp coordinate."""
    tp = next(_tp_meshes(model), None)
    kind = tp.device_type if tp is not None else next((p.device.type for p in model.parameters()), "cpu")
    if kind in ("cpu", "meta"):
        kind = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    if tp is None:
        return init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp",))
    manager = manager_of(model)
    domain = 1 if manager is None else manager.domain_parallel_size
    layout = RankLayout.from_world(dist.get_world_size(), tensor=tp.size(), domain=domain)
    mesh = fold_domain(init_device_mesh(kind, (layout.dp, layout.tp, layout.domain), mesh_dim_names=AXES))
    assert mesh is not None
    return mesh


def _checked(mesh: DeviceMesh, model: nn.Module) -> bool:
    """Refuse a mesh that the parameters cannot be sharded over; say whether it folds the domain axis."""
    if mesh.ndim > 2:
        raise ValueError(
            f"apply_fsdp2 takes the dp axis, fold_domain(mesh), or two axes to replicate and to shard over; got {mesh}"
        )
    ranks = set(mesh.mesh.flatten().tolist())
    for tp in set(_tp_meshes(model)):
        if len(ranks & set(tp.mesh.flatten().tolist())) > 1:
            raise ValueError(
                f"parameters are divided over {tp} already, which shares ranks with {mesh}: pass the dp axis"
            )
    return covers_domain(mesh, manager_of(model))


def _tp_meshes(model: nn.Module) -> Iterator[DeviceMesh]:
    return (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))


# Mixed precision

_DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
    **dict.fromkeys(("float64", "fp64", "double"), torch.float64),
}
_DTYPE_KEYS = ("param_dtype", "reduce_dtype", "output_dtype")


def _build_mp_policy(conf: Conf) -> MixedPrecisionPolicy:
    """The mixed precision that a configuration asks for.

    ``fsdp2_mp_policy`` has any of ``param_dtype``, ``reduce_dtype``, ``output_dtype`` (names such as ``"bfloat16"``,
    ``"BFloat16"`` or ``"Half"``, or None to leave it as it is) and ``cast_forward_inputs`` (a bool), for blocks and the
    model alike. Without it, ``amp: True`` is bfloat16 parameters and float32 reductions.
    """
    trainer = trainer_of(conf)
    given = trainer.get("fsdp2_mp_policy")
    if given is None:
        if flag(trainer, "amp"):
            return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return MixedPrecisionPolicy()
    keys = (*_DTYPE_KEYS, "cast_forward_inputs")
    if not isinstance(given, Mapping) or not set(given) <= set(keys):
        raise ValueError(f"trainer.fsdp2_mp_policy must be a mapping of some of {', '.join(keys)}; got {given!r}")
    dtypes = {key: _dtype_of(key, given.get(key)) for key in _DTYPE_KEYS}
    return MixedPrecisionPolicy(**dtypes, cast_forward_inputs=flag(given, "cast_forward_inputs", True))


def _dtype_of(key: str, value: Any) -> torch.dtype | None:
    if value is None:
        return None
    dtype = value if isinstance(value, torch.dtype) else _DTYPES.get(str(value).lower().removeprefix("torch."))
    if dtype is None or not dtype.is_floating_point:
        raise ValueError(f"trainer.fsdp2_mp_policy.{key} must be one of {', '.join(_DTYPES)}, or null; got {value!r}")
    return dtype
