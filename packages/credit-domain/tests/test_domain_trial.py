"""A converted model is tried before it trains: what its own code does with rows is exact, or refused by name."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
import torch.nn.functional as F
from domain_models import Block, PeriodicConv2d, PeriodicResidualNet, UNet
from torch import nn
from torch.utils.checkpoint import checkpoint
from trial_models import COLUMNS, FAULTS, ROWS, Net, PoolByHand, whole_input

import credit_domain.functional as CF
from credit_domain import convert_to_domain_parallel, initialize_domain_parallel, shard_tensor
from credit_halo.testing import RankError, run_processes, run_threads


def convert_and_call(model, ranks, x, call=True, **settings):
    """What each rank gets from the converted model."""

    def rank_main(rank):
        manager = initialize_domain_parallel(ranks, ranks)
        twin = convert_to_domain_parallel(copy.deepcopy(model), manager, **settings)
        return twin(shard_tensor(x, -2, manager)).detach() if call else None

    return run_threads(rank_main, ranks)


def refusals(error):
    return {str(each) for each in error.value.errors.values() if isinstance(each, ValueError)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("make", FAULTS)
def test_what_mixes_rows_in_a_forward_is_refused_by_name(make, ranks):
    """At its first call, on every rank alike, in single precision, with the weights of a fresh model."""
    with pytest.raises(RankError) as error:
        convert_and_call(Net(make()), ranks, whole_input())
    (message,) = refusals(error)
    assert f"middle ({make.__name__})" in message
    assert "check=False" in message


@pytest.mark.parametrize("make", FAULTS)
def test_with_a_shape_it_is_refused_when_it_is_converted_and_stays_as_it_was(make):
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        model = Net(make())
        before = [type(part) for part in model.modules()]
        with pytest.raises(ValueError, match=r"middle \("):
            convert_to_domain_parallel(model, manager, input_shape=(1, 3, ROWS, COLUMNS), method="modules")
        assert [type(part) for part in model.modules()] == before
        assert not hasattr(model, "_domain_parallel_report")
        assert manager.partition is None
        assert manager.granularity == 1

    run_threads(rank_main, 2)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("make", "channels"), [(lambda: Net(Block(4, 4)), 3), (UNet, 3), (PeriodicResidualNet, 3)])
def test_what_is_right_passes_and_nothing_of_it_changes(make, channels, given):
    """Neither weights, nor buffers, nor gradients, nor the generator of random numbers."""
    torch.manual_seed(0)
    model, x = make(), whole_input(channels)
    settings = {"input_shape": tuple(x.shape)} if given else {}
    expected = model(x).detach()
    parts = convert_and_call(model, 2, x, **settings)
    assert torch.allclose(torch.cat(parts, -2), expected, atol=1e-5)

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = convert_to_domain_parallel(copy.deepcopy(model), manager, **settings)
        manager.declare(ROWS)
        before = {name: value.clone() for name, value in twin.state_dict().items()}
        twin.eval()
        with torch.no_grad():
            twin(shard_tensor(x, -2, manager))
        assert manager.partition.rows == ROWS
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
        assert all(p.grad is None for p in twin.parameters())

    run_threads(rank_main, 2)


def test_the_trial_is_made_once(caplog):
    x = whole_input()

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = convert_to_domain_parallel(Net(Block(4, 4)), manager)
        for _ in range(3):
            twin(shard_tensor(x, -2, manager))

    with caplog.at_level(logging.INFO, "credit_domain"):
        run_threads(rank_main, 2)
    assert sum("gives the numbers of one rank" in record.message for record in caplog.records) == 2  # once a rank


def test_a_refused_model_is_refused_again():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = convert_to_domain_parallel(Net(PoolByHand()), manager)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"middle \(PoolByHand\)"):
                twin(shard_tensor(whole_input(), -2, manager))

    run_threads(rank_main, 2)


def test_it_can_be_switched_off():
    parts = convert_and_call(Net(PoolByHand()), 2, whole_input(), check=False)
    assert [part.shape[-2] for part in parts] == [12, 12]


def test_layers_of_torch_alone_need_no_trial(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU())
    with caplog.at_level(logging.INFO, "credit_domain"):
        convert_and_call(model, 2, whole_input())
    assert not any("tried" in record.message for record in caplog.records)


class Counted(nn.Module):
    """Attention outside of torch's layers, with the sharded function where there are ranks."""

    def forward(self, x):
        return x - CF.mean(x, (-2, -1), keepdim=True)


def test_functions_of_the_package_are_right():
    x = whole_input()
    expected = None
    model = Net(Counted())
    expected = model(x).detach()
    assert torch.allclose(torch.cat(convert_and_call(model, 3, x), -2), expected, atol=1e-5)


class Forced(nn.Module):
    """Several inputs, nested, one of them without rows."""

    def __init__(self, wrong):
        super().__init__()
        self.conv, self.time, self.wrong = nn.Conv2d(5, 4, 3, padding=1), nn.Linear(7, 4), wrong

    def forward(self, fields, *, when):
        x = torch.cat([fields["x"], fields["forcing"][0]], 1)
        y = self.conv(x) + self.time(when)[:, :, None, None]
        return {"y": y - y.mean((-2, -1), keepdim=True)} if self.wrong else {"y": y}


@pytest.mark.parametrize("wrong", [False, True])
def test_several_inputs(wrong):
    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        twin = convert_to_domain_parallel(Forced(wrong), manager)
        x, forcing = whole_input(), whole_input(2)
        fields = {"x": shard_tensor(x, -2, manager), "forcing": [shard_tensor(forcing, -2, manager)]}
        if not wrong:
            assert twin(fields, when=torch.ones(2, 7))["y"].shape == (2, 4, 8, COLUMNS)
            return
        with pytest.raises(ValueError, match=r"the model itself \(Forced\)"):
            twin(fields, when=torch.ones(2, 7))

    run_threads(rank_main, 3)


class OfItsGrid(nn.Module):
    """Takes no other height than its own, of all rows."""

    def __init__(self, wrong=False):
        super().__init__()
        self.conv, self.wrong = nn.Conv2d(3, 3, 3, padding=1), wrong
        self.register_buffer("lat", torch.linspace(-1, 1, ROWS, dtype=torch.float64))

    def forward(self, x):
        manager = getattr(self, "_domain_parallel_manager", None)
        lat = self.lat.to(x)
        if manager is not None and x.shape[-2] != ROWS and not self.wrong:
            own = manager.partition.interval(manager.domain_rank)
            lat = lat[own.start : own.stop]
        if self.wrong:
            lat = lat[: x.shape[-2]]
        return self.conv(x) * lat[:, None]


def test_a_model_of_one_height_is_tried_at_that_height():
    with pytest.raises(RankError) as error:
        convert_and_call(OfItsGrid(wrong=True), 2, whole_input())
    assert "OfItsGrid" in refusals(error).pop()


class Switched(nn.Module):
    """Pads by itself unless it is told that the whole was padded before."""

    def __init__(self):
        super().__init__()
        self.conv, self.skip = nn.Conv2d(3, 3, (3, 1)), False

    def forward(self, x):
        return self.conv(x if self.skip else F.pad(x, (0, 0, 1, 1), mode="replicate"))


def test_switches_are_those_of_the_first_call():
    x = whole_input()

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = convert_to_domain_parallel(Switched(), manager)
        with pytest.raises(ValueError, match="Switched"):
            twin(shard_tensor(x, -2, manager))
        twin.skip = True
        return twin(shard_tensor(x, -2, manager)).shape[-2]

    assert sum(run_threads(rank_main, 2)) == ROWS - 2


def test_it_holds_inside_a_checkpoint_and_without_gradients():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        x = shard_tensor(whole_input(), -2, manager).requires_grad_()
        twin = convert_to_domain_parallel(Net(Block(4, 4)), manager)
        checkpoint(twin, x, use_reentrant=False).sum().backward()
        assert x.grad is not None
        twin = convert_to_domain_parallel(Net(PoolByHand()), manager)
        with torch.inference_mode(), pytest.raises(ValueError, match="PoolByHand"):
            twin(x.detach())

    run_threads(rank_main, 2)


class LostGradient(nn.Module):
    """Its forward is right; its gradient is that of this rank's rows alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        mean = CF.mean(x, (-2, -1), keepdim=True)
        return self.scale * (x - (mean.detach() if _sharded() else mean))


def _sharded():
    from credit_mesh import get_domain_parallel_manager

    return get_domain_parallel_manager() is not None


def test_a_lost_gradient_is_found():
    with pytest.raises(RankError) as error:
        convert_and_call(Net(LostGradient()), 3, whole_input())
    assert "gradient" in refusals(error).pop()


def test_a_model_that_cannot_be_copied_is_said(caplog):
    class Uncopied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def __deepcopy__(self, memo):
            raise TypeError("it holds a file")

        def forward(self, x):
            return self.conv(x)

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        convert_to_domain_parallel(Uncopied(), manager)

    with caplog.at_level(logging.WARNING, "credit_domain"):
        run_threads(rank_main, 2)
    assert any("could not be tried" in r.message and "it holds a file" in r.message for r in caplog.records)


def compiled_shapes(rank, right, given):
    manager = initialize_domain_parallel(2, 2)
    x = shard_tensor(whole_input(), -2, manager)
    settings = {"input_shape": (2, 3, ROWS, COLUMNS)} if given else {}
    twin = convert_to_domain_parallel(Net(Block(4, 4) if right else PoolByHand()), manager, **settings)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    return [compiled(x).shape[-2] for _ in range(2)]


@pytest.mark.slow
def test_compiled_models_are_tried_while_they_are_traced():
    """Also where the first call is a compiled one, as one graph."""
    assert run_processes(compiled_shapes, 2, True, False) == [[12, 12]] * 2
    assert run_processes(compiled_shapes, 2, True, True) == [[12, 12]] * 2
    with pytest.raises(RankError, match=r"middle \(PoolByHand\)"):
        run_processes(compiled_shapes, 2, False, False)


def test_a_known_family_that_is_something_else_is_left_to_the_rules():
    """It has the parts of a periodic convolution, and shifts longitude as well: exact by itself."""

    class Shifted(PeriodicConv2d):
        def forward(self, x):
            return torch.roll(super().forward(x), 1, -1)

    model = nn.Sequential(Shifted(3, 4))
    with pytest.raises(RankError) as error:
        convert_and_call(model, 2, whole_input())
    assert "0 (Shifted)" in refusals(error).pop()


def test_a_part_that_was_converted_before():
    """Its layers know their manager, and it still waits for its own trial."""

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        inner = convert_to_domain_parallel(Net(Block(4, 4)), manager)
        twin = convert_to_domain_parallel(nn.Sequential(inner, nn.Conv2d(2, 2, 3, padding=1)), manager)
        return twin(shard_tensor(whole_input(), -2, manager)).shape[-2]

    assert run_threads(rank_main, 2) == [12, 12]


class Closure(nn.Module):
    """Holds a function that a copy shares with it."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.ones(()))
        self.act = lambda y: y * self.scale

    def forward(self, x):
        return self.act(self.conv(x))


def test_gradients_and_generators_are_left_alone():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = convert_to_domain_parallel(Closure(), manager)
        twin.scale.grad = torch.tensor(3.0)
        with torch.no_grad():
            twin(shard_tensor(whole_input(), -2, manager))
        assert float(twin.scale.grad) == 3.0
        assert twin.conv.weight.grad is None

    state = random.getstate()
    run_threads(rank_main, 2)
    assert random.getstate() == state


class Context(nn.Module):
    """Attends to nothing of its second input but its mean; that one is whole on every rank."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)

    def forward(self, context, x):
        return self.conv(x) + self.mix(context.mean(1))[:, :, None, None]


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_inputs_that_every_rank_holds_whole(tokens):
    """Also where they have by chance as many tokens as a rank has rows."""
    context = torch.randn(2, tokens, 5)

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = convert_to_domain_parallel(Context(), manager)
        return twin(context, shard_tensor(whole_input(), -2, manager)).shape[-2]

    assert run_threads(rank_main, 2) == [12, 12]


class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * random.random()


class OneRankFails(nn.Module):
    """An own convolution without padding: a rank of two rows has too few."""

    def forward(self, x):
        return F.conv2d(x, torch.ones(x.shape[1], 1, 3, 1, dtype=x.dtype), groups=x.shape[1])


def test_what_draws_by_itself_is_said_and_not_refused(caplog):
    with caplog.at_level(logging.WARNING, "credit_domain"):
        convert_and_call(Drawn(), 2, whole_input())
    assert any("draws random numbers" in record.message for record in caplog.records)


def test_a_rank_that_fails_alone_tells_the_others():
    with pytest.raises(RankError) as error:
        convert_and_call(OneRankFails(), 2, whole_input()[:, :, :5])
    (message,) = refusals(error)
    assert "fails on rank 1" in message
    assert len(error.value.errors) == 2


class Units(nn.Module):
    """Channels in other units: the wrong one is small."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y * 1e5, (y - y.mean((-2, -1), keepdim=True)) * 1e-2], 1)


def test_channels_are_compared_by_their_own_scale():
    with pytest.raises(RankError, match=r"the model itself \(Units\)"):
        convert_and_call(Units(), 2, whole_input())


def test_reshaped_rows_and_patched_forwards_are_tried():
    flat = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(2), nn.Softmax(-1))
    with pytest.raises(RankError, match="does not give the numbers of one rank"):
        convert_and_call(flat, 2, whole_input())
