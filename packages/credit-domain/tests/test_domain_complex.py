"""Models with complex weights: cast as a whole, verified, and sharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from credit_domain import plan_domain_parallel, verify_domain_parallel
from credit_domain.casts import cast_module, cast_tensor, complex_dtype, real_dtype_of

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Spectral(nn.Module):
    """A Fourier layer along longitude, as in an FNO: each row by itself."""

    def __init__(self, inner: int = 4, modes: int = 3, cast: torch.dtype | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, inner, 3, padding=1), nn.Conv2d(inner, 2, 1)
        self.w = nn.Parameter(torch.randn(inner, inner, modes, dtype=torch.complex64) * 0.3)
        self.register_buffer("phase", torch.exp(1j * torch.arange(modes)))
        self.register_buffer("count", torch.tensor(modes))
        self.modes, self.cast = modes, cast

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.a(x))[..., : self.modes] * self.phase
        f = torch.einsum("bchm,cdm->bdhm", f.to(self.cast or f.dtype), self.w.to(self.cast or self.w.dtype))
        return self.b(torch.fft.irfft(f, n=x.shape[-1]).to(x.dtype))


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("before", REAL, ids=str)
def test_a_cast_keeps_complex_weights_complex(before, dtype):
    model = cast_module(Spectral(), before)
    parameters, values = list(model.parameters()), model.w.detach().clone()
    model.w.grad = torch.ones_like(model.w)
    assert cast_module(model, dtype) is model
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert {p.dtype for p in model.parameters()} == {dtype, complex_dtype(dtype)}
    assert (model.phase.dtype, model.count.dtype) == (complex_dtype(dtype), torch.int64)
    assert model.w.grad.dtype == model.w.dtype
    assert torch.equal(model.w.detach(), values.to(model.w.dtype))
    assert real_dtype_of(model) == dtype
    assert real_dtype_of(nn.ParameterList([model.w])) == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_cast_of_tensors():
    assert cast_tensor(torch.ones(2, dtype=torch.bool), torch.float64).dtype == torch.bool
    assert cast_tensor(torch.ones(2, dtype=torch.complex64), torch.float64).dtype == torch.complex128
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="expected float64"):
            cast_module(Spectral(), dtype)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("made_in", [torch.float32, torch.float64], ids=str)
def test_verify_proves_a_model_with_complex_weights(ranks, made_in):
    report = verify_domain_parallel(cast_module(Spectral(), made_in), (1, 2, 11, 8), ranks)
    assert report, report
    assert set(report.parameter_gradients) == {"a.weight", "a.bias", "b.weight", "b.bias", "w"}
    assert max(report.parameter_gradients.values()) < 1e-12
    assert not report.notes


class OfComplexFields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_verify_shards_complex_inputs():
    x = torch.randn(1, 2, 9, 5, dtype=torch.complex64)
    report = verify_domain_parallel(OfComplexFields(), x, 3)
    assert report, report
    assert max(*report.input_gradients.values(), *report.parameter_gradients.values()) < 1e-12


def test_verify_says_what_is_not_in_double_precision():
    """A model that casts to single precision itself is not called wrong for a reason of sharding."""
    report = verify_domain_parallel(Spectral(cast=torch.complex64), (1, 2, 11, 8), 3)
    assert any("computes in complex64" in note for note in report.notes)
    if not report:
        assert "may be rounding" in report.difference.advice


def test_plan_of_a_model_with_complex_weights():
    plan = plan_domain_parallel(cast_module(Spectral(), torch.float64), (1, 2, 11, 8), 3)
    assert sum(plan.partition.sizes) == 11
