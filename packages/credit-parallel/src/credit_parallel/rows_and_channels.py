"""Domain and tensor parallelism of one model: which comes first."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from credit_mesh import DomainParallelManager
from credit_parallel.collectives import start_equal
from credit_parallel.domain import apply_domain_parallel
from credit_parallel.tensor_parallel import apply_tensor_parallel


def divide(
    model: nn.Module, manager: DomainParallelManager, tp: DeviceMesh | None, shard_dim: int, **convert: Any
) -> nn.Module:
    """Divide a model's rows over the domain ranks and its channels over those of the tp axis, if there is one.

    Modules are converted before their parameters are divided. A trace must see the parameters that a rank works with,
    so a model that is partitioned operation by operation becomes tensor-parallel first.

    Args:
        convert: Those of :func:`credit_domain.convert.convert_to_domain_parallel`, as are errors.

    Collectives: those of ``apply_domain_parallel`` and ``apply_tensor_parallel``.
    """
    if tp is None:
        return apply_domain_parallel(model, manager, shard_dim, **convert)
    method, reason = convert.pop("method", "auto"), None
    if tp.size() == 1 or manager.domain_parallel_size == 1:
        return apply_tensor_parallel(apply_domain_parallel(model, manager, shard_dim, method=method, **convert), tp)
    if method != "graph":
        try:
            model = apply_domain_parallel(model, manager, shard_dim, method="modules", **convert)
        except ValueError as error:
            told = convert.get("custom_converters") or convert.get("local") or convert.get("input_shape") is None
            if method == "modules" or told:
                raise
            reason = error
        else:
            return apply_tensor_parallel(model, tp)
    start_equal(model, [manager.domain_group])
    model = apply_tensor_parallel(model, tp)
    try:
        return apply_domain_parallel(model, manager, shard_dim, method="graph", **convert)
    except ValueError as error:
        if reason is None:
            raise
        raise ValueError(f"{reason}\nIt cannot be partitioned operation by operation either: {error}") from reason
