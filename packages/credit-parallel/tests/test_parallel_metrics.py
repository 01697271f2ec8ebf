"""Metrics on every layout against plain numpy on all rows of all samples."""

import numpy as np
import pytest
import torch
from torch import Tensor

from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel
from credit_parallel.losses import latitude_weights
from credit_parallel.metrics import ACC, MAE, RMSE, Bias, ZonalSpectrum, acc, bias, mae, rmse, zonal_spectrum

ROWS, LONGITUDES, CHANNELS = 9, 6, 3
PARTITIONS = {1: (9,), 2: (7, 2), 3: (2, 1, 6), 6: (1, 2, 1, 3, 1, 1)}
SAMPLES = {1: (4,), 2: (3, 1), 3: (2, 0, 2), 6: (1, 0, 1, 0, 0, 2)}  # of each replica: uneven, and some have none
LAYOUTS = [(1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 1, 6), (2, 1, 1), (6, 1, 1), (2, 1, 3), (3, 1, 2), (1, 2, 3), (3, 2, 1)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PREDICTION, TARGET = randn(4, CHANNELS, ROWS, LONGITUDES) + 0.3, randn(4, CHANNELS, ROWS, LONGITUDES, seed=1)
CLIMATOLOGY = randn(CHANNELS, ROWS, LONGITUDES, seed=2) / 2
MASK = randn(4, 1, ROWS, LONGITUDES, seed=3) > -0.8
WEIGHTS = latitude_weights(ROWS, pole_is_row=True)


def reference(name: str, weighted: bool, masked: bool) -> np.ndarray:
    """Loops and formulas of the textbook, without torch."""
    p, t = PREDICTION.numpy(), TARGET.numpy()
    w = (WEIGHTS.numpy() if weighted else np.ones(ROWS))[:, None] * np.ones((4, 1, ROWS, LONGITUDES))
    w = np.broadcast_to(w * MASK.numpy() if masked else w, p.shape)
    axes = (0, 2, 3)
    if name == "RMSE":
        return np.sqrt((w * (p - t) ** 2).sum(axes) / w.sum(axes))
    if name == "MAE":
        return (w * abs(p - t)).sum(axes) / w.sum(axes)
    if name == "Bias":
        return (w * (p - t)).sum(axes) / w.sum(axes)
    if name == "ACC":
        p, t = p - CLIMATOLOGY.numpy(), t - CLIMATOLOGY.numpy()
        top = (w * p * t).sum((2, 3))
        return (top / np.sqrt((w * p * p).sum((2, 3)) * (w * t * t).sum((2, 3)))).mean(0)
    spectra = []
    for field in (p, t):
        phase = np.exp(-2j * np.pi * np.outer(np.arange(LONGITUDES // 2 + 1), np.arange(LONGITUDES)) / LONGITUDES)
        power = abs(np.einsum("kx,bchx->bchk", phase, field) / LONGITUDES) ** 2 * np.array([1, 2, 2, 1])
        spectra.append((power * w[..., :1]).sum((0, 2)) / w[..., :1].sum((0, 2)))
    return np.stack(spectra)


CASES = [
    (name, weighted, masked) for name in ("RMSE", "MAE", "Bias", "ACC") for weighted in (0, 1) for masked in (0, 1)
]
CASES += [("ZonalSpectrum", 0, 0), ("ZonalSpectrum", 1, 0)]
KINDS = {"RMSE": RMSE, "MAE": MAE, "Bias": Bias, "ACC": ACC, "ZonalSpectrum": ZonalSpectrum}


def every_metric(rank: int, dp: int, tp: int, domain: int) -> dict[tuple, Tensor]:
    partition, samples = RowPartition(PARTITIONS[domain]), RowPartition(SAMPLES[dp], allow_empty=True)
    manager = initialize_domain_parallel(dp * tp * domain, domain, tensor_parallel_size=tp)
    rows, mine = partition.interval(manager.domain_rank), samples.interval(manager.dp_rank)
    if rank % 2 == 0 or domain > 1:  # learned, or asked for at each update
        manager.declare(partition)

    def own(x: Tensor) -> Tensor:
        return x[..., rows.start : rows.stop, :]

    values = {}
    for name, weighted, masked in CASES:
        for whole_weights in (True, False)[: 1 + weighted]:
            weights = (WEIGHTS if whole_weights else WEIGHTS[rows.start : rows.stop]) if weighted else None
            metric = ACC(own(CLIMATOLOGY), weights) if name == "ACC" else KINDS[name](weights)
            for sample in mine:  # one by one
                at = slice(sample, sample + 1)
                batch = [own(PREDICTION[at]), own(TARGET[at])]
                if masked:
                    mask = own(MASK[at])
                    batch = [batch[0], torch.where(mask, batch[1], torch.nan), mask]
                metric.update(*batch)
            values[name, weighted, masked, whole_weights] = metric.compute()
    return values


def check(values: list[dict[tuple, Tensor]]) -> None:
    for key, value in values[0].items():
        wanted = reference(*key[:3])
        np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-12, atol=1e-14, err_msg=str(key))
        for other in values[1:]:
            assert torch.equal(other[key], value), f"{key}: the same on every rank"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_numbers_of_one_rank(layout: tuple[int, int, int]) -> None:
    dp, tp, domain = layout
    check(run_threads(every_metric, dp * tp * domain, *layout))


def test_in_processes() -> None:
    check(run_processes(every_metric, 4, 2, 1, 2))


def test_functional_forms_are_those_of_one_batch() -> None:
    for name, fn in (("RMSE", rmse), ("MAE", mae), ("Bias", bias)):
        np.testing.assert_allclose(fn(PREDICTION, TARGET, WEIGHTS), reference(name, True, False), rtol=1e-12)
        np.testing.assert_allclose(fn(PREDICTION, TARGET, mask=MASK), reference(name, False, True), rtol=1e-12)
    np.testing.assert_allclose(acc(PREDICTION, TARGET, CLIMATOLOGY, WEIGHTS), reference("ACC", True, False), rtol=1e-12)
    wanted = reference("ZonalSpectrum", True, False)
    np.testing.assert_allclose(zonal_spectrum(TARGET, WEIGHTS), wanted[1], rtol=1e-12)


def test_dims_may_lie_otherwise() -> None:
    """Time counts as samples, channels may be last but one, samples may be left out."""
    want = rmse(PREDICTION, TARGET, WEIGHTS)
    with_time = [x.view(2, 2, CHANNELS, ROWS, LONGITUDES).transpose(1, 2) for x in (PREDICTION, TARGET)]
    torch.testing.assert_close(rmse(*with_time, WEIGHTS), want)
    climatology = CLIMATOLOGY[:, None]
    torch.testing.assert_close(acc(*with_time, climatology, WEIGHTS), acc(PREDICTION, TARGET, CLIMATOLOGY, WEIGHTS))
    torch.testing.assert_close(zonal_spectrum(with_time[0], WEIGHTS), zonal_spectrum(PREDICTION, WEIGHTS))
    turned = [x.permute(0, 2, 1, 3) for x in (PREDICTION, TARGET)]
    torch.testing.assert_close(rmse(*turned, WEIGHTS, dim=1, channel_dim=2), want)
    moved = acc(*turned, CLIMATOLOGY.permute(1, 0, 2), WEIGHTS, dim=1, channel_dim=2)
    torch.testing.assert_close(moved, acc(PREDICTION, TARGET, CLIMATOLOGY, WEIGHTS))
    torch.testing.assert_close(rmse(PREDICTION[0], TARGET[0], channel_dim=0), rmse(PREDICTION[:1], TARGET[:1]))
    with pytest.raises(ValueError, match=r"needs fields of shape \(B, C, ..., H, W\)"):
        rmse(PREDICTION, TARGET, dim=1)


def test_sharded_longitude() -> None:
    def rank_main(rank: int) -> None:
        initialize_domain_parallel(3, 3, shard_dim=-1)
        own = [x[..., (0, 1, 4)[rank] : (1, 4, 6)[rank]] for x in (PREDICTION, TARGET, CLIMATOLOGY)]
        np.testing.assert_allclose(rmse(*own[:2], WEIGHTS), reference("RMSE", True, False), rtol=1e-12)
        np.testing.assert_allclose(acc(*own, WEIGHTS), reference("ACC", True, False), rtol=1e-12)
        with pytest.raises(ValueError, match="needs all longitudes of a row on one rank.*the sharded dim is -1"):
            zonal_spectrum(own[0])

    def time(rank: int) -> None:
        initialize_domain_parallel(2, 2, shard_dim=2)
        with pytest.raises(ValueError, match=r"the sharded dim must be one of \(3, 4\) .* shards dim 2"):
            rmse(PREDICTION[:, :, None], TARGET[:, :, None])

    run_threads(rank_main, 3)
    run_threads(time, 2)


def test_float32_fields_are_summed_in_float64() -> None:
    target = torch.full((1, 1, 200, 500), 1e4)
    target[..., ::2] += 1
    assert bias(target + 0.5, target).item() == 0.5
    assert rmse(target + 0.5, target).dtype == torch.float64


def test_spectra_of_waves() -> None:
    longitude = torch.arange(12, dtype=torch.float64) * 2 * torch.pi / 12
    field = (3 + 2 * torch.cos(2 * longitude + 1) + torch.cos(6 * longitude)).expand(1, 1, 4, 12)
    np.testing.assert_allclose(zonal_spectrum(field)[0], [9, 0, 2, 0, 0, 0, 1], atol=1e-12)
    odd = randn(2, 1, 4, 7)
    assert zonal_spectrum(odd).sum().item() == pytest.approx(odd.square().mean().item()), "Parseval"


def test_fields_masked_wholly_do_not_count() -> None:
    mask = torch.tensor([True, False, True, True])[:, None, None, None]
    some = [x[[0, 2, 3]] for x in (PREDICTION, TARGET)]
    torch.testing.assert_close(acc(PREDICTION, TARGET, CLIMATOLOGY, mask=mask), acc(*some, CLIMATOLOGY))
    torch.testing.assert_close(rmse(PREDICTION, TARGET, mask=mask), rmse(*some))


def test_a_climatology_for_each_batch() -> None:
    metric = ACC()
    with pytest.raises(ValueError, match="ACC: needs a climatology"):
        metric.update(PREDICTION, TARGET)
    for at in (slice(0, 1), slice(1, 4)):
        metric.update(PREDICTION[at], TARGET[at], climatology=CLIMATOLOGY)
    torch.testing.assert_close(metric.compute(), acc(PREDICTION, TARGET, CLIMATOLOGY))
    with pytest.raises(ValueError, match="does not fit"):
        metric.update(PREDICTION[:1], TARGET[:1], climatology=CLIMATOLOGY.expand(2, -1, -1, -1))
    metric.reset()
    metric.update(PREDICTION[:1], TARGET[:1], climatology=CLIMATOLOGY)
    torch.testing.assert_close(metric.compute(), acc(PREDICTION[:1], TARGET[:1], CLIMATOLOGY))


def test_mistakes_are_named_on_all_ranks() -> None:
    def rank_main(rank: int) -> None:
        with pytest.raises(ValueError, match=r"RMSE: needs a manager of all 4 ranks"):
            RMSE()
        manager = initialize_domain_parallel(4, 2)
        own = [x[..., :4, :] if manager.domain_rank == 0 else x[..., 4:, :] for x in (PREDICTION, TARGET)]
        metric = RMSE()
        with pytest.raises(ValueError, match=r"RMSE: compute\(\) before any update\(\)"):
            metric.compute()
        metric.update(*own)
        if rank == 3:
            metric.update(*own)
        with pytest.raises(ValueError, match=r"same samples.*rank 2: 4 of replica 1.*rank 3: 8 of replica 1"):
            metric.compute()
        metric.reset()
        channels = 2 if manager.dp_rank else 3
        metric.update(*(x[:, :channels] for x in own))
        with pytest.raises(ValueError, match="the same channels"):
            metric.compute()
        if rank == 0:
            with pytest.raises(ValueError, match="RMSE: other channels or longitudes than before"):
                metric.update(*(x[:, :1] for x in own))
        with pytest.raises(ValueError, match=r"weights must be of shape \(9,\) for all rows, or \(4,\)"):
            rmse(*own, torch.ones(8))
        with pytest.raises(ValueError, match="prediction and target must be of one shape"):
            rmse(own[0], own[1][:1])
        np.testing.assert_allclose(rmse(*own), reference("RMSE", False, False), rtol=1e-12)

    run_threads(rank_main, 4)
