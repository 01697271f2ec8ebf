"""Convolutions that read one tensor: exact, and one exchange for all of them."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from domain_models import MultiKernelEmbedding
from domain_reference import partitions, randn, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import credit_domain
from credit_domain.layers import DomainParallelConv2d, DomainParallelConvTranspose2d, DomainParallelCrossEmbedBranch
from credit_halo.extend import ops
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

THREE = RowPartition((16, 8, 12), 4)


class Readers(nn.Module):
    """Convolutions of one tensor, of which some may be left out or come in another order; a list of what comes out."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, order=None):
        return [self.layers[i](x) for i in (range(len(self.layers)) if order is None else order)]


def embedding(channels=2):
    return Readers(*(nn.Conv2d(channels, 3, k, 4, (k - 4) // 2) for k in (8, 4, 12))).double()


@contextmanager
def exchanges():
    """The exchanges of this process that are begun meanwhile: True for those of a backward."""
    found, begin = [], ops.begin

    def count(*args, adjoint=False, **kwargs):
        found.append(adjoint)
        return begin(*args, adjoint=adjoint, **kwargs)

    with mock.patch.object(ops, "begin", count):
        yield found


def step(net, x, weigh, *args):
    """Outputs of a step, and the gradients of the input and of the parameters that take part."""
    outs = net(x, *args)
    wanted = [t for t in (x, *net.parameters()) if t.requires_grad]
    loss = sum((out * weigh(i, out)).sum() for i, out in enumerate(outs))
    return outs, torch.autograd.grad(loss, wanted, allow_unused=True)


def weights(i, out, rank=0, ranks=1):
    """Fixed random numbers for this rank's rows of an output."""
    sizes = [torch.tensor(out.shape[-2]) for _ in range(ranks)]
    if ranks > 1:
        dist.all_gather(sizes, torch.tensor(out.shape[-2]))
    rows = torch.stack(sizes).tolist()
    whole = randn(*out.shape[:-2], sum(rows), out.shape[-1], seed=10 + i).to(out.dtype)
    return whole.narrow(-2, sum(rows[:rank]), rows[rank])


def by_layer(net, manager):
    """Convert layers on their own, which asks nothing of the partition."""
    kinds = {
        nn.Conv2d: DomainParallelConv2d,
        nn.ConvTranspose2d: DomainParallelConvTranspose2d,
        nn.Sequential: DomainParallelCrossEmbedBranch,
    }
    return Readers(*(kinds[type(layer)](layer, manager=manager) for layer in net.layers))


def convert_to_domain_parallel(model, manager):
    """Without the trial, whose exchanges would be counted too."""
    return credit_domain.convert_to_domain_parallel(model, manager, check=False)


def check(net, whole, partition, calls=((),) * 3, step=step, convert=convert_to_domain_parallel):
    """Compare steps on ranks with those of one rank.

    Args:
        net: The whole net, in float64.
        whole: Its input, in all steps.
        partition: How its rows are divided.
        calls: Further arguments of the net, for each step.
        step: What a step does.
        convert: How the net is converted.

    Returns:
        Exchanges of all ranks in each step, forward and backward.
    """
    x = whole.clone().requires_grad_()
    expected = [step(net, x, weights, *args) for args in calls]
    counts = []

    def rank_main(rank):
        ranks = partition.ranks
        manager = initialize_domain_parallel(ranks, ranks)
        manager.declare(partition)
        mine = convert(copy.deepcopy(net), manager)
        part = shard(whole, partition, rank).clone().requires_grad_()
        found = []
        for args in calls:
            found.append(step(mine, part, lambda i, out: weights(i, out, rank, ranks), *args))
            dist.barrier()
            if rank == 0:
                counts.append((begun.count(False), begun.count(True)))
                begun.clear()
            dist.barrier()
        return found

    with exchanges() as begun:
        results = run_threads(rank_main, partition.ranks)
    for i, (outs, (d_x, *d_parameters)) in enumerate(expected):
        for j, out in enumerate(outs):
            torch.testing.assert_close(torch.cat([result[i][0][j] for result in results], -2), out)
        torch.testing.assert_close(torch.cat([result[i][1][0] for result in results], -2), d_x)
        for j, wanted in enumerate(d_parameters, 1):
            if wanted is not None:
                torch.testing.assert_close(sum(result[i][1][j] for result in results), wanted)
    return counts


def test_one_message_for_all_kernels():
    sent = run_processes(messages_of, 3)
    row = 2 * 6 * 8  # bytes
    for rank, (first, forward, backward) in enumerate(sent):
        peers = [peer for peer in (rank - 1, rank + 1) if 0 <= peer < 3]
        assert sorted(forward) == sorted(("isend", peer, 4 * row) for peer in peers)  # the widest: kernel 12
        assert sorted(backward) == sorted(forward)
        assert len(first) == 2 * len(peers)  # kernels 8 and 12; 4 rows at a time reach nobody


def messages_of(rank):
    manager = initialize_domain_parallel(3, 3)
    manager.declare(THREE)
    torch.manual_seed(0)
    net = convert_to_domain_parallel(embedding(), manager)
    x = torch.randn(1, 2, THREE.sizes[rank], 6, dtype=torch.float64).requires_grad_()
    found, batch = [[]], dist.batch_isend_irecv

    def record(batched):
        found[-1].extend((o.op.__name__, o.group_peer, o.tensor.numel()) for o in batched if o.op is dist.isend)
        return batch(batched)

    with mock.patch.object(dist, "batch_isend_irecv", record):
        sum(out.square().sum() for out in net(x))
        found.append([])
        loss = sum(out.square().sum() for out in net(x))
        found.append([])
        loss.backward()
    return found


def test_all_kernels_are_exact_and_share_from_the_second_step_on():
    assert check(embedding(), randn(2, 2, 36, 6), THREE) == [(6, 6), (3, 3), (3, 3)]


def test_a_net_with_an_embedding():
    net = MultiKernelEmbedding().double().eval()
    counts = check(Readers(net), randn(1, 3, 60, 16), RowPartition((24, 16, 20), 4))
    assert counts[1] == counts[2]
    assert counts[0][0] - counts[1][0] == counts[0][1] - counts[1][1] == 3  # kernels 8 and 16 on three ranks


def test_branches_that_pad_first():
    def branch(kernel, above, below):
        return nn.Sequential(nn.ZeroPad2d((1, 1, above, below)), nn.Conv2d(2, 3, (kernel, 3), (4, 1)))

    net = Readers(branch(4, 0, 0), branch(8, 2, 2), branch(12, 4, 4)).double()
    assert check(net, randn(1, 2, 36, 8), THREE, convert=by_layer) == [(6, 6), (3, 3), (3, 3)]


def test_layers_that_do_not_come_are_not_waited_for():
    orders = [[0, 1, 2], [0, 2], [0], [0], [2, 1, 0], [2, 0, 2], [1, 0, 2], [0, 1, 2], [0, 1, 2]]
    counts = check(embedding(), randn(1, 2, 36, 6), THREE, [(order,) for order in orders])
    assert counts[-1] == (3, 3)


def rows_sent(rank):
    manager = initialize_domain_parallel(3, 3)
    manager.declare(THREE)
    net = convert_to_domain_parallel(embedding(), manager)
    x = randn(1, 2, THREE.sizes[rank], 6)
    sent = []
    for order in [[0, 2], [0, 2], [0], [0]]:
        with mock.patch.object(ops, "start", wraps=ops.start) as start:
            net(x, order)
        sent.append([call.args[2].sent_rows for call in start.call_args_list])
    return sent


def test_rows_that_nobody_comes_for_are_not_brought_again():
    assert run_processes(rows_sent, 3)[1] == [[4, 8], [8], [8], [4]]


def test_another_tensor_is_read_for_itself():
    class Sometimes(Readers):
        def forward(self, x, same):
            return [self.layers[0](x), self.layers[2](x if same else x * 2.0)]

    counts = check(Sometimes(*embedding().layers), randn(1, 2, 36, 6), THREE, [(True,), (True,), (False,), (True,)])
    assert counts == [(6, 6), (3, 3), (6, 6), (6, 6)]


def test_a_layer_that_reads_farther_than_before():
    class Dilated(Readers):
        def forward(self, x, dilation):
            second = self.layers[1]
            second = getattr(second, "wrapped", second)
            second.padding = second.dilation = (dilation, 1)
            return super().forward(x)

    layers = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
    counts = check(Dilated(*layers).double(), randn(1, 2, 36, 6), THREE, [(1,), (1,), (3,), (3,)])
    assert counts == [(6, 6), (3, 3), (6, 6), (3, 3)]


@settings(max_examples=60)
@given(st.data(), partitions(st.integers(20, 60), most=4))
def test_any_readers(data, partition):
    draw = data.draw
    layers = []
    for _ in range(draw(st.integers(2, 4))):
        kernel, stride, dilation = draw(st.integers(1, 7)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        padding = draw(st.integers(0, dilation * (kernel - 1) // 2 + 1))
        arguments = {"kernel_size": (kernel, 1), "stride": (stride, 1), "dilation": (dilation, 1)}
        if draw(st.booleans()):
            layers.append(nn.Conv2d(1, 1, padding=(padding, 0), padding_mode=draw(MODES), **arguments))
        else:
            padding = min(padding, dilation * (kernel - 1) // 2)
            layers.append(nn.ConvTranspose2d(1, 1, padding=(padding, 0), **arguments))
    orders = draw(st.lists(st.permutations(range(len(layers))), min_size=2, max_size=3))
    net, calls = Readers(*layers).double(), [(order,) for order in orders]
    counts = check(net, randn(1, 1, partition.rows, 2), partition, calls, convert=by_layer)
    assert all(later <= counts[0] for later in counts)
    assert all(forward % partition.ranks == 0 for forward, _ in counts)


MODES = st.sampled_from(["zeros", "zeros", "reflect", "circular"])


def test_a_tensor_that_has_changed_is_another_one():
    class Changing(Readers):
        def forward(self, x):
            y = x * 1.0
            first = self.layers[0](y)
            return [first.detach(), self.layers[2](y.mul_(2.0))]

    def forward(net, x, weigh):
        with torch.no_grad():
            outs = net(x)
        return outs, [x.detach()]

    assert check(Changing(*embedding().layers), randn(1, 2, 36, 6), THREE, step=forward) == [(6, 0)] * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """The first step recomputes with one exchange what it computed with two."""

    def recomputed(net, x, weigh):
        outs = checkpoint(lambda x: tuple(net(x)), x, use_reentrant=reentrant)
        net.zero_grad()
        x.grad = None
        sum((out * weigh(i, out)).sum() for i, out in enumerate(outs)).backward()
        return outs, [x.grad.clone(), *(p.grad.clone() for p in net.parameters())]

    check(embedding(), randn(1, 2, 36, 6), THREE, step=recomputed)


def test_gradients_of_gradients():
    def twice(net, x, weigh):
        outs = net(x)
        loss = sum((out.pow(3) * weigh(i, out)).sum() for i, out in enumerate(outs))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return outs, torch.autograd.grad(first.square().sum(), [x, *net.parameters()], allow_unused=True)

    check(embedding(), randn(1, 2, 36, 6), THREE, step=twice)


@pytest.mark.parametrize("used", [[0], [2], [1], []])
def test_outputs_that_nobody_uses(used):
    class Some(Readers):
        def forward(self, x):
            outs = super().forward(x)
            return [outs[i] for i in used] + [x * 2]

    check(Some(*embedding().layers), randn(1, 2, 36, 6), THREE)


@pytest.mark.parametrize("without", [0, 2])
def test_layers_without_gradient_do_not_share_with_others(without):
    class Partly(Readers):
        def forward(self, x):
            outs = []
            for i in (0, 2):
                with torch.set_grad_enabled(i != without):
                    outs.append(self.layers[i](x))
            return [outs[1 - without // 2]]

    assert check(Partly(*embedding().layers), randn(1, 2, 36, 6), THREE) == [(6, 3)] * 3


def test_an_input_without_gradient_is_shared_too():
    def forward(net, x, weigh):
        x = x.detach()
        outs = net(x)
        loss = sum((out * weigh(i, out)).sum() for i, out in enumerate(outs))
        return outs, [x, *torch.autograd.grad(loss, list(net.parameters()))]

    counts = check(embedding(), randn(1, 2, 36, 6), THREE, step=forward)
    assert counts == [(6, 0), (3, 0), (3, 0)]


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_kept_alive(backward):
    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(THREE)
        net = convert_to_domain_parallel(embedding(), manager)
        alive = []
        for _ in range(2):
            x = randn(1, 2, THREE.sizes[rank], 6).requires_grad_() * 1.0
            outs = net(x)
            if backward:
                sum(out.sum() for out in outs).backward()
            alive.append(weakref.ref(x))
            del x, outs
        gc.collect()
        return [each() is not None for each in alive]

    assert run_threads(rank_main, 3) == [[False, False]] * 3


class Branches(nn.Module):
    """Code of its own, which may call any of its children with any tensor."""

    def __init__(self, *children):
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


def conv():
    return nn.Conv2d(2, 2, 3, padding=1)


@pytest.mark.parametrize(
    ("make", "shares"),
    [
        (lambda: nn.Sequential(conv(), nn.ReLU(), conv()), [False, False]),
        (lambda: Branches(conv()), [False]),
        (lambda: Branches(conv(), conv()), [True, True]),
        (lambda: nn.Sequential(conv(), Branches(conv(), nn.Sequential(conv(), conv()))), [False, True, True, False]),
        (lambda: Branches(nn.Sequential(nn.Identity(), conv()), Branches(conv())), [True, True]),
        (lambda: nn.Sequential(nn.Dropout(0.0), Branches(conv(), conv()), conv()), [True, True, False]),
    ],
)
def test_the_converter_sees_who_reads_alone(make, shares):
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        model = convert_to_domain_parallel(make(), manager)
        return [m.may_share for m in model.modules() if isinstance(m, credit_domain.layers.DomainParallelConv2d)]

    assert run_threads(rank_main, 2) == [shares] * 2
