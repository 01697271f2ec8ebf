"""Verification: right models pass, and wrong ones are caught, each with the module that is to blame."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from domain_models import CubeEmbedding, MultiKernelEmbedding, PeriodicConv2d, PeriodicResidualNet, UNet
from torch import nn

import credit_domain.functional as DF
from credit_domain import verify_domain_parallel
from credit_domain.layers import DomainParallelPeriodicConv2d
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, get_domain_parallel_manager

PERIODIC = {PeriodicConv2d: DomainParallelPeriodicConv2d}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (UNet, (1, 3, 36, 12)),
        (lambda: UNet(odd=True), (1, 3, 41, 12)),
        (MultiKernelEmbedding, (1, 3, 44, 16)),
        (PeriodicResidualNet, (1, 3, 17, 10)),
        (CubeEmbedding, (1, 2, 4, 36, 8)),
    ],
)
def test_right_models_pass(model, shape, ranks):
    report = verify_domain_parallel(model, shape, ranks, custom_converters=PERIODIC)
    assert report, str(report)
    assert report.ok
    assert report.partition.rows == shape[-2]
    assert report.raise_if_wrong() is report
    assert str(report).startswith(f"exact on {ranks} ranks")
    assert len(report.parameter_gradients) > 3
    assert report.difference is None


class ReadsADict(nn.Module):
    """Takes tensors in a dict, and changes one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, fields):
        return {"out": self.conv(fields["state"].mul_(2)) + fields["forcing"]}


def test_tensors_in_containers_are_sharded_and_may_be_changed_in_place():
    fields = {name: torch.randn(1, 2, 13, 4, dtype=torch.float64) for name in ("state", "forcing")}
    before = fields["state"].clone()
    report = verify_domain_parallel(ReadsADict(), (fields,))
    assert report, str(report)
    assert report.outputs.keys() == {"out"}
    assert report.input_gradients.keys() == {"0.state", "0.forcing"}
    assert torch.equal(fields["state"], before)


class Around(nn.Module):
    """A model with something in the middle."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Pads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1)))


class Rolls(nn.Module):
    def forward(self, x):
        return torch.roll(x, 3, dims=2)


class Resizes(nn.Module):
    def forward(self, x):
        return F.interpolate(F.interpolate(x, scale_factor=2, mode="bilinear"), scale_factor=0.5, mode="bilinear")


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x):
        return x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


class HasATable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 17, 6))

    def forward(self, x):
        return x + self.table[:, :, : x.shape[2]]


@pytest.mark.parametrize(
    ("middle", "call", "text"),
    [
        (Pads, "F.pad", "what it computes after first and passes to middle.conv differs"),
        (Rolls, "torch.roll", "its result differs"),
        (Resizes, "F.interpolate", "its result differs"),
        (Averages, "Tensor.mean", "its result differs, though that of middle.gate does not|passes to middle.gate"),
        (Attends, "F.scaled_dot_product_attention", "its result differs, though that of middle.qkv does not"),
        (HasATable, "", "its result differs"),
    ],
)
def test_what_the_converter_cannot_see_is_caught_and_named(middle, call, text):
    report = verify_domain_parallel(Around(middle()), (1, 2, 17, 6), 3, method="modules")
    assert not report
    difference = report.difference
    assert difference.phase == "forward"
    assert difference.module == "middle"
    assert difference.kind == middle.__name__
    assert call in difference.advice
    assert re.search(text, difference.what), difference.what
    assert difference.rows or difference.error > 0
    with pytest.raises(ValueError, match="NOT exact on 3 ranks"):
        report.raise_if_wrong()


def test_rows_cluster_at_the_seams():
    report = verify_domain_parallel(
        Around(nn.Conv2d(4, 4, 3, padding=1)), (1, 2, 18, 6), 3, local=["middle"], partition=RowPartition((6, 5, 7))
    )
    assert report.difference.module == "middle"
    assert report.difference.rows == (5, 6, 10, 11)
    assert report.difference.seams == (6, 11)
    assert "rows 5-6, 10-11 differ" in str(report)
    assert "ranks meet at 6, 11" in str(report)


class Refused(nn.Unfold):
    """A layer without a rule, in a model that runs."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        return super().forward(x).view(x.shape)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(F.dropout(x, 0.5, self.training)) + torch.randn_like(x) + torch.rand(x.shape, dtype=x.dtype)


class DropsTheGradient(nn.Module):
    """A normalisation whose statistics are reduced outside autograd."""

    def forward(self, x):
        total = torch.stack([x.sum(), x.new_tensor(float(x.numel()))])
        if dist.is_initialized():
            total = total.detach()
            dist.all_reduce(total)
            total = total + 0 * x.sum()
        return x - total[0] / total[1]


def test_a_wrong_gradient_behind_a_right_output_is_caught():
    report = verify_domain_parallel(Around(DropsTheGradient()), (1, 2, 17, 6), 3, local=["middle"])
    assert max(report.outputs.values()) < 1e-9
    assert not report
    assert report.difference.phase == "backward"
    assert report.difference.module == "middle"
    assert "its result is right, and the gradient of its input differs" in report.difference.what


def test_shapes_of_the_whole_that_are_written_into_a_model():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(1, 4, 17, 6)

    report = verify_domain_parallel(Around(Fixed()), (1, 2, 17, 6), 3, method="modules")
    assert report.difference.phase == "failed"
    assert report.difference.module == "middle"
    assert "RuntimeError" in report.difference.what


def test_randomness_is_held_fixed_and_said_so():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(F.dropout(x, 0.5, self.training)) + torch.randn_like(x)

    report = verify_domain_parallel(Around(Noisy()), (1, 2, 17, 6), 3)
    assert report, str(report)
    notes = "; ".join(report.notes)
    assert "dropout of middle.drop set to 0" in notes
    assert "randn_like gives 0.5 (1 calls)" in notes
    assert "dropout held fixed" in notes


def test_a_model_with_hooks_that_has_run_before():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = Around(nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)))
    model(torch.ones(1, 2, 9, 5))
    report = verify_domain_parallel(model, (1, 2, 17, 6), 3)
    assert report, str(report)


def test_many_inputs_and_outputs():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)
            self.time = nn.Linear(4, 2)

        def forward(self, x, *, static, time, steps):
            out = self.conv(torch.cat([x, static], 1)) + self.time(time)[:, :, None, None]
            return {"out": out, "mean": DF.mean(out, (2, 3)), "steps": [out * steps]}

    inputs = {"x": (2, 2, 11, 5), "static": (2, 1, 11, 5), "time": (2, 4), "steps": 2}
    report = verify_domain_parallel(Several(), inputs, 4)
    assert report, str(report)
    assert set(report.outputs) == {"out", "mean", "steps[0]"}
    assert set(report.input_gradients) == {"x", "static", "time"}


def test_mistakes():
    with pytest.raises(ValueError, match="no input has rows to shard"):
        verify_domain_parallel(nn.Linear(2, 2), (2, 2), 2)
    with pytest.raises(ValueError, match="modules may mix rows.*\n.*middle .Unfold"):
        verify_domain_parallel(Around(nn.Unfold(1)), (1, 2, 9, 4), 2, method="modules")
    with pytest.raises(ValueError, match="at most 2 ranks fit|would leave rank"):
        verify_domain_parallel(Around(nn.Identity()), (1, 2, 2, 4), 3)

    run_threads(lambda rank: verify_domain_parallel(Around(nn.Identity()), (1, 2, 9, 4), 3), 1)
    assert get_domain_parallel_manager() is None


@pytest.mark.parametrize("middle", [Pads, Rolls, Resizes, Averages, Attends, HasATable])
def test_what_modules_cannot_is_verified_as_it_is_partitioned(middle):
    report = verify_domain_parallel(Around(middle()), (1, 2, 17, 6), 3)
    assert report, str(report)
    assert max(report.parameter_gradients.values()) < 1e-9
    note = report.notes[0]
    assert "partitioned operation by operation, as by convert_to_domain_parallel with input_shape" in note
    assert f"first difference (forward): middle ({middle.__name__})" in note


def test_a_model_that_can_be_done_neither_way_says_why_twice():
    class Branches(nn.Module):
        def forward(self, x):
            return x.flip(-2) if x.sum() > 0 else x.roll(1, -2)

    report = verify_domain_parallel(Around(Branches()), (1, 2, 17, 6), 3)
    assert not report
    assert report.difference.module == "middle"
    assert "it cannot be partitioned operation by operation either" in report.notes[-1]
    with pytest.raises(ValueError, match=r"(?s)2 \(Refused\).*it cannot be partitioned .* either"):
        verify_domain_parallel(nn.Sequential(Around(nn.Identity()), Branches(), Refused()), (1, 2, 17, 6), 3)
    with pytest.raises(ValueError, match="method must be one of auto, modules, graph; got 'all'"):
        verify_domain_parallel(nn.Identity(), (1, 2, 17, 6), 3, method="all")


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 4, 3, padding=1), Noise], ids=["conv", "noise"])
def test_by_operations_if_asked(make):
    report = verify_domain_parallel(Around(make()), (1, 2, 17, 6), 3, method="graph")
    assert report, str(report)
    assert "partitioned operation by operation" in report.notes[0]
