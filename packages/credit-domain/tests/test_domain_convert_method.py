"""Which way a model is converted: module by module, or operation by operation where that is not exact."""

from __future__ import annotations

import copy
import logging
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from trial_models import COLUMNS, FAULTS, ROWS, Net

import credit_domain.convert as convert_module
from credit_domain import (
    conversion_report,
    convert_to_domain_parallel,
    initialize_domain_parallel,
    partition_report,
    shard_tensor,
)
from credit_halo.testing import RankError, run_threads

SHAPE = (1, 3, ROWS, COLUMNS)


class Renormed(nn.BatchNorm2d):
    """A norm with a forward of its own, for which there is no rule."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean((-2, -1), keepdim=True)


class Branches(nn.Module):
    """What no trace takes, and no trial finds right."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-2) if x.sum() > 0 else x.roll(1, -2)


def gradients(model: nn.Module, x: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, the input's gradient and the parameters'."""
    x = x.detach().requires_grad_()
    out = model(x)
    (out * factors).sum().backward()
    return out.detach(), x.grad, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("make", [*FAULTS, lambda: Renormed(4)], ids=lambda make: make.__name__)
def test_with_a_shape_what_modules_cannot_is_done_by_operations(make, caplog) -> None:
    torch.manual_seed(0)
    plain = Net(make()).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    factors = torch.randn(2, 2, ROWS, COLUMNS, dtype=torch.float64, generator=generator)
    out, grad, grads = gradients(copy.deepcopy(plain), x, factors)

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        model = copy.deepcopy(plain)
        assert convert_to_domain_parallel(model, manager, input_shape=SHAPE) is model
        report = conversion_report(model)
        assert report.program is partition_report(model)
        assert "middle (" in report.why
        assert "operation by operation" in str(report)
        assert model._domain_parallel_manager is manager
        return gradients(model, shard_tensor(x, -2, manager), shard_tensor(factors, -2, manager))

    with caplog.at_level(logging.INFO, "credit_domain"):
        parts = run_threads(rank_main, 3)
    assert "partitioned operation by operation" in caplog.text
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([part[0] for part in parts], -2), out, **close)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], -2), grad, **close)
    for at, expected in enumerate(grads):
        torch.testing.assert_close(sum(part[2][at] for part in parts), expected, **close)


def convert(model: nn.Module, **options) -> None:
    """Convert a copy of a model on each of two ranks."""

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        twin = copy.deepcopy(model)
        kinds = [type(part) for part in twin.modules()]
        try:
            convert_to_domain_parallel(twin, manager, **options)
        except ValueError:
            assert [type(part) for part in twin.modules()] == kinds
            assert manager.granularity == 1
            assert not hasattr(twin, "_domain_parallel_report")
            raise
        return twin

    return run_threads(rank_main, 2)


def test_what_rules_cover_is_converted_by_modules() -> None:
    model = convert(Net(nn.GELU()), input_shape=SHAPE)[0]
    report = conversion_report(model)
    assert report.program is None
    assert len(report.of("converted")) == 2


def test_a_model_without_faults_may_be_partitioned_all_the_same() -> None:
    model = convert(Net(nn.GELU()), input_shape=SHAPE, method="graph")[0]
    assert conversion_report(model).program is not None


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            Net(Branches()),
            {"input_shape": SHAPE},
            r"(?s)in middle.*cannot be partitioned.*either: .* on every rank Net cannot be",
        ),
        (Net(Renormed(4)), {}, "With input_shape=, the whole model is partitioned"),
        (Net(Renormed(4)), {"input_shape": SHAPE, "method": "modules"}, r"middle \(Renormed\)"),
        (Net(nn.GELU()), {"method": "graph"}, "needs input_shape="),
        (Net(nn.GELU()), {"method": "Graph"}, "method must be one of auto, modules, graph; got 'Graph'"),
        (
            Net(Renormed(4)),
            {"input_shape": SHAPE, "custom_converters": {nn.Conv2d: lambda module: module}},
            r"middle \(Renormed\)",
        ),
    ],
    ids=["neither", "no shape", "modules", "graph", "unknown", "custom"],
)
def test_what_is_refused(model, options, message) -> None:
    with pytest.raises(RankError) as info:
        convert(model, **options)
    assert all(isinstance(error, ValueError) for error in info.value.errors.values())
    with pytest.raises(ValueError, match=message):
        raise info.value.errors[0]


@pytest.mark.parametrize("partitioned", [True, False])
def test_what_cannot_be_tried_is_partitioned_if_it_can_be(partitioned, caplog) -> None:
    def refuse(*args, **kwargs):
        raise ValueError("no program for this")

    untried = mock.patch("credit_domain.verification.trial.Trial.begin", return_value=False)
    way = mock.patch("credit_domain.convert.partition_model", convert_module.partition_model if partitioned else refuse)
    with untried, way, caplog.at_level(logging.INFO, "credit_domain"):
        report = conversion_report(convert(Net(FAULTS[0]()), input_shape=SHAPE)[0])
    assert (report.program is not None) == partitioned
    assert ("could not be tried" in report.why) == partitioned
    assert ("no program for this" in caplog.text) != partitioned
