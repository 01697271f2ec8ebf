"""A partitioned model is still the model: names, parameters, hooks, modes, shapes; what cannot be traced is refused."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from domain_partitioned import check_partitioned
from partition_cases import Net
from torch import Tensor, nn

from credit_domain import _torch_private, initialize_domain_parallel, partition_model, partition_report
from credit_domain.partitioner import capture
from credit_domain.partitioner.rules import RULES
from credit_halo.testing import RankError, run_processes, run_threads
from credit_mesh import RowPartition


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + self.drop(self.act(self.conv(x))) * scale


class Model(nn.Module):
    """A block that is used twice, one that is used once, tied weights, and a module that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = Block(), Block()
        self.nothing = nn.Identity()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        x = self.once(self.nothing(self.twice(self.twice(x), scale)))
        y = self.second(torch.tanh(self.first(x.movedim(1, -1)))).movedim(-1, 1)
        return {"y": y, "height": x.shape[-2], "none": None}


def on_one_rank(test: Callable[..., None]) -> Callable[[], None]:
    """Run a test on a rank that is alone."""

    def alone() -> None:
        run_threads(lambda rank: test(initialize_domain_parallel(1, 1)), 1)

    alone.__name__, alone.__doc__ = test.__name__, test.__doc__
    return alone


@on_one_rank
def test_names_parameters_hooks_and_classes_stay(manager) -> None:
    model, calls = Model().double().eval(), []
    names, parameters = list(model.state_dict()), list(model.parameters())
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    whole = randn(1, 4, 10, 6)
    wanted = model(whole, scale=0.5)
    idle = ("nothing", "drop")  # what does nothing is not called; whether a dropout does depends on the torch
    before, calls[:] = [name for name in calls if not name.endswith(idle)], []
    made = partition_model(model, {"x": whole, "scale": 0.5}, manager)
    assert made is model
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model, Model)
    assert isinstance(model.once, Block)
    assert type(model.once).__name__ == "Block"
    out = model(x=whole, scale=0.5)
    assert [name for name in calls if not name.endswith(idle)] == before, (
        "each module's hooks run as often, in the same order"
    )
    assert torch.equal(out["y"], wanted["y"])
    assert (out["height"], out["none"]) == (10, None)
    with torch.no_grad():
        model.once.conv.weight.mul_(2)
    assert not torch.equal(model(x=whole, scale=0.5)["y"], wanted["y"])
    with pytest.raises(ValueError, match="partitioned already"):
        partition_model(model, whole, manager)


def test_another_batch_height_or_mode_is_traced_by_itself() -> None:
    torch.manual_seed(0)
    plain = Net().double()

    def rank_main(rank: int) -> list[Any]:
        manager = initialize_domain_parallel(2, 2)
        model = partition_model(copy.deepcopy(plain), (2, 4, 12, 16), manager)
        outs = []
        for batch, sizes, training in ((2, (6, 6), True), (1, (5, 7), True), (1, (4, 6), False), (2, (6, 6), True)):
            partition = RowPartition(sizes)
            manager.declare(partition)
            model.train(training)
            own = partition.interval(rank)
            outs.append(model(randn(batch, 4, sum(sizes), 16)[:, :, own.start : own.stop]))
        assert len(model._partition.traces) == 3
        return [*outs, model.first[1].running_var.clone()]

    first, second = run_threads(rank_main, 2)
    for at, (batch, rows, training) in enumerate(((2, 12, True), (1, 12, True), (1, 10, False), (2, 12, True))):
        wanted = plain.train(training)(randn(batch, 4, rows, 16))
        torch.testing.assert_close(torch.cat([first[at], second[at]], -2), wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first[-1], plain.first[1].running_var, rtol=1e-9, atol=1e-10)


@on_one_rank
def test_a_copy_is_on_its_own(manager) -> None:
    model = partition_model(Net().double(), (1, 4, 12, 16), manager)
    other, whole = copy.deepcopy(model), randn(1, 4, 12, 16)
    before = model(whole)
    with torch.no_grad():
        other.down.weight.zero_()
    assert torch.equal(model.eval()(whole), model(whole))
    assert not torch.allclose(other(whole), before)


def test_windows_set_the_granularity() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 4, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(x)
            t = x.view(2, 4, 6, 4, 8).permute(0, 2, 1, 3, 4).reshape(12, -1)
            return t.softmax(-1).view(2, 6, 4, 4, 8).permute(0, 2, 1, 3, 4).reshape(x.shape)

    def rank_main(rank: int) -> tuple[Any, ...]:
        manager = initialize_domain_parallel(4, 4)
        model = partition_model(Windows(), (2, 4, 48, 16), manager)
        free = manager.granularity, [move.kind for move in partition_report(model).moves]
        manager.granularity = 1
        manager.declare(RowPartition((10, 14, 12, 12)))
        model = partition_model(Windows(), (2, 4, 48, 16), manager)
        return *free, manager.granularity, partition_report(model).granularity, len(partition_report(model).moves)

    granularity, moves, kept, wanted, number = run_threads(rank_main, 4)[0]
    assert (granularity, moves) == (8, []), "windows of 4 rows behind a stride of 2"
    assert (kept, wanted) == (1, 8), "what is declared stays"
    assert number > 0


def test_a_big_model_needs_no_memory() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Conv2d(4096, 4096, 3, padding=1) for _ in range(8)])  # 1.2 G parameters

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) + self.layers[0].bias.mean()

    def rank_main(rank: int) -> tuple[int, int]:
        with torch.device("meta"):
            model = Big()
        partition_model(model, torch.empty(1, 4096, 721, 1440, device="meta"), initialize_domain_parallel(2, 2))
        report = partition_report(model)
        return sum(move.kind == "halo" for move in report.moves), len(report.gathered)

    assert run_threads(rank_main, 2) == [(8, 0)] * 2


def draws_as_one_rank(rank: int, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.drop, self.channels = nn.Dropout(0.3), nn.Dropout2d(0.3)
            self.attention = nn.MultiheadAttention(4, 4, batch_first=True, dropout=0.2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.channels(self.drop(self.conv(x))) + torch.randn_like(x) * 0.1
            y = y * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5) + torch.rand(x.shape[-2], 1)
            t = y.flatten(2).transpose(1, 2)
            return y + self.attention(t, t, t, need_weights=False)[0].transpose(1, 2).reshape(x.shape)

    torch.manual_seed(0)
    plain, whole = Noisy().double(), randn(2, 4, 12, 16).requires_grad_()
    torch.manual_seed(5)
    out = plain(whole)
    factor = randn(*out.shape, seed=1)
    (out * factor).sum().backward()
    manager, partition = initialize_domain_parallel(len(sizes), len(sizes)), RowPartition(sizes)
    manager.declare(partition)
    model = partition_model(copy.deepcopy(plain), whole.detach(), manager)
    rows = slice(partition.interval(rank).start, partition.interval(rank).stop)
    part = whole.detach()[:, :, rows].clone().requires_grad_()
    torch.manual_seed(5)
    made = model(part)
    (made * factor[:, :, rows]).sum().backward()
    torch.testing.assert_close(made, out[:, :, rows], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(part.grad, whole.grad[:, :, rows], rtol=1e-9, atol=1e-10)
    torch.manual_seed(rank)
    with pytest.raises(ValueError, match="seed all ranks of the domain alike"):
        model(part)


def test_random_numbers_are_those_of_one_rank() -> None:
    run_processes(draws_as_one_rank, 3, (5, 3, 4), fork=True)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize(
    ("kind", "message"), [(Branches, "Branches cannot be traced"), (Masked, "Masked cannot be traced")]
)
def test_what_depends_on_data_is_refused(kind: type[nn.Module], message: str) -> None:
    def rank_main(rank: int) -> None:
        model = kind()
        before = type(model)
        try:
            partition_model(model, (1, 4, 12, 16), initialize_domain_parallel(2, 2))
        finally:
            assert type(model) is before
            assert "_partition" not in vars(model)

    with pytest.raises(RankError, match=message) as caught:
        run_threads(rank_main, 2)
    assert all(isinstance(error, ValueError) for error in caught.value.errors.values())


@on_one_rank
def test_no_rows_is_refused(manager) -> None:
    with pytest.raises(ValueError, match="three dims or more"):
        partition_model(nn.Linear(3, 3), (4, 3), manager)


def test_a_report_says_what_is_gathered_and_where() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Odder()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    class Odder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tril(x)

    report = check_partitioned(nn.Sequential(nn.Conv2d(4, 4, 1), Odd()).double(), [randn(1, 4, 12, 16)], (5, 7))
    (gathered,), (repeated,) = report.gathered, report.repeated
    assert (gathered.operation, gathered.module) == ("aten.tril.default", "1.inner")
    assert (gathered.bytes, gathered.total_bytes, gathered.messages) == (4 * 7 * 16 * 8, 4 * 12 * 16 * 8, 1)
    assert "test_domain_partition_model.py" in gathered.line
    assert repeated.entries == repeated.flops == report.repeated_flops == 4 * 12 * 16
    assert report.flops == 2 * 4 * 4 * 12 * 16 + 4 * 12 * 16
    assert "11 % of the arithmetic" in str(report)
    assert "gathers  1.inner: aten.tril.default" in str(report)
    assert "repeats  1.inner: aten.tril.default" in str(report)


def test_a_report_says_how_much_every_rank_repeats() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.into = nn.Linear(6, 32), nn.Linear(4, 4)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            x = self.into(x.mT)  # columns are tokens, divided rows are channels: a sum over ranks
            scale = self.embed(time).sum()
            return F.scaled_dot_product_attention(x, x, x).mT * scale

    rows = randn(2, 3, 4, 10)
    report = check_partitioned(Timed().double(), [rows, randn(5, 6, seed=1)], (1, 3))
    embedding = 2 * 5 * 6 * 32 + 1
    products = 2 * 2 * 3 * 10 * 4 * 4 + 2 * 2 * 3 * 10 * 10 * (4 + 4)
    assert report.flops == embedding + products + rows.numel()
    assert report.repeated_flops == embedding
    assert report.repeated_share == embedding / report.flops
    assert not report.repeated


def test_a_trace_within_autocast_or_no_grad_is_that_of_the_model() -> None:
    torch.manual_seed(0)
    plain = Net().eval()

    def rank_main(rank: int) -> list[Tensor]:
        manager = initialize_domain_parallel(2, 2)
        model = partition_model(copy.deepcopy(plain), (2, 4, 12, 16), manager)
        manager.declare(RowPartition((5, 5)))
        part = randn(1, 4, 10, 16).float()[:, :, 5 * rank : 5 * rank + 5]
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            cast = model(part)
        leaf = part.clone().requires_grad_()
        out = model(leaf)
        assert out.requires_grad
        return [cast, out.detach()]

    whole = randn(1, 4, 10, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cast = plain(whole)
    for at, wanted, close in ((0, cast, 0.05), (1, plain(whole).detach(), 1e-5)):
        made = torch.cat([outs[at] for outs in run_threads(rank_main, 2)], -2)
        assert made.dtype == wanted.dtype
        torch.testing.assert_close(made, wanted, rtol=close, atol=close)


def test_a_rule_that_fails_names_the_operator_on_all_ranks() -> None:
    def broken(*args: Any) -> None:
        raise KeyError("odd")

    def rank_main(rank: int) -> None:
        partition_model(nn.Sequential(nn.Conv2d(4, 4, 1)), (1, 4, 12, 16), initialize_domain_parallel(2, 2))

    with mock.patch.dict(RULES, {torch.ops.aten.conv2d.default: broken}), pytest.raises(RankError) as caught:
        run_threads(rank_main, 2)
    for error in caught.value.errors.values():
        assert isinstance(error, ValueError)
        assert "aten.conv2d.default in 0" in str(error)
        assert "could not be divided: KeyError" in str(error)


def test_gradients_stop_where_the_model_stops_them() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                frozen = self.a(x) * x.mean()
            return self.b(x) * frozen + self.a(x).detach() + F.relu(self.a(x), inplace=True)

    torch.manual_seed(0)
    check_partitioned(Stops().double(), [randn(1, 4, 12, 16)], (5, 3, 4))


def test_ranks_that_are_threads_trace_one_at_a_time():
    """Fake tensors change what all threads of a process see; two at once ended the process on some builds of torch."""
    inside: list[int] = []
    most: list[int] = []

    class Watched(type(capture.fake_mode())):  # type: ignore[misc]
        def __enter__(self) -> Any:
            inside.append(threading.get_ident())
            most.append(len(set(inside)))
            time.sleep(0.001)
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            inside.remove(threading.get_ident())
            return super().__exit__(*error)

    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(3, 3)
        partition_model(nn.Sequential(Block(), Block()), (1, 4, 12, 6), manager)

    with mock.patch.object(capture, "fake_mode", side_effect=lambda: Watched(allow_non_fake_inputs=True)):
        run_threads(rank_main, 3)
    assert len(most) > 3
    assert max(most) == 1


@pytest.mark.parametrize("by_rank", [False, True])
def test_a_thread_that_stays_is_the_first_that_traces(by_rank):
    """Torch built for CUDA reads a part of that thread's memory ever after, where there is no device."""
    first: list[threading.Thread] = []

    def enter() -> None:
        with mock.patch.object(_torch_private, "_first", []), capture.fake_mode():
            first.extend(_torch_private._first)

    with mock.patch.object(torch.version, "cuda", "13.0"):
        if by_rank:
            rank = threading.Thread(target=enter)
            rank.start()
            rank.join()
        else:
            enter()
    assert first[0].is_alive()
    assert (first[0] is threading.main_thread()) == (not by_rank)
