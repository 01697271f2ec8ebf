"""Convolutions that compute while their halo travels: exact, in the promised order, hidden behind the computation."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from domain_reference import check_layer, partitions, randn, shard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import credit_domain.ops.conv.overlap as overlap
import credit_domain.ops.conv.overlap_op as overlap_op
from credit_domain import convert_to_domain_parallel
from credit_domain.engine.ranks import domain_of
from credit_domain.layers import DomainParallelConv2d, DomainParallelConvTranspose2d
from credit_domain.ops.conv.borders import borders_of
from credit_domain.ops.conv.convolution import Convolution
from credit_domain.ops.conv.transposed import TransposedConvolution
from credit_halo.extend import ops
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

EVEN = RowPartition((8, 8, 8))


@contextmanager
def counted():
    """How many convolutions, of all ranks that are threads, overlap their exchange."""
    calls, apply = [], overlap._Convolve.apply

    def count(*args):
        calls.append(args)
        return apply(*args)

    with mock.patch.object(overlap._Convolve, "apply", count):
        yield calls


def check(module, kind, partition, *, overlaps, width=6, dim=-2):
    shape = [2, module.in_channels, width, width]
    shape[dim] = partition.rows
    with counted() as calls:
        check_layer(module, kind(dim=dim), randn(*shape), partition, dim)
    assert bool(calls) == overlaps
    assert len(calls) in (0, 2 * partition.ranks)  # the same on every rank, in each of two calls


def conv2d(dim=-2):
    return lambda module: DomainParallelConv2d(module, dim)


def transposed2d(dim=-2):
    return lambda module: DomainParallelConvTranspose2d(module, dim)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 4, "padding": 1, "stride": 2},
        {"kernel_size": 7, "padding": 3, "stride": 2},
        {"kernel_size": 5, "padding": 2, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        {"kernel_size": 2, "padding": 1, "stride": 2},
    ],
)
@pytest.mark.parametrize("dim", [-2, -1])
def test_ordinary_convolutions_overlap(arguments, mode, dim):
    if isinstance(arguments["kernel_size"], tuple) and dim == -1:
        pytest.skip("not a convolution along that dim")
    # Pairs shifted by one row: no rank but the last reads its last row.
    pairs = arguments["kernel_size"] == 2
    module = nn.Conv2d(4, 6, padding_mode=mode, **arguments).double()
    check(module, conv2d, EVEN, overlaps=not pairs, dim=dim)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": 6, "stride": 3, "padding": 2, "output_padding": 1, "groups": 2},
        {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2, "bias": False},
    ],
)
@pytest.mark.parametrize("dim", [-2, -1])
def test_ordinary_transposed_convolutions_overlap(arguments, dim):
    check(nn.ConvTranspose2d(4, 6, **arguments).double(), transposed2d, EVEN, overlaps=True, dim=dim)


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"kernel_size": 3}, (8, 8)),  # valid: nothing but the halo would be padded
        ({"kernel_size": 3, "padding": 1}, (1, 8)),  # both borders of a rank meet
        ({"kernel_size": 3, "padding": 1, "stride": 4}, (2, 1, 8)),  # a rank has no output rows
    ],
)
def test_others_wait_for_their_halo(arguments, sizes):
    partition = RowPartition(sizes)
    check(nn.Conv2d(2, 2, **arguments).double(), conv2d, partition, overlaps=False)


def test_a_transposed_convolution_waits_where_borders_meet():
    module = nn.ConvTranspose2d(2, 2, 5, padding=2).double()
    check(module, transposed2d, RowPartition((8, 1, 8)), overlaps=False)


@settings(max_examples=120)
@given(st.data(), partitions(st.integers(14, 60), most=4), st.booleans())
def test_any_convolution(data, partition, transposed):
    draw = data.draw
    kernel, stride, dilation = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, dilation * (kernel - 1) // 2 + 1))
    arguments = {"kernel_size": (kernel, 1), "stride": (stride, 1), "dilation": (dilation, 1), "padding": (padding, 0)}
    if transposed:
        arguments["output_padding"] = (draw(st.integers(0, stride - 1)), 0)
        more = arguments["output_padding"][0]
        op = TransposedConvolution(kernel, stride, padding, more, dilation)
        assume(op.least_rows(partition.rows) + more >= 1)
        module, kind = nn.ConvTranspose2d(1, 1, **arguments).double(), transposed2d
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        module, kind = nn.Conv2d(1, 1, padding_mode=mode, **arguments).double(), conv2d
    with counted() as calls:
        check_layer(module, kind(), randn(1, 1, partition.rows, 2), partition, calls=1)
    assert len(calls) in (0, partition.ranks)


@given(st.data(), partitions(st.integers(4, 60)), st.booleans())
def test_ranks_decide_alike(data, partition, transposed):
    kernel, stride, dilation, padding = (data.draw(st.integers(low, 4)) for low in (1, 1, 1, 0))
    try:
        if transposed:
            op = TransposedConvolution(kernel, stride, padding, 0, dilation)
        else:
            op = Convolution(kernel, stride, padding, padding, dilation, "reflect")
        plan = op.footprint(partition)
        found = [borders_of(op, plan, rank) for rank in range(partition.ranks)]
    except ValueError:
        assume(False)
    assert len({borders is None for borders in found}) == 1


# What a step does


def chain(layers=3, channels=4):
    return nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)))


def on_ranks(fn, partition=EVEN, run=run_threads):
    """Run ``fn(rank, manager)`` on the ranks of a partition, which is declared."""

    def rank_main(rank):
        manager = initialize_domain_parallel(partition.ranks, partition.ranks)
        manager.declare(partition)
        return fn(rank, manager)

    return run(rank_main, partition.ranks)


def logged(events, name, method):
    def call(*args, **kwargs):
        events.append(name)
        return method(*args, **kwargs)

    return call


def events(net, x):
    """What a step does, forward and backward."""
    found = []
    with (
        mock.patch.object(ops, "start", logged(found, "send", ops.start)),
        mock.patch.object(ops.InFlight, "wait", logged(found, "wait", ops.InFlight.wait)),
        mock.patch.object(torch, "convolution", logged(found, "convolve", torch.convolution)),
        mock.patch.object(overlap, "_gradients", logged(found, "gradients", overlap._gradients)),
    ):
        out = net(x)
        forward = list(found)
        found.clear()
        out.backward(torch.ones_like(out))
    return forward, found


def events_of(rank, compiled):
    """What the middle one of three ranks does in a chain of two convolutions."""
    manager = initialize_domain_parallel(3, 3)
    manager.declare(EVEN)
    net = convert_to_domain_parallel(chain(2), manager)
    x = torch.randn(1, 4, 8, 6, requires_grad=True)
    if compiled:
        net = torch.compile(net, backend="aot_eager", fullgraph=True)
        net(x).sum().backward()
    return events(net, x)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_own_rows_are_computed_while_others_travel(compiled):
    forward, backward = run_processes(events_of, 3, compiled, timeout=120)[1]
    assert forward == ["send", "convolve", "wait", "convolve", "convolve"] * 2  # own rows, then both borders
    assert backward == ["gradients", "gradients", "send", "gradients", "wait"] * 2


def traffic_of(rank, needs_input):
    manager = initialize_domain_parallel(3, 3)
    manager.declare(EVEN)
    net = convert_to_domain_parallel(chain(3), manager)
    x = torch.randn(1, 4, 8, 6, requires_grad=needs_input)
    messages, batch, others = [], dist.batch_isend_irecv, []

    def record(batched):
        messages.extend((op.op.__name__, op.group_peer, op.tensor.numel()) for op in batched)
        return batch(batched)

    out = net(x)
    out.backward(torch.ones_like(out))  # the ranks have agreed, and ask no more
    with (
        mock.patch.object(dist, "batch_isend_irecv", record),
        mock.patch.object(dist, "all_gather", logged(others, "gather", dist.all_gather)),
    ):
        out = net(x)
        forward = list(messages)
        messages.clear()
        out.backward(torch.ones_like(out))
    assert not others
    return forward, messages


@pytest.mark.parametrize("needs_input", [True, False])
def test_one_message_to_and_from_each_neighbour(needs_input):
    row = 4 * 6 * 4  # bytes
    for rank, (forward, backward) in enumerate(run_processes(traffic_of, 3, needs_input)):
        peers = [peer for peer in (rank - 1, rank + 1) if 0 <= peer < 3]
        once = sorted((op, peer, row) for op in ("isend", "irecv") for peer in peers)
        assert sorted(forward) == sorted(once * 3)
        assert sorted(backward) == sorted(once * (3 if needs_input else 2))  # the first layer has no gradient to send


def kept(net, x):
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    del out
    return sum(seen.values())


def test_no_padded_copy_is_kept():
    partition = RowPartition((128, 128))

    def rank_main(rank, manager):
        net = chain(4)
        x = torch.randn(1, 4, 128, 16, requires_grad=True)
        local = kept(net, x)
        return kept(convert_to_domain_parallel(copy.deepcopy(net), manager), x) / local

    assert max(on_ranks(rank_main, partition)) <= 1.01


def test_gradients_of_gradients():
    torch.manual_seed(0)
    net, whole = chain(2).double(), randn(2, 4, 24, 5)
    factor = randn(2, 4, 24, 5, seed=1)

    def second(net, x, factor):
        (first,) = torch.autograd.grad((net(x).pow(3) * factor).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *net.parameters()])

    expected = second(net, whole.clone().requires_grad_(), factor)

    def rank_main(rank, manager):
        mine = convert_to_domain_parallel(copy.deepcopy(net), manager)
        return second(mine, shard(whole, EVEN, rank).clone().requires_grad_(), shard(factor, EVEN, rank))

    results = on_ranks(rank_main)
    torch.testing.assert_close(torch.cat([result[0] for result in results], -2), expected[0])
    for i, wanted in enumerate(expected[1:], 1):
        torch.testing.assert_close(sum(result[i] for result in results), wanted)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(4, 8, 4, 2, 1)])
def test_autocast_is_that_of_one_rank(layer, memory_format):
    whole = randn(1, 4, 24, 6, dtype=torch.float32)

    def run(layer, x):
        x = x.clone(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        return out.detach(), x.grad, layer.weight.grad, out.is_contiguous(memory_format=memory_format)

    out, d_x, d_weight, _ = run(copy.deepcopy(layer), whole)

    def rank_main(rank, manager):
        mine = convert_to_domain_parallel(copy.deepcopy(layer), manager)
        return run(mine, shard(whole, EVEN, rank))

    with counted() as calls:
        results = on_ranks(rank_main)
    assert len(calls) == 3
    assert all(result[3] for result in results)
    assert torch.equal(torch.cat([result[0] for result in results], -2), out)  # rounded no oftener than on one rank
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(torch.cat([result[1] for result in results], -2), d_x, **close)
    torch.testing.assert_close(sum(result[2] for result in results), d_weight, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d, nn.ConvTranspose3d])
def test_half_precision_is_rounded_as_on_one_rank(kind, dtype, last):
    """Torch rounds elsewhere in channels_last, so borders are computed in the format of the rest."""
    layer = kind(4, 8, 4, 2, 1).to(dtype)
    dims = len(layer.kernel_size)
    memory_format = (torch.contiguous_format, (torch.channels_last, torch.channels_last_3d)[dims - 2])[last]
    whole = randn(2, 4, *[6] * (dims - 2), 24, 6, dtype=torch.float32).to(dtype)

    def run(layer, x):
        return layer(x.contiguous(memory_format=memory_format)).detach()

    for partition in (EVEN, RowPartition((4, 14, 6))):

        def rank_main(rank, manager, partition=partition):
            mine = convert_to_domain_parallel(copy.deepcopy(layer), manager)
            return run(mine, shard(whole, partition, rank))

        results = on_ranks(rank_main, partition)
        expected = run(layer, whole)
        kept = expected.is_contiguous(memory_format=memory_format)
        assert all(result.is_contiguous(memory_format=memory_format) == kept for result in results)
        different = torch.cat(results, -2) != expected
        # A sum in float32 may come out in another order on another number of rows: rarely, its rounding tells.
        assert different.sum() <= different.numel() / 500


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    whole = randn(1, 4, 24, 6)
    net = chain().double()
    x = whole.clone().requires_grad_()
    net(x).square().sum().backward()

    def rank_main(rank, manager):
        mine = convert_to_domain_parallel(copy.deepcopy(net), manager)
        mine.zero_grad()
        part = shard(whole, EVEN, rank).clone().requires_grad_()
        checkpoint(mine, part, use_reentrant=reentrant).square().sum().backward()
        return part.grad, [p.grad for p in mine.parameters()]

    results = on_ranks(rank_main)
    torch.testing.assert_close(torch.cat([grad for grad, _ in results], -2), x.grad)
    for i, parameter in enumerate(net.parameters()):
        torch.testing.assert_close(sum(grads[i] for _, grads in results), parameter.grad)


@pytest.mark.parametrize("trained", ["input", "weight", "bias"])
def test_gradients_that_nobody_wants_are_left_out(trained):
    whole = randn(1, 4, 24, 6)
    net = chain(1)[0].double().requires_grad_(False)

    def grad_of(layer, x):
        x = x.clone()
        wanted = x if trained == "input" else getattr(layer, trained)
        wanted.requires_grad_()
        layer(x).square().sum().backward()
        return wanted.grad

    def rank_main(rank, manager):
        return grad_of(DomainParallelConv2d(copy.deepcopy(net)), shard(whole, EVEN, rank))

    results = on_ranks(rank_main)
    found = torch.cat(results, -2) if trained == "input" else sum(results)
    torch.testing.assert_close(found, grad_of(net, whole))


def test_an_error_leaves_no_rows_under_way():
    def rank_main(rank, manager):
        layer = convert_to_domain_parallel(chain(1)[0], manager)
        x = torch.ones(1, 4, 8, 6)
        with mock.patch.object(layer.wrapped, "bias", nn.Parameter(torch.zeros(5))), pytest.raises(RuntimeError):
            layer(x)
        return layer(x * rank)

    ones = on_ranks(rank_main)
    assert all(torch.isfinite(out).all() for out in ones)


# Compiled

COMPILED = (
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 5, stride=2, padding=2, groups=2, bias=False),
    nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=(2, 1), padding_mode="circular"),
    nn.Conv2d(4, 6, 2, padding="same"),  # waits for its halo
    nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
)


def compiled_like_eager(rank, backend):
    manager = initialize_domain_parallel(3, 3)
    manager.declare(RowPartition((8, 6, 10), 2))
    torch.manual_seed(0)
    few = backend == "inductor"  # which takes its time, and calls the same operator
    for layer in COMPILED[::4] if few else COMPILED:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            mine = convert_to_domain_parallel(copy.deepcopy(layer).double(), manager)
            fast = torch.compile(mine, backend=backend, fullgraph=True)
            x = randn(2, 4, (8, 6, 10)[rank], 8, seed=rank).clone(memory_format=memory_format).requires_grad_()
            found = []
            for net in (mine, fast):
                out = net(x)
                loss = (out * randn(*out.shape, seed=9 + rank)).sum()
                found.append([out, *torch.autograd.grad(loss, [x, *mine.parameters()])])
            for plain, compiled in zip(*found, strict=True):
                torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_convolutions(backend):
    run_processes(compiled_like_eager, 3, backend, timeout=900)


def test_operators_pass_torchs_own_check():
    op = Convolution(3, 1, 1, 1)

    def rank_main(rank, manager):
        shape = overlap.Shape((1, 1), (0, 1), (1, 1), False, (0, 0), 1)
        what = ("Convolution", tuple(op), EVEN.sizes, -2, tuple(domain_of(manager)), "conv", tuple(shape))
        name = overlap.name_of(*what)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x, grad = (randn(2, 4, 8, 6, seed=seed).contiguous(memory_format=memory_format) for seed in (0, 1))
            weight, bias = randn(4, 4, 3, 3), randn(4)
            overlap.named.cache_clear()  # the name says all, however long ago it was worked out
            _, halo = overlap_op.convolve(x, weight, bias, name)
            checks = {"test_utils": ("test_schema", "test_faketensor")}
            torch.library.opcheck(overlap_op.convolve, (x, weight, bias, name), **checks)
            for needs in ([True, True, True], [False, True, False]):
                args = (grad, x, weight, halo, [4], name, needs)
                torch.library.opcheck(overlap_op.convolve_backward, args, **checks)

    on_ranks(rank_main)


# Hidden behind the computation

LAYERS, DELAY, WORK = 5, 0.04, 0.06


class Clock:
    """Seconds that pass by work and by waiting alone, so that no other program on the machine counts."""

    def __init__(self):
        self.now = 0.0

    def until(self, at):
        self.now = max(self.now, at)


class Late:
    """Messages that are complete no sooner than a time."""

    def __init__(self, work, clock, at):
        self.work, self.clock, self.at = work, clock, at

    def wait(self):
        self.clock.until(self.at)
        return self.work.wait()


def seconds_of(rank):
    """A step without and with a delay of every message, where the rows of a rank take longer than that."""
    manager = initialize_domain_parallel(2, 2)
    manager.declare(RowPartition((8, 8)))
    net = convert_to_domain_parallel(chain(LAYERS), manager)
    x = torch.randn(1, 4, 8, 6, requires_grad=True)
    batch, convolve, gradients = dist.batch_isend_irecv, torch.convolution, overlap._gradients
    clock, delays = Clock(), [0.0]

    def late(batched):
        return [Late(work, clock, clock.now + delays[-1]) for work in batch(batched)]

    def slow(method, rows):
        def call(first, *args):
            if first.shape[2] == rows:  # not a border
                clock.now += WORK
            return method(first, *args)

        return call

    def step():
        start = clock.now
        out = net(x)
        out.backward(torch.ones_like(out))
        return clock.now - start

    with (
        mock.patch.object(dist, "batch_isend_irecv", late),
        mock.patch.object(torch, "convolution", slow(convolve, 8)),
        mock.patch.object(overlap, "_gradients", slow(gradients, 8)),
    ):
        found = []
        for delay in (0.0, DELAY):
            delays.append(delay)
            found.append(step())
    return found


def test_delays_are_hidden_behind_the_computation():
    injected = 2 * LAYERS * DELAY
    for prompt, delayed in run_processes(seconds_of, 2):
        assert prompt == pytest.approx(2 * LAYERS * WORK)
        assert delayed - prompt < injected / 4
