"""The example models: exact on sharded rows, and trained on every layout as on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit_domain import verify_domain_parallel
from credit_halo.testing import run_processes
from credit_parallel import parallelize
from credit_parallel.app.examples.transformer import Transformer
from credit_parallel.app.examples.unet import UNet

HEIGHT, WIDTH, SAMPLES, CHANNELS = 17, 10, 4, 3
SMALL = {
    "unet": (UNet, {"width": 8, "groups": 4}),
    "deep unet": (UNet, {"width": 4, "groups": 2, "levels": 3, "blocks": 2}),
    "regional unet": (UNet, {"width": 8, "groups": 4, "periodic": False}),
    "transformer": (Transformer, {"width": 8, "heads": (2, 4), "window": (4, 4)}),
    "deep transformer": (Transformer, {"width": 4, "depths": (1, 2, 1), "heads": (2, 2, 2), "window": (2, 3)}),
    "regional transformer": (Transformer, {"width": 8, "heads": (2, 4), "window": (3, 4), "periodic": False}),
}


def make(name: str, rank: int = 0, dtype=torch.float64) -> nn.Module:
    """A small model whose weights, the last ones too, are none of them zero, drawn by a generator of their own."""
    kind, options = SMALL[name]
    model = kind(CHANNELS, 2, **options).to(dtype)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("ranks", "height", "width"), [(2, 41, 12), (3, 33, 15), (4, 61, 9)])
def test_sharded_rows_give_the_numbers_of_one_rank(name, ranks, height, width):
    report = verify_domain_parallel(make(name), (2, CHANNELS, height, width), ranks)
    assert report, str(report)
    assert len(set(report.partition.sizes)) > 1
    assert max(map(abs, report.parameter_gradients.values())) < 1e-12


@pytest.mark.parametrize("kind", [UNet, Transformer])
@pytest.mark.parametrize("shape", [(1, 3, 7, 5), (2, 3, 24, 32), (1, 3, 1, 1)])
def test_every_size_fits_and_a_new_model_predicts_persistence(kind, shape):
    out = kind(3, 2)(torch.randn(shape))
    assert out.shape == (shape[0], 2, *shape[2:])
    assert not out.any()


@pytest.mark.parametrize(("kind", "shift"), [(UNet, 4), (Transformer, 32)])
def test_only_a_periodic_model_commutes_with_a_shift_along_longitude(kind, shift):
    """By a multiple of the total stride, and of the windows."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 13, 64, dtype=torch.float64)
    for periodic in (True, False):
        model = kind(3, 2, periodic=periodic).double()
        nn.init.normal_(model.head.conv.weight)
        same = torch.allclose(model(x.roll(shift, -1)), model(x).roll(shift, -1), atol=1e-9)
        assert same == periodic


def test_shifted_windows_join_what_windows_cut():
    """A change of one column is felt across the date line by the blocks of a periodic transformer alone."""
    felt = {}
    for periodic in (True, False):
        torch.manual_seed(0)
        model = Transformer(3, 2, periodic=periodic, depths=(2,), heads=(4,), window=(4, 4)).double()
        stage = model.stages[0]
        x = torch.randn(1, 64, 8, 16, dtype=torch.float64)
        y = x.clone()
        y[:, 0, :, 0] += 1
        felt[periodic] = bool((stage(x) - stage(y))[..., -1].abs().max() > 1e-9)
    assert felt == {True: True, False: False}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(UNet, {"width": 12}), (UNet, {"levels": 0}), (Transformer, {"heads": (4,)}), (Transformer, {"window": (4, 0)})],
)
def test_options_that_do_not_fit(kind, options):
    with pytest.raises(ValueError, match=r"got width=\d+"):
        kind(3, 2, **options)


# Training


def train(rank: int, name: str, conf: dict[str, object]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of three steps of SGD, and the gradients of the first."""
    context = parallelize(make(name, rank), conf, input_shape=(1, CHANNELS, HEIGHT, WIDTH))
    optimizer = torch.optim.SGD(context.model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(SAMPLES, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
    ys = torch.randn(SAMPLES, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
    each = SAMPLES // context.layout.dp
    start = 0 if context.manager is None else context.manager.dp_rank * each
    x, y = context.shard([xs[start : start + each], ys[start : start + each]])
    losses, gradients = [], {}
    for step in range(3):
        loss = context.mean((context.model(x) - y) ** 2)
        loss.backward()
        losses.append(context.value(loss))
        if step == 0:
            context.sync_gradients()
            gradients = {n.removeprefix("module."): whole(p.grad) for n, p in context.model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        else:
            context.step(optimizer, max_norm=1.0)
    return losses, gradients


def whole(grad):
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()


def conf_of(data="none", tensor=1, domain=1, **trainer):
    return {"trainer": {"parallelism": {"data": data, "tensor": tensor, "domain": domain}, **trainer}}


def compare(results, expected):
    losses, gradients = expected
    for own_losses, own_gradients in results:
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-9, atol=1e-9)
        assert set(own_gradients) == set(gradients)
        for name, gradient in gradients.items():
            error = (own_gradients[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
            assert error < 1e-9, f"{name}: {error}"


@pytest.fixture(scope="module")
def expected():
    return {name: train(0, name, conf_of()) for name in ("unet", "transformer")}


@pytest.mark.parametrize(
    ("name", "mode", "dp", "tensor", "domain", "recompute"),
    [
        ("unet", "fsdp2", 2, 1, 3, False),
        ("unet", "ddp", 2, 1, 2, True),
        ("unet", "none", 1, 1, 4, False),
        ("transformer", "fsdp2", 1, 2, 2, True),
        ("transformer", "ddp", 1, 2, 2, False),
        ("transformer", "none", 1, 2, 2, True),
        pytest.param("transformer", "fsdp2", 2, 2, 2, False, marks=pytest.mark.slow),
        pytest.param("transformer", "ddp", 2, 1, 3, True, marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_like_one_rank(name, mode, dp, tensor, domain, recompute, expected):
    conf = conf_of(mode, tensor, domain, activation_checkpoint=recompute)
    compare(run_processes(train, dp * tensor * domain, name, conf, timeout=120, fork=True), expected[name])


def test_tensor_parallel_ranks_hold_half_of_each_block():
    def rank_main(rank):
        context = parallelize(make("transformer"), conf_of("none", 2, 1))
        block = context.model.stages[0][0]
        assert block.attention.heads == 1
        return sum(p.to_local().numel() for p in block.parameters() if isinstance(p, DTensor))

    block = make("transformer").stages[0][0]
    shared = [block.norm1, block.norm2, block.attention.proj.bias, block.mlp[2].bias]
    kept = sum(sum(p.numel() for p in s.parameters()) if isinstance(s, nn.Module) else s.numel() for s in shared)
    whole = sum(p.numel() for p in block.parameters())
    assert run_processes(rank_main, 2, fork=True) == [(whole - kept) // 2] * 2


# Compiling


@pytest.mark.slow
# Dynamo looks at the gradients of activations.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_blocks_compile_as_one_graph(name):
    model, twin = make(name), make(name)
    for block in [b for b in twin.modules() if getattr(b, "_fsdp2_shard", False)]:
        block.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    for each in (model, twin):
        each(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def compiled_in_parts(rank):
    """Gradients of the first rank's rows, with and without compiling, where parameters and rows are divided."""
    found = []
    for compiles in (False, True):
        context = parallelize(make("transformer"), {"parallelism": {"data": "fsdp2", "domain": 2}}, check_batches=0)
        if compiles:
            for block in [b for b in context.model.modules() if getattr(b, "_fsdp2_shard", False)]:
                block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
        generator = torch.Generator().manual_seed(1)
        whole = torch.randn(1, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)
        context.mean(context.model(context.shard(whole)).square()).backward()
        found.append([p.grad.full_tensor() for p in context.model.parameters()])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_blocks_compile_where_parameters_and_rows_are_divided():
    run_processes(compiled_in_parts, 2, timeout=200)
