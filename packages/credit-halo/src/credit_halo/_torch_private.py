"""The private names of torch that this package cannot do without, each with the reason."""

# mypy: disable-error-code="attr-defined, no-untyped-call"

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, distributed_c10d
from torch.library import EffectType


def gone(name: str, without: str) -> RuntimeError:
    """The error where torch has no longer, or not yet, a private name for which there is no substitute.

    Args:
        name: The name.
        without: What cannot be done without it.
    """
    return RuntimeError(
        f"torch {torch.__version__} has no {name}. Without this private name {without}. Install a version of torch "
        "with which these packages were tried: docs/compatibility.md lists them"
    )


def group_by_name(name: str) -> ProcessGroup:
    """The process group of a name.

    An operator that torch.compile traces takes the name of a group, not the group. torch's own functional
    collectives turn it back with this function; there is no public one.
    """
    try:
        resolve: Any = distributed_c10d._resolve_process_group
    except AttributeError as error:
        what = "torch.distributed.distributed_c10d._resolve_process_group"
        raise gone(what, "an operator cannot find its process group") from error
    return resolve(name)  # type: ignore[no-any-return]


def groups_of_process() -> list[ProcessGroup]:
    """All groups that this process is a member of, those too that DeviceMesh made for itself; nothing public tells."""
    try:
        return list(distributed_c10d._world.pg_map)
    except AttributeError as error:
        what = "torch.distributed.distributed_c10d._world.pg_map"
        raise gone(what, "the timeouts of groups that there are already cannot be set") from error


def change_timeout(group: ProcessGroup, timeout: timedelta) -> bool:
    """Set the timeout of a group that there is already; whether its backend has one."""
    try:
        group.set_timeout(timeout)
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
    op.register_effect(EffectType.ORDERED)
    _waiting.append(op)


def prepare_inductor() -> None:
    """Tell inductor about the order, once; does nothing outside of torch.compile, where nobody pays for the import."""
    if not _waiting or not _tracing():
        return
    while _waiting:
        try:
            _lower_in_order(_waiting[-1]._opoverload)
        except (ImportError, AttributeError) as error:
            raise _unordered(error) from error
        _waiting.pop()


def _tracing() -> bool:
    """Whether torch.compile is at work; where nothing tells, yes, at the price of an import."""
    try:
        return torch._guards.TracingContext.try_get() is not None
    except AttributeError:
        return True


def _unordered(error: Exception) -> RuntimeError:
    """Ranks that do not exchange in one order wait for each other for ever, or take each other's rows."""
    what = "code that inductor compiles cannot keep exchanges in the order of the program: leave torch.compile out"
    return gone(f"such torch._inductor as this package builds on ({error})", what)


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
        try:
            before, deps = len(graph.operations), graph.additional_buffer_deps
        except AttributeError as error:
            raise _unordered(error) from error
        result = lower(*args, **kwargs)
        created = [operation for operation in graph.operations[before:] if not isinstance(operation, MultiOutput)]
        last = getattr(graph, "_credit_halo_last", None)
        if not isinstance(result, (list, tuple)) and 0 in result.get_size():
            raise ValueError(
                f"inductor leaves out {op}, whose result is empty on this rank though other ranks may wait for it: "
                "give every rank rows to receive, or keep this exchange out of the compiled code"
            )
        for operation in created:
            if last is not None:
                deps[operation.get_operation_name()].add(last)
        graph._credit_halo_last = created[-1].get_name()
        return result

    lowerings[op] = lower_after_the_last
