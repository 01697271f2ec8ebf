"""Gradients of what the tp ranks hold alike."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from credit_halo import naming_missing_ranks
from credit_parallel.tensor_parallel.parameters import divided_parameters

CHECKED_CALLS = 8
"""How often gradients are compared: a parameter behind a layer that starts as zeros has none at first."""
_RELATIVE = 1e-2
_ABSOLUTE = 1e-5
"""Of the largest norm of all."""


@naming_missing_ranks("comparing gradients of tensor-parallel ranks")
def sync_replicated_gradients(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Make sure that the tp ranks have the same gradients of the parameters that they hold alike.

    The rule, which every backward of a model from :func:`apply_tensor_parallel` follows by itself:

    - a divided parameter has the gradient of its slice;
    - one that is declared in ``_tp_partial`` has a part of its gradient on each rank, and the backward sums the parts;
    - any other has its whole gradient on every rank, and is left alone.

    So there is nothing left to reduce, however often this is called. It finds parameters that break the rule because
    nobody declared them: in its first calls it compares gradients across the ranks of the model's tp group, or of
    ``group``.

    Raises:
        ValueError: On all ranks alike, if gradients differ: naming the parameters, with what to do.

    Collectives: in each of the first calls an all-gather of two numbers for each parameter; then none.
    """
    if group is None:
        group = getattr(model, "_tp_group", None)
    done = model.__dict__.get("_tp_compared", 0)
    if group is None or dist.get_world_size(group) == 1 or done >= CHECKED_CALLS:
        return
    divided = divided_parameters(model)
    shared = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in divided]
    if not shared:
        return
    mine = torch.stack([_fingerprint(p) for _, p in shared])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    numbers = torch.stack(theirs)  # (rank, parameter, 2)
    if not numbers.isfinite().all():
        return  # a step that will be skipped
    model.__dict__["_tp_compared"] = done + 1
    norms = numbers[:1, :, :1]
    # What should be zero may be rounding errors, and those differ where a kernel does not sum in a fixed order.
    tolerance = _RELATIVE * norms.abs() + _ABSOLUTE * norms.clamp(min=0).max()
    close = (numbers - numbers[:1]).abs() <= tolerance
    differ = [name for (name, _), same in zip(shared, close.all(2).all(0).tolist(), strict=True) if not same]
    if differ:
        raise ValueError(
            f"the tp ranks have different gradients of {', '.join(differ)}. If a parameter acts between a column- and "
            "a row-parallel layer, declare it on its block: in _tp_partial if all channels share it, in _tp_shard if "
            "it goes by channel or head. Otherwise the ranks had different inputs, or different random numbers"
        )


def _fingerprint(parameter: Tensor) -> Tensor:
    """Norm of a gradient, and its product with a fixed vector; the norm is -1 where there is none."""
    grad = parameter.grad
    if isinstance(grad, DTensor):
        grad = grad.to_local()
    if grad is None:
        return torch.tensor([-1.0, 0.0], dtype=torch.float64, device=parameter.device)
    numbers = torch.view_as_real(grad.detach().resolve_conj()) if grad.is_complex() else grad.detach()
    flat = numbers.reshape(-1).double()
    wave = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return torch.stack([flat.norm(), flat @ wave])
