"""Programs written as the reference's newest training programs are, with tensor parallelism, through the drop-in."""

from __future__ import annotations

import logging
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from credit_halo.testing import run_processes
from credit_parallel import dropin

PROGRAM = '''
"""A training program as its author wrote it for the reference."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from credit.parallel.tensor_parallel import TpColConv2d, TpColLinear, TpRowConv2d, TpRowLinear

HEIGHT, WIDTH, STEPS, SAMPLES = 16, 6, 3, 4


class Norm(nn.Module):
    """Over channels."""

    def __init__(self, channels):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * self.g


class FeedForward(nn.Module):
    def __init__(self, channels, tp_plan=None):
        super().__init__()
        self._tp_plan = tp_plan if tp_plan is not None else {"layers.1": "colwise", "layers.4": "rowwise"}
        up, down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.layers = nn.Sequential(Norm(channels), up, nn.GELU(), nn.Dropout(0.0), down)

    def forward(self, x):
        x = self.layers[0](x).permute(0, 2, 3, 1)
        for layer in self.layers[1:]:
            x = layer(x)
        return x.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Over each column of two longitudes, so that it mixes no rows; the head count is that of the local channels."""

    def __init__(self, channels, dim_head):
        super().__init__()
        self._tp_plan = {"to_q": "colwise", "to_k": "colwise", "to_v": "colwise", "to_out": "rowwise"}
        self.heads, self.dim_head = channels // dim_head, dim_head
        self.norm = Norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)

    @staticmethod
    def _tp_constraints(instance, tp_size):
        if instance.heads % tp_size:
            raise ValueError("heads do not divide")

    def forward(self, x):
        x = self.norm(x).permute(0, 2, 3, 1)
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w // 2, 2, -1)
        q, k, v = (layer(x) for layer in (self.to_q, self.to_k, self.to_v))
        heads = q.shape[-1] // self.dim_head
        q, k, v = (t.unflatten(-1, (heads, self.dim_head)).transpose(-2, -3) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        return self.to_out(out).reshape(b, h, w, -1).permute(0, 3, 1, 2)


class Transformer(nn.Module):
    _fsdp2_shard = True

    def __init__(self, channels):
        super().__init__()
        self.attention, self.feed = Attention(channels, 2), FeedForward(channels)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.feed(x)


class Pairs(nn.Module):
    """Layers that the program puts in place itself."""

    def __init__(self, channels):
        super().__init__()
        self.up, self.down = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(2 * channels, channels, 1)
        self.first, self.last = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def divide(self, group):
        self.up, self.down = TpColConv2d(self.up, group), TpRowConv2d(self.down, group)
        self.first, self.last = TpColLinear(self.first, group), TpRowLinear(self.last, group)

    def forward(self, x):
        x = x + self.down(F.gelu(self.up(x)))
        return x + self.last(F.gelu(self.first(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.blocks = nn.ModuleList([Transformer(4), Transformer(4)])
        self.pairs = Pairs(4)
        self.down, self.up = nn.Conv2d(4, 4, 4, 2, 1), nn.ConvTranspose2d(4, 4, 4, 2, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.pairs(x)
        return self.head(torch.cat([x, self.up(F.gelu(self.down(x)))], 1))


def build():
    torch.manual_seed(1)
    return Net().double()


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(STEPS, SAMPLES, 3, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)


def wrap(conf, model):
    from credit.parallel.mesh import build_device_mesh, dp_world_size, parse_parallelism_conf

    p = parse_parallelism_conf(conf)
    dp_size = dp_world_size(p, dist.get_world_size())
    mesh, submeshes = build_device_mesh(p, device="cpu")
    manager = None
    if p["domain"] > 1:
        from credit.domain_parallel import convert_to_domain_parallel, initialize_domain_parallel

        manager = initialize_domain_parallel(
            world_size=dist.get_world_size(), domain_parallel_size=p["domain"], shard_dim=-2
        )
        model = convert_to_domain_parallel(model, manager)
        model._domain_parallel_manager = manager
    if p["tensor"] > 1:
        from credit.parallel import apply_native_tensor_parallel, apply_tensor_parallel, supports_native_tp

        tp_mesh = submeshes.get("tp")
        if supports_native_tp(model):
            model = apply_native_tensor_parallel(model, tp_mesh)
        else:
            model = apply_tensor_parallel(model, tp_mesh)
        model.pairs.divide(tp_mesh.get_group())
    dp_mesh = submeshes.get("dp")
    from credit.parallel.mesh import register_dp_group

    register_dp_group(dp_mesh.get_group() if dp_mesh is not None else None)
    if p["data"] == "fsdp2" and dp_size > 1:
        from credit.parallel import apply_fsdp2

        model = apply_fsdp2(model, dp_mesh, conf)
    elif p["data"] == "ddp":
        group = {} if dp_mesh is None else {"process_group": dp_mesh.get_group()}
        model = nn.parallel.DistributedDataParallel(model, static_graph=True, **group)
    if manager is not None:
        model._domain_parallel_manager = manager
    dist.barrier()
    return model


def train(conf, checkpoint=None):
    from credit.parallel.collectives import all_reduce_avg, clip_grad_norm_
    from credit.parallel.domain import (
        gather_spatial,
        get_domain_manager,
        get_raw_model,
        shard_spatial,
        sync_domain_gradients,
    )
    from credit.parallel.fsdp2 import fsdp2_is_applied, fsdp2_load_state_dict
    from credit.parallel.mesh import data_parallel_coords, get_dp_group
    from credit.parallel.tensor_parallel import sync_replicated_gradients

    model = wrap(conf, build())
    raw, manager = get_raw_model(model), get_domain_manager(model)
    if checkpoint is not None:
        if fsdp2_is_applied(model):
            fsdp2_load_state_dict(model, checkpoint)
        else:
            raw.load_state_dict(checkpoint)
    dp_rank, dp_size = data_parallel_coords(conf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses, gradients = [], []
    for batch in data():
        batch = batch[dp_rank::dp_size]
        x, total = batch[:, 0], 0.0
        for t in (1, 2):  # a rollout
            prediction = model(shard_spatial(x, manager))
            loss = ((prediction - shard_spatial(batch[:, t], manager)) ** 2).mean()
            scaler.scale(loss).backward()
            total = total + loss.detach()
            x = gather_spatial(prediction.detach(), manager)
        sync_domain_gradients(model, manager)
        tp_group = getattr(raw, "_tp_group", None)
        if tp_group is not None:
            sync_replicated_gradients(model, tp_group)
        scaler.unscale_(optimizer)
        gradients.append({name: whole(p.grad) for name, p in raw.named_parameters()})
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if manager is not None:
            all_reduce_avg(total, manager.domain_group)
        if dp_size > 1:
            all_reduce_avg(total, get_dp_group())
        losses.append(float(total))
    return losses, gradients


def whole(grad):
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("program") / "train.py"
    file.write_text(PROGRAM)
    return file


def start(file):
    dropin.install()
    return runpy.run_path(str(file), run_name="program")


def on_one_rank(file, state=None):
    """The same training in plain torch."""
    own = start(file)
    dropin.uninstall()
    model = own["build"]()
    if state is not None:
        model.load_state_dict(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    losses, gradients = [], []
    for batch in own["data"]():
        x, total = batch[:, 0], 0.0
        for t in (1, 2):
            prediction = model(x)
            loss = ((prediction - batch[:, t]) ** 2).mean()
            loss.backward()
            total, x = total + float(loss.detach()), prediction.detach()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, gradients


def plain_name(name):
    """What the plain model calls a parameter of the layers that the program divided itself."""
    head, *rest = name.split(".")
    return ".".join([head, *(part for part in rest if part not in ("conv", "linear"))]) if head == "pairs" else name


def reference_names(state, divided=True):
    """The entries as the reference saves them of a model that it converted and divided."""
    named = {}
    for name, value in state.items():
        saved_as, (layer, _, entry) = name, name.rpartition(".")
        if layer in ("stem", "down", "up", "head"):
            saved_as = f"{layer}.conv.{entry}"
        elif layer.startswith("pairs.") and divided:
            child = "conv" if layer in ("pairs.up", "pairs.down") else "linear"
            row = layer in ("pairs.down", "pairs.last")
            saved_as = name if row and entry == "bias" else f"{layer}.{child}.{entry}"
        named[saved_as] = value
    return named


def run_program(rank, file, conf, state):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("credit_domain.model.saved_names")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    result = start(file)["train"](conf, state)
    return (*result, [message for message in messages if "converted model of the reference" in message])


LAYOUTS = [
    ("ddp", 2, 2),
    ("ddp", 2, 1),
    ("ddp", 1, 2),
    ("fsdp2", 2, 1),
    ("fsdp2", 2, 2),
    ("fsdp2", 1, 2),
    ("none", 2, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "tensor", "domain"), LAYOUTS, ids=str)
@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
def test_a_program_with_tensor_parallel_blocks_trains_like_one_rank(program, mode, tensor, domain, resumed):
    conf = {"trainer": {"parallelism": {"data": mode, "tensor": tensor, "domain": domain}}}
    plain = saved = None
    if resumed:
        own = start(program)
        dropin.uninstall()
        generator = torch.Generator().manual_seed(3)
        plain = {
            name: value + 0.1 * torch.randn(value.shape, dtype=value.dtype, generator=generator)
            for name, value in own["build"]().state_dict().items()
        }
        saved = reference_names(plain, divided=tensor > 1)
    losses, gradients = on_one_rank(program, plain)
    results = run_processes(run_program, 4, program, conf, saved, timeout=120)
    for rank, (own_losses, own_gradients, said) in enumerate(results):
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-9, atol=1e-11)
        for own, expected in zip(own_gradients, gradients, strict=True):
            assert {plain_name(name) for name in own} == set(expected)
            for name, gradient in own.items():
                wanted = expected[plain_name(name)]
                assert (gradient - wanted).abs().max() <= 1e-8 * wanted.abs().max() + 1e-12, name
        first_alone = mode == "fsdp2" and tensor * domain < 4  # which broadcasts what the first rank has read
        assert len(said) == (1 if resumed and (rank == 0 or not first_alone) else 0)
        assert not said or "8 names were changed" in said[0]


def refuse_the_world(rank, file):
    from torch.distributed.device_mesh import init_device_mesh

    from credit_parallel import apply_native_tensor_parallel

    own = start(file)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = apply_native_tensor_parallel(own["build"](), mesh["tp"])
    with pytest.raises(ValueError, match="process_group holds 4 ranks, among them several of the tp ranks"):
        nn.parallel.DistributedDataParallel(model)
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    assert isinstance(wrapped.module.blocks[0].feed.layers[1].weight, torch.distributed.tensor.DTensor)


@pytest.mark.slow
def test_a_group_of_tp_ranks_and_replicas_is_refused(program):
    run_processes(refuse_the_world, 4, program, timeout=60)


def test_the_state_of_an_optimizer_under_the_names_of_the_reference():
    from credit_parallel.fsdp2 import fsdp2_load_optimizer_state_dict, fsdp2_optimizer_state_dict

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = make()
    model(torch.randn(1, 2, 4, 4)).square().sum().backward()
    optimizer.step()
    state = fsdp2_optimizer_state_dict(model, optimizer)
    rename = {"0.weight": "0.conv.weight", "0.bias": "0.conv.bias"}
    theirs = {
        "state": {rename.get(name, name): values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [rename.get(name, name) for name in group["params"]]} for group in state["param_groups"]
        ],
    }
    other, fresh = make()
    fsdp2_load_optimizer_state_dict(other, fresh, theirs)
    loaded = fsdp2_optimizer_state_dict(other, fresh)
    assert loaded["param_groups"] == state["param_groups"]
    torch.testing.assert_close(loaded["state"], state["state"])


def test_a_plain_state_dict_of_a_file(tmp_path):
    from credit_parallel.checkpoint import load_plain

    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2)) for _ in range(2))
    saved = {f"module.{n.replace('0.', '0.conv.')}": value for n, value in model.state_dict().items()}
    torch.save({"model_state_dict": saved}, tmp_path / "checkpoint.pt")
    assert load_plain(tmp_path / "checkpoint.pt", other, key="model_state_dict") == ([], [])
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_plain_model_loads_what_a_converted_one_of_the_reference_saved(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    saved = {"0.conv.weight": torch.ones(2, 2, 3, 3), "0.conv.bias": torch.zeros(2)}
    saved.update({"1.weight": torch.ones(2), "1.bias": torch.ones(2)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict(saved)
    original = nn.Module.load_state_dict
    dropin.install()
    try:
        with caplog.at_level(logging.INFO, "credit_domain.model.saved_names"):
            nn.ModuleDict({"module": model}).load_state_dict({f"module.{k}": v for k, v in saved.items()})
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.conv.other\""):
            model.load_state_dict({**saved, "0.conv.other": torch.ones(2)})
        with pytest.raises(TypeError, match="dict-like"):
            model.load_state_dict(3)
    finally:
        dropin.uninstall()
    assert nn.Module.load_state_dict is original
    assert torch.equal(model[0].weight, saved["0.conv.weight"])
    assert "2 names were changed, such as module.0.conv." in caplog.text
    assert torch.equal(model(torch.zeros(1, 2, 3, 3)), F.group_norm(torch.zeros(1, 2, 1, 1), 1) + 1)
    assert "credit.parallel" not in sys.modules
