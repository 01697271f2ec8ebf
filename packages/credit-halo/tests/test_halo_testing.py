"""The harness of ranks: users import it, so it must say what went wrong."""

import gc
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from halo_reference import padded_rows, shard, whole_numbers

from credit_halo import exchange_rows, plan_halo
from credit_halo.testing import RankError, run_processes, run_threads
from credit_mesh import RowPartition

RUNNERS = [run_threads, run_processes]


def hello(rank: int, greeting: str) -> tuple[str, int, torch.Tensor]:
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return f"{greeting} {rank}", dist.get_world_size(), total


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("no more rows")


def leave(rank: int) -> None:
    if rank == 1:
        os._exit(3)


def sleep_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def no_pickle(rank: int) -> object:
    return lambda: rank


def wait_for_a_message_that_never_comes(rank: int) -> None:
    if rank == 0:
        dist.recv(torch.ones(1), 1)
    time.sleep(2)


def wait_for_one_that_is_over(rank: int) -> None:
    if rank == 0:
        dist.barrier()


@pytest.mark.parametrize("run", RUNNERS)
def test_results_come_back_by_rank(run) -> None:
    results = run(hello, 3, "hello")
    assert [(text, size, total.item()) for text, size, total in results] == [(f"hello {r}", 3, 3) for r in range(3)]


def every_function(rank: int) -> list[object]:
    """What torch.distributed gives on a rank, by most of what a program may call."""
    size, own = dist.get_world_size(), torch.tensor([1.0, 2.0]) * (rank + 1)
    some = dist.new_group([2, 0])
    found: list[object] = [dist.get_rank(), size, dist.get_rank(some), dist.get_world_size(some), dist.is_initialized()]
    if rank != 1:
        found += [dist.get_process_group_ranks(some), dist.get_global_rank(some, 1), dist.get_group_rank(some, rank)]
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        found.append(total := own.clone())
        dist.all_reduce(total, op)
    for group in (dist.group.WORLD, some):
        found.append(total := own.clone())
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.all_reduce(total, group=group, async_op=True).wait()
    found.append(total := own.clone())
    dist.reduce(total, 1)
    if rank != 1:
        found.pop()  # what the others are left with is not said
    found.append(same := own.clone())
    dist.broadcast(same, 2)
    found.append(every := [torch.empty(2) for _ in range(size)])
    dist.all_gather(every, own)
    found.append(whole := torch.empty(2 * size))
    dist.all_gather_into_tensor(whole, own)
    found.append(every := [torch.empty(2) for _ in range(size)] if rank == 1 else None)
    dist.gather(own, every, 1)
    found.append(part := torch.empty(2))
    dist.scatter(part, [own * i for i in range(size)] if rank == 2 else None, 2)
    found.append(part := torch.empty(2))
    dist.reduce_scatter_tensor(part, torch.arange(2.0 * size) * (rank + 1))
    found.append(swapped := torch.empty(size))
    dist.all_to_all_single(swapped, torch.arange(float(size)) + 10 * rank)
    found.append(uneven := torch.empty(sum(r + 1 for r in range(size)) if rank == 0 else 0))
    dist.all_to_all_single(
        uneven, torch.full([rank + 1], float(rank)), [r + 1 if rank == 0 else 0 for r in range(size)], [rank + 1, 0, 0]
    )
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    found.append(objects)
    found.append(said := [rank, "text"])
    dist.broadcast_object_list(said, 1)
    right, left = (rank + 1) % size, (rank - 1) % size
    found.append(got := torch.empty(2))
    ops = [dist.P2POp(dist.isend, own, right, tag=3), dist.P2POp(dist.irecv, got, left, tag=3)]
    assert isinstance(ops[0], dist.P2POp)
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    found.append(got := torch.empty(2))
    work = dist.irecv(got, left)
    dist.send(own, right)
    work.wait()
    if rank == 0:
        found.append(sorted(dist.recv(torch.empty(2)) for _ in range(size - 1)))
    else:
        dist.send(own, 0)
    dist.barrier()
    return found


@pytest.mark.slow
def test_threads_have_what_processes_have() -> None:
    threads, processes = run_threads(every_function, 3), run_processes(every_function, 3)
    assert repr(threads) == repr(processes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rank: dist.barrier() if rank else dist.all_reduce(torch.ones(1)), "do not call the same collective"),
        (lambda rank: dist.all_reduce(torch.ones(1 + rank)), "do not call the same collective"),
        (lambda rank: dist.all_gather([torch.ones(2)] * 2, torch.ones(1)), "expected float32 of shape .2,.*shape .1,"),
        (lambda rank: dist.init_process_group("gloo"), "is initialised on this rank"),
        (lambda rank: dist.new_group([0, 2]), "different ranks of 0..1"),
        (lambda rank: dist.split_group([[0], [1]]), "split_group does not work on ranks that are threads"),
        (lambda rank: dist.monitored_barrier(), "monitored_barrier does not work on ranks that are threads"),
        (lambda rank: dist.device_mesh.init_device_mesh("cpu", (2,)), "DeviceMesh does not work on ranks that are"),
    ],
)
def test_mistakes_on_threads(call, message) -> None:
    with pytest.raises(RankError, match=message):
        run_threads(call, 2, timeout=30)


@pytest.mark.parametrize("run", RUNNERS)
def test_a_failed_rank_is_named_with_its_traceback(run) -> None:
    with pytest.raises(RankError, match="1 ranks failed\nrank 1:\n(.|\n)*no more rows") as info:
        run(fail_on_one, 3)
    assert list(info.value.failures) == [1]
    assert isinstance(info.value.errors[1], ValueError)
    assert run(hello, 2, "again")[1][0] == "again 1"


def collect(rank: int) -> int:
    gc.collect()
    return rank


def test_a_fork_leaves_the_garbage_of_its_parent_alone(tmp_path) -> None:
    """A process group, for one: it would wait for threads that the fork does not have."""
    gc.disable()
    try:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/world", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        cycle: list[object] = [dist.group.WORLD]
        cycle.append(cycle)
        dist.destroy_process_group()
        del cycle
        assert run_processes(collect, 2, fork=True, timeout=60) == [0, 1]
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_dead_process_and_a_late_one() -> None:
    with pytest.raises(RankError, match="rank 1:\nended with exit code 3"):
        run_processes(leave, 2)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1:\ndid not finish in 5.0 s"):
        run_processes(sleep_on_one, 2, timeout=5.0)
    assert time.monotonic() - started < 20
    with pytest.raises(RankError, match="returned what cannot be pickled"):
        run_processes(no_pickle, 1)


def test_a_thread_does_not_wait_forever() -> None:
    with pytest.raises(RankError, match="timed out after 0.5 s"):
        run_threads(wait_for_a_message_that_never_comes, 2, timeout=0.5)
    with pytest.raises(RankError, match="rank 1 ended, and took no part"):
        run_threads(wait_for_one_that_is_over, 2, timeout=60)


def test_a_thread_is_woken_when_the_one_it_waits_for_fails() -> None:
    def rank_main(rank: int) -> None:
        if rank == 1:
            raise KeyError("gone")
        dist.recv(torch.ones(1), 1)

    started = time.monotonic()
    with pytest.raises(RankError, match="rank 1 failed: 'gone'"):
        run_threads(rank_main, 2, timeout=30)
    assert time.monotonic() - started < 10


def test_threads_have_a_world_of_their_own_beside_that_of_the_program(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/world", rank=0, world_size=1)
    originals = dict(vars(dist))
    inside, over = threading.Barrier(3), threading.Barrier(3)

    def rank_main(rank: int) -> int:
        inside.wait(60)
        over.wait(60)
        return hello(rank, "hello")[1]

    found = []
    caller = threading.Thread(target=lambda: found.extend(run_threads(rank_main, 2)))
    try:
        caller.start()
        inside.wait(60)
        total = torch.ones(1)
        dist.all_reduce(total)  # while the others run
        assert (dist.get_world_size(), dist.get_backend(), total.item()) == (1, "gloo", 1)
        over.wait(60)
        caller.join(60)
        assert found == [2, 2]
        assert dict(vars(dist)) == originals
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_many_ranks_as_threads_on_one_gpu() -> None:
    partition = RowPartition((3, 1, 4, 2))
    whole = whole_numbers((2, 2, 10, 4)).cuda()

    def rank_main(rank: int) -> torch.Tensor:
        x = shard(whole, partition, rank).clone().requires_grad_()
        out = exchange_rows(x, plan_halo(partition, 2, 2, rank=rank, edge="reflect"))
        rows = list(range(partition.offsets[rank] - 2, partition.offsets[rank + 1] + 2))
        assert torch.equal(out, padded_rows(whole, rows, "reflect"))
        out.sum().backward()
        return x.grad.sum()

    assert sum(run_threads(rank_main, 4)).item() == 2 * 2 * 4 * (10 + 4 * 4)
