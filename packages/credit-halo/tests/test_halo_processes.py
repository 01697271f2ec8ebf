"""Real gloo processes: the truth that threads only imitate."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from halo_reference import EDGES, edge_rule, padded_rows, shard, whole_numbers

from credit_halo import exchange_rows, plan_halo, post_rows
from credit_halo.testing import dot_test, run_processes
from credit_mesh import RowPartition, initialize_domain_parallel

UNEVEN = RowPartition((3, 1, 4, 2))


def exact(rank: int) -> None:
    whole = whole_numbers((2, 2, 10, 4))
    for name in EDGES:
        for before, after in ((0, 0), (1, 1), (0, 3), (5, 2), (9, 9)):
            plan = plan_halo(UNEVEN, before, after, rank=rank, edge=edge_rule(name))
            rows = list(range(UNEVEN.offsets[rank] - before, UNEVEN.offsets[rank + 1] + after))
            x = shard(whole, UNEVEN, rank)
            for run in (exchange_rows, lambda t, plan: post_rows(t, plan).wait()):
                assert torch.equal(run(x, plan), padded_rows(whole, rows, name))
                if name != "constant":
                    left, right = dot_test(lambda t, run=run, plan=plan: run(t, plan), x)
                    assert left == right


def test_every_edge_rule_and_several_hops() -> None:
    run_processes(exact, 4)


def counted(rank: int) -> tuple[list[int], list[int]]:
    """Messages and bytes that really leave, forward and backward."""
    messages: list[tuple[str, int]] = []
    original = dist.batch_isend_irecv

    def count(ops):
        messages.extend(("send", op.tensor.numel() * op.tensor.element_size()) for op in ops if op.op is dist.isend)
        return original(ops)

    dist.batch_isend_irecv = count
    plan = plan_halo(UNEVEN, 2, 2, rank=rank)
    x = torch.ones(2, 3, UNEVEN.sizes[rank], 5, requires_grad=True)
    out = exchange_rows(x, plan)
    forward, messages = [size for _, size in messages], []
    assert [len(m.rows) * 2 * 3 * 5 * 4 for m in plan.sends] == forward
    out.sum().backward()
    return forward, [size for _, size in messages]


def test_as_many_messages_back_as_forth() -> None:
    results = run_processes(counted, 4)
    # By hand, for halos of 2 around 3, 1, 4 and 2 rows: what each rank sends, by peer; its gradients go the other way.
    assert [[size // 120 for size in sizes] for sizes, _ in results] == [[2, 1], [1, 1], [1, 2, 2], [2]]
    assert [[size // 120 for size in sizes] for _, sizes in results] == [[1, 1], [2, 2], [1, 1, 2], [2]]


def with_data_parallel_neighbours(rank: int) -> None:
    """Two domain groups side by side must not hear each other."""
    manager = initialize_domain_parallel(4, 2)
    partition = RowPartition((3, 2))
    whole = whole_numbers((1, 1, 5, 2), seed=manager.dp_rank)
    x = shard(whole, partition, manager.domain_rank).clone().requires_grad_()
    plan = plan_halo(partition, 1, 1, rank=manager.domain_rank)
    out = exchange_rows(x, plan, group=manager.domain_group)
    rows = slice(partition.offsets[manager.domain_rank], partition.offsets[manager.domain_rank + 1] + 2)
    assert torch.equal(out, F.pad(whole, (0, 0, 1, 1))[:, :, rows])
    out.sum().backward()
    assert x.grad.sum() == x.numel() + 2


def test_domain_groups_side_by_side() -> None:
    run_processes(with_data_parallel_neighbours, 4)


def on_gpu(rank: int) -> None:
    torch.cuda.set_device(rank)
    world = dist.get_world_size()
    partition = RowPartition.even(4 * world + 1, world)
    whole = whole_numbers((2, 2, partition.rows, 4)).cuda()
    group = dist.new_group(list(range(world)), backend="nccl")
    plan = plan_halo(partition, 2, 1, rank=rank, edge="circular")
    x = shard(whole, partition, rank).clone().requires_grad_()
    for run in (exchange_rows, lambda t, plan, group: post_rows(t, plan, group=group).wait()):
        x.grad = None
        out = run(x, plan, group=group)
        rows = list(range(partition.offsets[rank] - 2, partition.offsets[rank + 1] + 1))
        assert torch.equal(out, padded_rows(whole, rows, "circular"))
        out.sum().backward()
        total = x.grad.sum()
        dist.all_reduce(total, group=group)
        assert total.item() == 2 * 2 * 4 * (partition.rows + 3 * world)


@pytest.mark.gpu
def test_on_nccl() -> None:
    run_processes(on_gpu, torch.cuda.device_count(), timeout=120)


def policies(rank: int, setting: str) -> dict[str, set[int]]:
    """The scheduling policies of this process's threads, by their name, after an exchange."""
    os.environ["CREDIT_HALO_GLOO_BATCH"] = setting
    exchange_rows(torch.ones(1, 1, 4, 2), plan_halo(RowPartition((4, 4)), 1, 1, rank=rank))
    found: dict[str, set[int]] = {}
    for task in Path("/proc/self/task").iterdir():
        found.setdefault((task / "comm").read_text().strip(), set()).add(os.sched_getscheduler(int(task.name)))
    found["this thread"] = {os.sched_getscheduler(0)}
    return found


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no batch threads on this system")
@pytest.mark.parametrize("setting", ["1", "0"])
def test_threads_of_gloo_wait_for_their_turn(setting: str) -> None:
    for found in run_processes(policies, 2, setting):
        names = [name for name in found if name.startswith("gloo_tcp")]
        if not names:
            pytest.skip("gloo does not name its threads in this version of torch")
        assert found["this thread"] == {os.SCHED_OTHER}
        assert found[names[0]] == {os.SCHED_BATCH if setting == "1" else os.SCHED_OTHER}
