"""torch.distributed as ranks that are threads see it.

A process has one world of its own in torch.distributed, or none. While there are ranks that are threads, the public
functions of the module are replaced by some that ask which thread calls: on a rank they mean its
:class:`ThreadGroup`, and on any other thread they are torch's own. So a program may have a world of its own at the same
time. Functions that another module has imported by name, and what is built behind them (DeviceMesh, FSDP, DTensor,
DistributedDataParallel), are not reached.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from credit_halo.testing._thread_group import BACKEND, ThreadGroup

logger = logging.getLogger(__name__)

_present = threading.local()


def present_world() -> ThreadGroup | None:
    """All ranks, as a group, if this thread is a rank; None on any other thread."""
    world: ThreadGroup | None = getattr(_present, "world", None)
    return world


def enter(world: ThreadGroup) -> None:
    """Make this thread a rank."""
    _present.world, _present.made = world, {}


def leave() -> None:
    """Make this thread an ordinary one again."""
    _present.world = None


class Replacement:
    """The functions of torch.distributed, replaced as long as there are ranks that are threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranks = 0
        self._originals: dict[tuple[Any, str], Any] = {}

    def begin(self) -> None:
        """There is one more such rank."""
        with self._lock:
            self._ranks += 1
            if self._ranks > 1:
                return
            for name, own in _functions().items():
                self._replace(dist, name, _asking(getattr(dist, name), own))
            mesh = dist.device_mesh
            self._replace(mesh, "init_device_mesh", _asking(mesh.init_device_mesh, _refused("DeviceMesh")))
            self._replace(dist, "group", _World(dist.group))
            self._replace(dist, "GroupMember", _World(dist.GroupMember))
            self._replace(dist, "P2POp", _asking_op(dist.P2POp))
            logger.debug("the functions of torch.distributed ask which thread calls, while ranks are threads")

    def end(self) -> None:
        """There is one less."""
        with self._lock:
            self._ranks -= 1
            if not self._ranks:
                for (module, name), original in self._originals.items():
                    setattr(module, name, original)
                self._originals.clear()

    def _replace(self, module: Any, name: str, value: Any) -> None:
        self._originals[module, name] = vars(module)[name]
        setattr(module, name, value)


replacement = Replacement()


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """What stands for each function of torch.distributed that has to do with a group."""
    told_by = {"group", "pg", "process_group", "group_name", "init_method", "mesh_shape"}
    found = {}
    for name, function in vars(dist).items():
        if name in _OWN:
            found[name] = _OWN[name]
        elif name.startswith("_") or type(function) is not FunctionType:
            continue
        elif told_by & inspect.signature(function).parameters.keys():
            found[name] = _refused(name)
    return found


def _asking(original: Any, own: Callable[..., Any]) -> Any:
    """A function that asks which thread calls, or to whom the group belongs."""
    names = list(inspect.signature(own).parameters)
    at = names.index("group") if "group" in names else len(names)

    @functools.wraps(original)
    def asking(*args: Any, **kwargs: Any) -> Any:
        group = args[at] if at < len(args) else kwargs.get("group")
        if present_world() is None and not isinstance(group, ThreadGroup):
            return original(*args, **kwargs)
        if isinstance(group, int) and group == _World.NON_GROUP_MEMBER:  # nothing to do, as in torch
            return -1 if own in (get_rank, get_world_size) else None
        return own(*args, **kwargs)

    asking.torchs_own = original  # type: ignore[attr-defined]
    return asking


def _refused(name: str) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"torch.distributed.{name} does not work on ranks that are threads (run_threads, verify_domain_parallel); "
            "credit_halo.testing.run_processes has ranks on which all of torch.distributed works"
        )

    return refused


class _World:
    """``torch.distributed.group`` and ``GroupMember``, whose WORLD is that of the rank which asks."""

    NON_GROUP_MEMBER = dist.GroupMember.NON_GROUP_MEMBER

    def __init__(self, original: Any) -> None:
        self._original = original

    @property
    def WORLD(self) -> Any:  # noqa: N802
        world = present_world()
        return self._original.WORLD if world is None else world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _Message:
    """An ``isend`` or ``irecv`` of a batch."""

    def __init__(self, op: Any, tensor: Tensor, peer: int | None, group: Any, tag: int, group_peer: int | None) -> None:
        self.op, self.tensor, self.group, self.tag = op, tensor, _of(group), tag
        self.group_peer = _within(self.group, peer, group_peer)
        self.peer = self.group.ranks[self.group_peer]


def _asking_op(original: Any) -> Any:
    class Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (original, _Message))

    class P2POp(metaclass=Meta):
        def __new__(
            cls,
            op: Any,
            tensor: Tensor,
            peer: int | None = None,
            group: Any = None,
            tag: int = 0,
            group_peer: int | None = None,
        ) -> Any:
            op = getattr(op, "torchs_own", op)
            if present_world() is not None or isinstance(group, ThreadGroup):
                return _Message(op, tensor, peer, group, tag, group_peer)
            return original(op, tensor, peer, group, tag, group_peer)

    return P2POp


class _Done:
    """What stands for the end of a call that is over."""

    def __init__(self, finish: Callable[[], Any] | None = None) -> None:
        self._finish = finish

    def wait(self, timeout: timedelta | None = None) -> bool:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True

    def is_completed(self) -> bool:
        return self._finish is None

    is_success = is_completed

    def get_future(self) -> torch.futures.Future[Any]:
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(None)
        return future


def _of(group: Any) -> ThreadGroup:
    """The group meant: None is the world."""
    if group is None:
        world = present_world()
        assert world is not None
        return world
    if not isinstance(group, ThreadGroup):
        raise ValueError(f"{group} is no group of this rank, which is a thread: make its groups on the rank itself")
    return group


def _within(group: ThreadGroup, rank: int | None, group_rank: int | None, name: str = "rank") -> int:
    """A rank of the group, given as one of the world or of the group."""
    if (rank is None) == (group_rank is None):
        raise ValueError(f"expected either a {name} of the world or one of the group")
    if group_rank is not None:
        return group_rank
    assert rank is not None
    return get_group_rank(group, rank)


# What torch has of the same name


def is_initialized() -> bool:
    world = present_world()
    return world is not None and not world.ended


def init_process_group(*args: Any, **kwargs: Any) -> None:
    raise ValueError("torch.distributed is initialised on this rank, which is a thread")


def destroy_process_group(group: Any = None) -> None:
    _of(group).ended = True


def get_rank(group: Any = None) -> int:
    return _of(group).rank()


def get_world_size(group: Any = None) -> int:
    return _of(group).size()


def get_backend(group: Any = None) -> str:
    return _of(group).name()


def get_backend_config(group: Any = None) -> str:
    return f"cpu:{_of(group).name()},cuda:{BACKEND}"


def get_process_group_ranks(group: Any) -> list[int]:
    return list(_of(group).ranks)


def get_group_rank(group: Any, global_rank: int) -> int:
    ranks = _of(group).ranks
    if global_rank not in ranks:
        raise ValueError(f"rank {global_rank} is not in the group of {ranks}")
    return ranks.index(global_rank)


def get_global_rank(group: Any, group_rank: int) -> int:
    ranks = _of(group).ranks
    if not 0 <= group_rank < len(ranks):
        raise ValueError(f"the group of {ranks} has no rank {group_rank}")
    return ranks[group_rank]


def new_group(ranks: Sequence[int] | None = None, timeout: timedelta | None = None, *args: Any, **kwargs: Any) -> Any:
    world = _of(None)
    members = tuple(range(world.size())) if ranks is None else tuple(ranks)
    if len(set(members)) != len(members) or not all(0 <= rank < world.size() for rank in members):
        raise ValueError(f"a group must be of different ranks of 0..{world.size() - 1}; got {members}")
    if kwargs.get("sort_ranks", True):
        members = tuple(sorted(members))
    number = _present.made[members] = _present.made.get(members, 0) + 1
    if world.rank() not in members:
        return _World.NON_GROUP_MEMBER
    group = ThreadGroup(world.world, members, world.rank(), number)
    if timeout is not None:
        group.set_timeout(timeout)
    return group


def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
    _of(group).barrier()
    return _Done() if async_op else None


def all_reduce(tensor: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
    _of(group).all_reduce(tensor, op)
    return _Done() if async_op else None


def reduce(
    tensor: Tensor,
    dst: int | None = None,
    op: Any = ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
    group_dst: int | None = None,
) -> Any:
    _of(group).reduce(tensor, _within(_of(group), dst, group_dst, "dst"), op)
    return _Done() if async_op else None


def broadcast(
    tensor: Tensor, src: int | None = None, group: Any = None, async_op: bool = False, group_src: int | None = None
) -> Any:
    _of(group).broadcast(tensor, _within(_of(group), src, group_src, "src"))
    return _Done() if async_op else None


def all_gather(tensor_list: Sequence[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    _of(group).all_gather(tensor_list, tensor)
    return _Done() if async_op else None


def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    parts = output_tensor.detach().view(-1).chunk(_of(group).size())
    _of(group).all_gather(parts, input_tensor)
    return _Done() if async_op else None


def gather(
    tensor: Tensor,
    gather_list: Sequence[Tensor] | None = None,
    dst: int | None = None,
    group: Any = None,
    async_op: bool = False,
    group_dst: int | None = None,
) -> Any:
    dst = 0 if dst is None and group_dst is None else dst
    _of(group).gather(gather_list, tensor, _within(_of(group), dst, group_dst, "dst"))
    return _Done() if async_op else None


def scatter(
    tensor: Tensor,
    scatter_list: Sequence[Tensor] | None = None,
    src: int | None = None,
    group: Any = None,
    async_op: bool = False,
    group_src: int | None = None,
) -> Any:
    src = 0 if src is None and group_src is None else src
    _of(group).scatter(tensor, scatter_list, _within(_of(group), src, group_src, "src"))
    return _Done() if async_op else None


def reduce_scatter(
    output: Tensor, input_list: Sequence[Tensor], op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    _of(group).reduce_scatter(output, input_list, op)
    return _Done() if async_op else None


def reduce_scatter_tensor(
    output: Tensor, input: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    parts = [part.view_as(output) for part in input.detach().reshape(-1).chunk(_of(group).size())]
    return reduce_scatter(output, parts, op, group, async_op)


def all_to_all(
    output_tensor_list: Sequence[Tensor], input_tensor_list: Sequence[Tensor], group: Any = None, async_op: bool = False
) -> Any:
    _of(group).all_to_all(output_tensor_list, input_tensor_list)
    return _Done() if async_op else None


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    size = _of(group).size()
    outputs = torch.split(output.detach(), output_split_sizes or len(output) // size)
    inputs = torch.split(input.detach(), input_split_sizes or len(input) // size)
    return all_to_all(outputs, inputs, group, async_op)


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = _of(group).all_gather_object(obj)


def broadcast_object_list(
    object_list: list[Any], src: int | None = None, group: Any = None, device: Any = None, group_src: int | None = None
) -> None:
    src = 0 if src is None and group_src is None else src
    object_list[:] = _of(group).broadcast_object(object_list, _within(_of(group), src, group_src, "src"))


def send(tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: int | None = None) -> None:
    _of(group).send(tensor, _within(_of(group), dst, group_dst, "dst"), tag)


def isend(tensor: Tensor, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: int | None = None) -> Any:
    send(tensor, dst, group, tag, group_dst)
    return _Done()


def recv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0, group_src: int | None = None) -> int:
    chosen = _of(group)
    source = None if src is None and group_src is None else _within(chosen, src, group_src, "src")
    return chosen.ranks[chosen.recv(tensor, source, tag)]


def irecv(tensor: Tensor, src: int | None = None, group: Any = None, tag: int = 0, group_src: int | None = None) -> Any:
    """A receive that takes its mail when it is waited for."""
    return _Done(lambda: recv(tensor, src, group, tag, group_src))


def batch_isend_irecv(p2p_op_list: Sequence[Any]) -> list[Any]:
    calls = {"isend": isend, "irecv": irecv}
    return [calls[m.op.__name__](m.tensor, None, m.group, m.tag, m.group_peer) for m in p2p_op_list]


_OWN: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(is_initialized, init_process_group, destroy_process_group, new_group),
        *(get_rank, get_world_size, get_backend, get_backend_config),
        *(get_process_group_ranks, get_group_rank, get_global_rank),
        *(barrier, all_reduce, reduce, broadcast, all_gather, all_gather_into_tensor, gather, scatter),
        *(reduce_scatter, reduce_scatter_tensor, all_to_all, all_to_all_single),
        *(all_gather_object, broadcast_object_list, send, isend, recv, irecv, batch_isend_irecv),
    )
}
# Names that torch gave later.
_OWN.update(all_gather_single=all_gather_into_tensor, reduce_scatter_single=reduce_scatter_tensor)
