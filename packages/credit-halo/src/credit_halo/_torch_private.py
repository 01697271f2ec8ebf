"""The private names of torch that this package cannot do without, each with the reason."""

# mypy: disable-error-code="attr-defined, no-untyped-call"

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, distributed_c10d

logger = logging.getLogger(__name__)


def group_by_name(name: str) -> ProcessGroup:
    """The process group of a name.

    An operator that torch.compile traces takes the name of a group, not the group. torch's own functional
    collectives turn it back with this function; there is no public one.
    """
    return distributed_c10d._resolve_process_group(name)  # type: ignore[no-any-return, arg-type, unused-ignore]


def store_of_world(prefix: str) -> Any:
    """A part of the store through which the ranks met: the only way to ask who is alive once a collective has failed.

    A program that calls ``init_process_group`` without a store has no public way to the one that was made for it.
    """
    return distributed_c10d.PrefixStore(prefix, distributed_c10d._get_default_store())


def groups_of_process() -> list[ProcessGroup]:
    """All groups that this process is a member of, those too that DeviceMesh made for itself; nothing public tells."""
    return list(distributed_c10d._world.pg_map)


def change_timeout(group: ProcessGroup, timeout: timedelta) -> bool:
    """Set the timeout of a group that there is already; whether its backend has one.

    The method of the group is younger than torch 2.8, and what came before it is private.
    """
    try:
        if hasattr(group, "set_timeout"):
            group.set_timeout(timeout)
        else:
            distributed_c10d._set_pg_timeout(timeout, group)
    except (RuntimeError, NotImplementedError):  # ranks as threads
        return False
    return True


_waiting: list[Any] = []


def keep_order(op: Any) -> None:
    """Have compiled code run an operator on every rank, in the order of the program relative to others named here.

    Ranks hold different shapes. A compiler that drops an operator where its result is not used, or that weighs memory
    to reorder operators which do not depend on each other, does not do the same on each rank, and then they wait for
    each other for ever. torch calls what must be neither dropped nor reordered an effect.
    """
    if hasattr(op, "register_effect"):
        from torch.library import EffectType

        op.register_effect(EffectType.ORDERED)
    else:  # before it was a method of operators
        from torch._higher_order_ops import effects

        effects._register_effectful_op(op._opoverload, effects._EffectType.ORDERED)
    _waiting.append(op)


def prepare_inductor() -> None:
    """Tell inductor about the order, once; does nothing outside of torch.compile, where nobody pays for the import."""
    if not _waiting or torch._guards.TracingContext.try_get() is None:
        return
    try:
        while _waiting:
            _lower_in_order(_waiting.pop()._opoverload)
    except (ImportError, AttributeError) as error:
        logger.warning(
            "the order of exchanges in code compiled by inductor cannot be kept with torch %s (%s): compile with "
            "options={'reorder_for_peak_memory': False}",
            *(torch.__version__, error),
        )


def _lower_in_order(op: Any) -> None:
    """Make each exchange of a graph depend on the one before it, which inductor of torch 2.13 forgets."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    make_fallback(op, tag_to_layout_constraint(get_layout_constraint_tag(op)), warn=False)
    lower = lowerings[op]

    def lower_after_the_last(*args: Any, **kwargs: Any) -> Any:
        graph: Any = V.graph
        first = len(graph.operations)
        result = lower(*args, **kwargs)
        created = [operation for operation in graph.operations[first:] if not isinstance(operation, MultiOutput)]
        last = getattr(graph, "_credit_halo_last", None)
        if not isinstance(result, (list, tuple)) and 0 in result.get_size():
            raise ValueError(
                f"inductor leaves out {op}, whose result is empty on this rank though other ranks may wait for it: "
                "give every rank rows to receive, or keep this exchange out of the compiled code"
            )
        for operation in created:
            if last is not None:
                graph.additional_buffer_deps[operation.get_operation_name()].add(last)
        graph._credit_halo_last = created[-1].get_name()
        return result

    lowerings[op] = lower_after_the_last
