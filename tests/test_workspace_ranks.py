"""The machine itself: where these fail, look at torch, the driver and NCCL before the packages."""

import datetime
import multiprocessing

import pytest
import torch
import torch.distributed as dist

from credit_halo.testing import RankError, run_threads


def add_ranks(rank, world, backend, rendezvous):
    """In a process of its own: the sum of what all ranks bring."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(backend, f"file://{rendezvous}", timeout, world_size=world, rank=rank)
    try:
        total = torch.tensor(rank + 1.0, device=device)
        dist.all_reduce(total)
        assert total.item() == world * (world + 1) / 2
    finally:
        dist.destroy_process_group()


def run_ranks(world, backend, rendezvous):
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=add_ranks, args=(r, world, backend, rendezvous)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0] * world


def test_processes_on_gloo(tmp_path):
    run_ranks(2, "gloo", tmp_path / "rendezvous")


@pytest.mark.gpu
def test_one_process_per_gpu_on_nccl(tmp_path):
    run_ranks(torch.cuda.device_count(), "nccl", tmp_path / "rendezvous")


def seeds(rank):
    torch.manual_seed(rank)


def forks(rank):
    with torch.random.fork_rng():
        pass


@pytest.mark.parametrize("fn", [seeds, forks])
def test_ranks_that_are_threads_may_not_seed_the_generator_that_they_share(fn):
    fn(0)
    with pytest.raises(RankError, match="on a rank of run_threads: all ranks share torch's generator"):
        run_threads(fn, 2)
