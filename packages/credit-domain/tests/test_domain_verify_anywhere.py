"""Verification where users meet it: a notebook, a script, a program that has initialised torch.distributed, a GPU."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from credit_domain import verify_domain_parallel
from credit_halo.testing import run_processes

# What a user types.
CELLS = [
    """
import torch
from torch import nn
from credit_domain import verify_domain_parallel
""",
    """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x):
        return self.norm(self.first(x)).relu()
""",
    """
report = verify_domain_parallel(Net(), (1, 2, 17, 8), ranks=3)
print("exact" if report else report)
""",
]


def make() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4))


@pytest.mark.slow
def test_a_model_of_main_that_no_file_has() -> None:
    done = subprocess.run([sys.executable, "-"], input="".join(CELLS), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "exact"


@pytest.mark.slow
def test_in_the_kernel_of_a_notebook() -> None:
    pytest.importorskip("ipykernel", reason="needs ipykernel and nbclient")
    nbformat = pytest.importorskip("nbformat", reason="needs ipykernel and nbclient")
    nbclient = pytest.importorskip("nbclient", reason="needs ipykernel and nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    handler = signal.getsignal(signal.SIGINT)
    try:
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    finally:
        signal.signal(signal.SIGINT, handler)  # nbclient takes Python's own for what was there
    assert [output["text"] for output in notebook.cells[-1].outputs] == ["exact\n"]


def verify_twice(rank: int) -> tuple[bool, int, float]:
    """On one rank at a time, too: no other process is asked."""
    report = verify_domain_parallel(make(), (1, 2, 17, 8)) if rank == 0 else True
    again = verify_domain_parallel(make(), (1, 2, 17, 8), ranks=2)
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    return bool(report and again), dist.get_world_size(), total.item()


def test_in_a_program_that_has_initialised_torch_distributed() -> None:
    assert run_processes(verify_twice, 2) == [(True, 2, 2.0)] * 2


def test_two_at_a_time() -> None:
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(verify_domain_parallel(make(), (1, 2, 17, 8)))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [bool(report) for report in reports] == [True, True]


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return Sum.forward(ctx, grad)


class MeanOverRows(nn.Module):
    """A forward that talks to other ranks by itself, if there are any."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.conv, self.reduce = nn.Conv2d(2, 2, 1), reduce

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        total = x.sum(-2, keepdim=True)
        if dist.is_initialized():
            if self.reduce == "differentiable":
                total = Sum.apply(total)
            else:
                total = total.clone()
                dist.all_reduce(total)
        return x * total


def convert(model: nn.Module, manager: object) -> nn.Module:
    return model


def test_a_forward_that_calls_torch_distributed_means_the_ranks_of_the_verification() -> None:
    assert verify_domain_parallel(MeanOverRows("differentiable"), (1, 2, 17, 8), convert=convert)
    report = verify_domain_parallel(MeanOverRows("plain"), (1, 2, 17, 8), convert=convert)
    assert not report  # what drops the gradient through the sum is found
    assert report.difference is not None
    assert report.difference.phase == "backward"


class Builds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        return x


def test_what_threads_do_not_have_is_refused_by_name() -> None:
    report = verify_domain_parallel(Builds(), (1, 2, 17, 8), convert=convert)
    assert report.difference is not None
    assert "DeviceMesh does not work on ranks that are threads" in report.difference.what


@pytest.mark.gpu
def test_a_model_on_a_gpu() -> None:
    torch.cuda.init()
    assert verify_domain_parallel(make().cuda(), {"input": torch.randn(1, 2, 17, 8, device="cuda")}, ranks=4)
