"""Each thing that a forward may do with rows is exact on ranks, and gathers only where it must."""

from __future__ import annotations

import pytest
import torch
from domain_partitioned import check_partitioned
from partition_cases import CASES, LAYERS, H

SIZES = ((5, 3, 4), (6, 6), (1, 7, 2, 2))


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double()
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in case.shapes]
    sizes = SIZES[sorted(CASES).index(name) % len(SIZES)]
    assert sum(sizes) == H
    report = check_partitioned(model, inputs, sizes)
    assert bool(report.gathered) == case.gathers, str(report)
    assert case.gathers or not report.repeated, str(report)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_this_package(name: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = LAYERS[name].make().double()
    report = check_partitioned(model, [torch.randn(2, 4, H, 16, dtype=torch.float64)], sizes)
    assert LAYERS[name].gathers or not report.gathered, str(report)


def test_an_exported_layer_computes_and_differentiates() -> None:
    torch.manual_seed(0)
    model = LAYERS["own windows, masked"].make().double()
    x = torch.randn(2, 4, H, 16, dtype=torch.float64, requires_grad=True)
    exported = torch.export.export(model, (x,), strict=False).module()
    out, found = model(x), exported(x)
    weight = torch.randn_like(out)
    torch.testing.assert_close(found, out)
    (expected,) = torch.autograd.grad((out * weight).sum(), x)
    (gradient,) = torch.autograd.grad((found * weight).sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("sizes", [(12,), (4, 8), (3, 1, 8)])
def test_any_division(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = CASES["norms and strides"].make().double()
    check_partitioned(model, [torch.randn(2, 4, H, 16, dtype=torch.float64)], sizes, calls=2)
