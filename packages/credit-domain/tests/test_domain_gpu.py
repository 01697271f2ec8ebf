"""On a GPU: the numbers of one rank, rows that travel while others are computed, a host that never waits, CUDA graphs.

What can be runs on a CPU too. The host waits for nothing there; the names of operations tell what it would wait for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from domain_models import MultiKernelEmbedding, PeriodicConv2d, PeriodicResidualNet, UNet
from domain_reference import randn, shard
from torch import Tensor, nn

import credit_domain.ops.conv.overlap as overlap
from credit_domain import convert_to_domain_parallel, initialize_domain_parallel
from credit_domain.engine.driver import Call, Placed, step_for
from credit_domain.engine.ranks import Domain
from credit_domain.layers import DomainParallelPeriodicConv2d
from credit_domain.ops.conv.borders import borders_of
from credit_domain.ops.conv.convolution import Convolution
from credit_domain.ops.conv.overlap import Shape, overlapped
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, get_domain_parallel_manager

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NETS = {
    "unet": (UNet, (2, 3, 36, 12), 4),
    "odd unet": (lambda: UNet(odd=True), (1, 3, 41, 12), 4),
    "embedding": (MultiKernelEmbedding, (2, 3, 44, 16), 4),
    "periodic": (PeriodicResidualNet, (1, 3, 17, 10), 1),
}
CLOSE = {"rtol": 1e-7, "atol": 1e-9}

# Operations that read a tensor on the host, or bring one from there: lift_fresh is that of torch.tensor.
WAITING = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh"}


def converted(model: nn.Module) -> nn.Module:
    manager = get_domain_parallel_manager()
    return convert_to_domain_parallel(model, manager, custom_converters={PeriodicConv2d: DomainParallelPeriodicConv2d})


def step(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, input gradient and parameter gradients of a forward and backward."""
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_threads_on_one_device_give_the_numbers_of_one_rank(name: str, device: str) -> None:
    make, shape, granularity = NETS[name]
    torch.manual_seed(0)
    model = make().double().to(device).to(memory_format=torch.channels_last)
    whole = randn(*shape).to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = copy.deepcopy(model)(whole)
    grad = randn(*out.shape, seed=1).to(device)
    out, d_whole, *d_parameters = step(copy.deepcopy(model), whole, grad)
    partition = RowPartition.even(shape[-2], 3, granularity)
    assert out.shape[-2] == shape[-2]

    def rank_main(rank: int) -> list[Tensor]:
        initialize_domain_parallel(3, 3).declare(partition)
        x = shard(whole.detach(), partition, rank).clone(memory_format=torch.channels_last).requires_grad_()
        return step(converted(copy.deepcopy(model)), x, shard(grad, partition, rank))

    outs, d_inputs, *parameters = zip(*run_threads(rank_main, 3), strict=True)
    torch.testing.assert_close(torch.cat(outs, -2), out, **CLOSE)
    torch.testing.assert_close(torch.cat(d_inputs, -2), d_whole, **CLOSE)
    for parts, expected in zip(parameters, d_parameters, strict=True):
        torch.testing.assert_close(sum(parts), expected, **CLOSE)


# One rank that is its own neighbour, or has a neighbour with the same rows


class Message(NamedTuple):
    """What a dist.P2POp holds, which itself takes no peer that is not there."""

    op: Callable[..., Any]
    tensor: Tensor
    group: dist.ProcessGroup
    tag: int
    group_peer: int


class Carried:
    """Messages between ranks that hold the same rows: what leaves one is what comes in.

    On a GPU they travel in a stream of their own, after a sleep, and the current stream is what waits for them, as
    with NCCL. On a CPU they arrive when they are waited for.
    """

    def __init__(self, messages: list[Message], cycles: int) -> None:
        ways = [[m.tensor for m in messages if m.op is way] for way in (dist.isend, dist.irecv)]
        self.pairs = list(zip(*ways, strict=True))
        self.arrival = torch.cuda.Event(enable_timing=True) if messages[0].tensor.is_cuda else None
        if self.arrival is not None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)
                self.deliver()
                self.arrival.record()

    def deliver(self) -> None:
        for sent, received in self.pairs:
            received.copy_(sent)

    def wait(self) -> bool:
        if self.arrival is None:
            self.deliver()
        else:
            torch.cuda.current_stream().wait_event(self.arrival)
        return True


@contextmanager
def neighbour(cycles: int, *, at_once: bool = False) -> Iterator[list[Carried]]:
    """Carry messages as above, after so many cycles of a GPU; ``at_once`` computes nothing before they arrive."""
    found: list[Carried] = []

    def batch(messages: list[Message]) -> list[Carried]:
        found.append(Carried(messages, cycles))
        if at_once:
            found[-1].wait()
        return found[-1:]

    with mock.patch.object(dist, "P2POp", Message), mock.patch.object(dist, "batch_isend_irecv", batch):
        yield found


def wrapping(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.pad(x, (0, 0, 1, 1), mode="circular"), weight, bias, padding=(0, 1))


def own_neighbour(group: dist.ProcessGroup, ranks: int = 1, rows: int = 12) -> Callable[..., Tensor]:
    """A convolution that computes its interior, and its borders from a halo of the same rows."""
    op, partition = Convolution(3, 1, 1, 1, 1, "circular"), RowPartition((rows,) * ranks)
    borders = borders_of(op, op.footprint(partition), 0)
    assert borders is not None
    assert len(borders.borders) == 2
    shape = Shape((1, 1), (0, 1), (1, 1), False, (0, 0), 1)
    step = step_for(op, partition.sizes, 0, "conv")
    domain = Domain(group.group_name, 0, ranks, "")
    placed = Placed(-2, domain, partition.sizes, step, Call(-2, partition, None, "conv"))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = overlapped(op, x, weight, bias, placed, shape, wrapping, None)
        assert out is not None
        return out

    return run


def data(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Input, weight, bias and the gradient of the output."""
    sizes = ((2, 8, 12, 10), (8, 8, 3, 3), (8,), (2, 8, 12, 10))
    found = [randn(*size, seed=seed).to(device, dtype) for seed, size in enumerate(sizes)]
    return [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in found]


def conv_step(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    *leaves, grad = inputs
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def same_as_padded(rank: int, device: str) -> None:
    torch.backends.cudnn.allow_tf32 = False
    group = dist.new_group([0], backend="nccl") if device == "cuda" else dist.group.WORLD
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        inputs = data(device, dtype)
        wanted = conv_step(wrapping, inputs)
        for ranks in (1, 2):
            with neighbour(cycles=10**7) as carried:  # some milliseconds, in which rows that nobody waits for are zeros
                found = conv_step(own_neighbour(group, ranks), inputs)
            assert len(carried) == (2 if ranks == 2 else 0)
            for each, expected in zip(found, wanted, strict=True):
                assert each.dtype == dtype
                error = (each.double() - expected.double()).abs().max() / expected.double().abs().max()
                assert error < tolerance, (dtype, ranks, error)


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_that_is_its_own_neighbour(device: str) -> None:
    run_processes(same_as_padded, 1, device, timeout=120)


def timed() -> torch.cuda.Event:
    """Now, in the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def hidden(rank: int) -> None:
    """A delay of every message as long as a convolution, which takes milliseconds."""
    torch.cuda.set_device(0)
    torch.backends.cudnn.allow_tf32 = False
    rows, run = 512, own_neighbour(dist.new_group([0], backend="nccl"), 2, 512)
    sizes = ((4, 64, rows, 512), (64, 64, 3, 3), (64,), (4, 64, rows, 512))
    *leaves, grad = (torch.rand(size, device="cuda") for size in sizes)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    begun: list[torch.cuda.Event] = []

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Tensor, *args: Any) -> Any:
            if first.shape[2] == rows:  # not a border
                begun.append(timed())
            return method(first, *args)

        return call

    def step(cycles: int, *, at_once: bool = False) -> Tensor:
        """Milliseconds of the forward and of the backward; between the begin of their computation and arrival."""
        begun.clear()
        with (
            neighbour(cycles, at_once=at_once) as carried,
            mock.patch.object(torch, "convolution", noted(torch.convolution)),
            mock.patch.object(overlap, "_gradients", noted(overlap._gradients)),
        ):
            torch.cuda._sleep(10**8)  # in which the host comes ahead
            start = timed()
            out = run(*leaves)
            middle = timed()
            torch.autograd.grad(out, leaves, grad)
            end = timed()
        torch.cuda.synchronize()
        arrivals = [work.arrival for work in carried]
        early = [begin.elapsed_time(arrival) for begin, arrival in zip(begun, arrivals, strict=True)]
        return torch.tensor([start.elapsed_time(middle), middle.elapsed_time(end), *early])

    def best(cycles: int, *, at_once: bool = False) -> Tensor:
        """The shortest of some times, so that what else uses the GPU counts little."""
        return torch.stack([step(cycles, at_once=at_once) for _ in range(5)]).amin(0)

    step(0)
    prompt = best(0)[:2]
    start = timed()
    torch.cuda._sleep(10**8)
    end = timed()
    end.synchronize()
    cycles = int(10**8 * prompt[0] / start.elapsed_time(end))
    overlapped, early = best(cycles).split(2)
    late = best(cycles, at_once=True)[:2]
    told = f"ms forward and backward: {prompt} without delay, {overlapped} with, {late} waiting at once; {early} early"
    assert (early > 0).all(), told  # the computation begins before messages arrive
    assert (overlapped - prompt < (late - prompt) / 2).all(), told


@pytest.mark.gpu
def test_rows_travel_while_others_are_computed() -> None:
    run_processes(hidden, 1, timeout=120)


# The host


def names_of_a_second_step(rank: int, name: str) -> set[str]:
    make, shape, granularity = NETS[name]
    partition = RowPartition.even(shape[-2], 2, granularity)
    initialize_domain_parallel(2, 2).declare(partition)
    torch.manual_seed(0)
    net = converted(make())
    x = shard(randn(*shape, dtype=torch.float32), partition, rank).clone().requires_grad_()
    grad = torch.ones_like(net(x))
    step(net, x, grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(net, x, grad)
    return {event.key.removeprefix("aten::") for event in profile.key_averages()}


@pytest.mark.parametrize("name", NETS)
def test_a_second_step_of_a_net_has_nothing_to_wait_for(name: str) -> None:
    for names in run_processes(names_of_a_second_step, 2, name):
        assert "convolution" in names, "the profiler did not look into the net"
        assert not names & WAITING


def silent(rank: int) -> None:
    torch.cuda.set_device(0)
    group = dist.new_group([0], backend="nccl")
    initialize_domain_parallel(1, 1)
    net = converted(UNet()).cuda()
    x, run, inputs = randn(1, 3, 36, 12, dtype=torch.float32).cuda(), own_neighbour(group), data("cuda", torch.float32)

    def both() -> None:
        step(net, x.requires_grad_(), x.detach())
        conv_step(run, inputs)

    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_net() -> None:
    run_processes(silent, 1, timeout=120)


# CUDA graphs


def captured(rank: int) -> None:
    torch.cuda.set_device(0)
    group = dist.new_group([0], backend="nccl")
    initialize_domain_parallel(1, 1)
    torch.manual_seed(0)
    net = converted(UNet()).double().cuda()
    x, grad = randn(1, 3, 36, 12).cuda().requires_grad_(), randn(1, 3, 36, 12, seed=1).cuda()
    run, inputs = own_neighbour(group), data("cuda", torch.float64)

    def both() -> list[Tensor]:
        return step(net, x, grad) + conv_step(run, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done once is not part of the graph
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = both()
    with torch.no_grad():
        x.copy_(randn(1, 3, 36, 12, seed=2))
        inputs[0].copy_(randn(2, 8, 12, 10, seed=3))
    graph.replay()
    for replayed, expected in zip(found, both(), strict=True):
        torch.testing.assert_close(replayed, expected, **CLOSE)


@pytest.mark.gpu
def test_a_step_of_one_rank_can_be_captured() -> None:
    run_processes(captured, 1, timeout=120)
