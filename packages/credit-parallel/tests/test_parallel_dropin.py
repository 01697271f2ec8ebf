"""The drop-in: the reference's names and signatures, its programs unchanged, and nothing else of ``credit`` touched."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from credit_halo.testing import run_processes, run_threads
from credit_parallel import dropin
from credit_parallel.dropin.names import MODULES, is_replaced

SPEC = Path(os.environ.get("CREDIT_SPEC") or Path(__file__).parents[4] / "shared" / "spec")
needs_pages = pytest.mark.skipif(not SPEC.is_dir(), reason=f"the reference pages are not at {SPEC} (CREDIT_SPEC)")


@pytest.fixture
def installed():
    dropin.install()
    yield
    dropin.uninstall()
    assert not [name for name in sys.modules if name == "credit" or name.startswith("credit.")]


# The pages

ENTRY = re.compile(r"^( *)\.\. py:(module|function|class|method|property|attribute|data):: ([\w.]+)(?:\((.*)\))?")


def entries():
    """``(module, path, kind, signature or None, value or None)`` of each entry of the pages."""
    found = []
    for page in sorted(SPEC.glob("*.txt")) if SPEC.is_dir() else []:
        module, outer = "", ""
        lines = page.read_text().splitlines()
        for at, line in enumerate(lines):
            match = ENTRY.match(line)
            if not match:
                continue
            indent, kind, name, signature = match.groups()
            if kind == "module":
                module = name
                continue
            if kind == "class":
                outer = name
            path = f"{outer}.{name}" if indent else name
            value = lines[at + 1].split(":value:")[1].strip() if ":value:" in lines[at + 1] else None
            found.append((module, path, kind, signature, value))
    return found


def listed_in_prose():
    """The same of what drop-in.md lists: ``- `module`: `name(arguments)`, ...``."""
    page = SPEC / "drop-in.md"
    found = []
    for line in page.read_text().splitlines() if page.is_file() else []:
        match = re.match(r"- `(credit\.[\w.]+)`: (.*)", line)
        for name, signature in re.findall(r"`(\w+)\(([^`]*)\)`", match[2] if match else ""):
            if name not in ("_tp_constraints",):  # what blocks declare
                found.append((match[1], name, "function", signature, None))
    return found


def resolve(module, path):
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def incompatible(signature, target, skip_self=False):
    """What keeps a call that is written for a signature from meaning the same to ``target``; empty if nothing."""
    wanted = ast.parse(f"def f({signature}): ...").body[0].args
    if wanted.vararg is not None:
        return ""
    ours = list(inspect.signature(target).parameters.values())[skip_self:]
    defaults = [inspect.Parameter.empty] * (len(wanted.args) - len(wanted.defaults))
    defaults += [ast.literal_eval(default) for default in wanted.defaults]
    for i, (argument, default) in enumerate(zip(wanted.args, defaults, strict=True)):
        own = ours[i] if i < len(ours) else None
        if own is not None and own.kind is own.VAR_POSITIONAL:
            return ""
        if own is None or own.kind is not own.POSITIONAL_OR_KEYWORD or own.name != argument.arg:
            return f"argument {i} must be {argument.arg}, is {own}"
        if default is not inspect.Parameter.empty and own.default != default:
            return f"the default of {argument.arg} must be {default!r}, is {own.default!r}"
    for own in ours[len(wanted.args) :]:
        if own.default is own.empty and own.kind not in (own.VAR_POSITIONAL, own.VAR_KEYWORD):
            return f"{own} is wanted besides"
    return ""


def test_the_check_of_signatures_can_fail():
    assert not incompatible("a, b=1", lambda a, b=1, *, c=2: None)
    assert not incompatible("x", lambda self, x: None, skip_self=True)
    for other in (lambda b, a=1: None, lambda a, b=2: None, lambda a: None, lambda a, b=1, *, c: None):
        assert incompatible("a, b=1", other)


@needs_pages
def test_the_pages_are_read():
    found = entries()
    assert {module for module, *_ in found} >= {"credit.parallel", "credit.parallel.mesh", "credit.domain_parallel"}
    assert {kind for _, _, kind, *_ in found} == {"function", "class", "method", "property", "attribute", "data"}
    assert len(found) > 80
    assert len(listed_in_prose()) >= 20


@needs_pages
@pytest.mark.parametrize(
    ("module", "path", "kind", "signature", "value"),
    [pytest.param(*entry, id=f"{entry[0]}.{entry[1]}") for entry in (*entries(), *listed_in_prose())],
)
def test_every_name_of_the_pages(installed, module, path, kind, signature, value):
    if kind == "attribute" or (kind == "property" and "Manager" not in path):
        return  # of instances: test_every_attribute_of_the_pages
    found = resolve(module, path)
    if signature is not None:
        plain = kind == "method" and not isinstance(inspect.getattr_static(*_owner(module, path)), staticmethod)
        assert not incompatible(signature, found, skip_self=plain)
    elif kind == "property":
        assert isinstance(found, property)


def _owner(module, path):
    owner, _, name = path.rpartition(".")
    return resolve(module, owner), name


def instances():
    """One of each class of the pages, by name."""
    from credit.domain_parallel import DomainParallelManager, HaloExchange, layers

    periodic = nn.Module()
    periodic.conv, periodic.padding = nn.Conv2d(1, 1, 3), 1
    made = {
        "DomainParallelManager": DomainParallelManager(2, 2),
        "HaloExchange": HaloExchange(1),
        "DomainParallelConv2d": layers.DomainParallelConv2d(nn.Conv2d(1, 1, 3)),
        "DomainParallelConv3d": layers.DomainParallelConv3d(nn.Conv3d(1, 1, 3)),
        "DomainParallelConvTranspose2d": layers.DomainParallelConvTranspose2d(nn.ConvTranspose2d(1, 1, 3)),
        "DomainParallelConvTranspose3d": layers.DomainParallelConvTranspose3d(nn.ConvTranspose3d(1, 1, 3)),
        "DomainParallelGroupNorm": layers.DomainParallelGroupNorm(nn.GroupNorm(1, 2)),
        "DomainParallelInterpolate": layers.DomainParallelInterpolate((4, 4)),
        "DomainParallelPeriodicConv2d": layers.DomainParallelPeriodicConv2d(periodic),
    }
    branch = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 1, 3))
    assert layers.DomainParallelCrossEmbedBranch(branch).halo_width == 1
    return made


def missing_attributes(rank):
    made, missing = instances(), []
    for module, path, kind, _, value in entries():
        owner, _, name = path.rpartition(".")
        if kind not in ("attribute", "property"):
            continue
        if not hasattr(made[owner], name):
            missing.append(f"{module}.{path}")
        elif value not in (None, "None") and getattr(made[owner], name) != ast.literal_eval(value):
            missing.append(f"{module}.{path} is {getattr(made[owner], name)!r}, not {value}")
    return missing


@needs_pages
def test_every_attribute_of_the_pages(installed):
    assert run_threads(missing_attributes, 2) == [[], []]


# Finding modules


def names_of(modules):
    return {name: module for name, module in modules.items() if name == "credit" or name.startswith("credit.")}


def test_without_the_reference(installed):
    for name, source in MODULES.items():
        module = importlib.import_module(name)
        assert module is sys.modules[name]
        assert module.__name__ == module.__spec__.name == name
        assert module.__class__.__dir__(module) == dir(module)
        assert set(dir(importlib.import_module(source))) <= set(dir(module))
    import credit

    assert list(credit.__path__) == []
    assert credit.parallel.mesh.build_device_mesh is credit.parallel.build_device_mesh
    assert credit.domain_parallel.halo_exchange._HaloExchangeFunction.__module__.startswith("credit_halo")
    namespace: dict = {}
    exec("from credit.parallel.domain import *; from credit.domain_parallel import *", namespace)
    assert {"gather_spatial", "convert_to_domain_parallel"} <= set(namespace)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("credit.parallel.losses")
    with pytest.raises(ImportError, match="nonsense"):
        exec("from credit.parallel.mesh import nonsense")
    with pytest.raises(AttributeError, match="credit_parallel.mesh"):
        _ = credit.parallel.mesh.nonsense
    importlib.reload(credit.parallel.mesh)
    assert callable(credit.parallel.mesh.fold_domain)


def test_installing_twice_and_leaving():
    before = list(sys.meta_path)
    dropin.uninstall()
    dropin.install()
    dropin.install()
    assert len(sys.meta_path) == len(before) + 1
    dropin.uninstall()
    dropin.uninstall()
    assert sys.meta_path == before
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("credit.parallel")


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """A package ``credit`` on disk, with modules that are replaced and others."""
    files = {
        "__init__.py": "WHO = 'theirs'",
        "models.py": "WHO = 'theirs'",
        "parallel/__init__.py": "from credit.parallel.mesh import build_device_mesh",
        "parallel/mesh.py": "def build_device_mesh(): return 'theirs'",
        "parallel/extra.py": "from .mesh import build_device_mesh\nWHO = 'theirs'",
        "domain_parallel/__init__.py": "",
        "domain_parallel/manager.py": "",
        "trainer.py": "from credit.parallel.mesh import build_device_mesh",
    }
    for name, text in files.items():
        file = tmp_path / "site" / "credit" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "site"
    dropin.uninstall()
    for name in names_of(sys.modules):
        del sys.modules[name]


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_beside_the_reference(reference):
    before = contents(reference)
    dropin.install()
    import credit.models
    import credit.parallel.extra
    import credit.trainer

    import credit_parallel

    assert credit.WHO == credit.models.WHO == credit.parallel.extra.WHO == "theirs"
    ours = credit_parallel.build_device_mesh
    assert credit.parallel.build_device_mesh is ours
    assert credit.parallel.extra.build_device_mesh is credit.trainer.build_device_mesh is ours
    assert not hasattr(credit_parallel, "extra")
    assert credit_parallel.mesh.__name__ == "credit_parallel.mesh"
    dropin.uninstall()
    assert "parallel" not in vars(credit)
    assert not [name for name in sys.modules if is_replaced(name)]
    theirs = importlib.import_module("credit.parallel.mesh")
    assert theirs.build_device_mesh() == credit.parallel.build_device_mesh() == "theirs"
    assert contents(reference) == before


def test_after_the_reference_was_imported(reference, caplog):
    import credit.models
    import credit.parallel.extra
    import credit.trainer

    theirs, modules = credit.parallel, dict(names_of(sys.modules))
    dropin.install()
    assert "credit.trainer (build_device_mesh)" in caplog.text
    assert "credit.parallel.extra (build_device_mesh)" in caplog.text
    assert "credit.models" not in caplog.text
    import credit_parallel

    assert credit.parallel is not theirs
    assert credit.parallel.mesh.build_device_mesh is credit_parallel.build_device_mesh
    assert credit.parallel.extra is modules["credit.parallel.extra"]
    assert sys.modules["credit.models"] is credit.models is modules["credit.models"]
    import credit.domain_parallel.layers

    dropin.uninstall()
    assert names_of(sys.modules) == modules
    assert credit.parallel is theirs
    assert credit.parallel.mesh.build_device_mesh() == "theirs"
    assert "domain_parallel" not in vars(credit)


def test_what_a_test_puts_in_place_is_what_is_called(installed, monkeypatch):
    """shard_lat_weights asks the manager module for the manager, at each call."""
    from credit.parallel.domain import shard_lat_weights

    weights = torch.arange(8.0)
    assert shard_lat_weights(weights, 8) is weights
    stand_in = SimpleNamespace(domain_parallel_size=2, domain_rank=1)
    with monkeypatch.context() as patch:
        patch.setattr("credit.domain_parallel.manager.get_domain_parallel_manager", lambda: stand_in)
        assert shard_lat_weights(weights, 4).tolist() == [4.0, 5.0, 6.0, 7.0]
    assert shard_lat_weights(weights, 8) is weights


def test_conversion_with_a_stand_in_for_the_manager(installed):
    from credit.domain_parallel.convert import _needs_halo_conv2d, convert_to_domain_parallel
    from credit.domain_parallel.layers import DomainParallelConv2d
    from credit.parallel import get_domain_manager

    manager = SimpleNamespace(domain_parallel_size=2)
    model = convert_to_domain_parallel(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)), manager)
    assert [type(layer) for layer in model] == [DomainParallelConv2d, nn.Conv2d]
    assert model[0].halo_width == 1
    assert not _needs_halo_conv2d(model[1])
    assert get_domain_manager(model) is manager


# A program

PROGRAM = '''
"""A training program as its author wrote it for the reference."""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from credit.domain_parallel import convert_to_domain_parallel, initialize_domain_parallel
from credit.domain_parallel.layers import DomainParallelPeriodicConv2d
from credit.domain_parallel.manager import get_domain_parallel_manager
from credit.parallel import (
    apply_fsdp2,
    apply_tensor_parallel,
    build_device_mesh,
    get_domain_manager,
    get_raw_model,
    shard_spatial,
    sync_domain_gradients,
    unpad_shard_interp,
)
from credit.parallel.collectives import all_reduce_avg, clip_grad_norm_
from credit.parallel.domain import gather_spatial, shard_lat_weights
from credit.parallel.mesh import data_parallel_coords, get_dp_group, parse_parallelism_conf, register_dp_group
from credit.parallel.tensor_parallel import sync_replicated_gradients

WIDTH, SAMPLES, STEPS = 6, 4, 3


class Padding:
    pad_NS, pad_WE = (3, 1), (2, 2)

    def pad(self, x):
        x = F.pad(x, (*self.pad_WE, 0, 0), mode="circular")
        return F.pad(x, (0, 0, *self.pad_NS), mode="reflect")


class PeriodicConv2d(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.padding = 1
        self.conv = nn.Conv2d(inputs, outputs, 3)

    def forward(self, x):
        x = F.pad(x, (1, 1, 0, 0), mode="circular")
        return self.conv(F.pad(x, (0, 0, 1, 1), mode="reflect"))


class Block(nn.Module):
    _tp_col, _tp_row = "up", "down"
    _fsdp2_shard = True

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.up, self.down = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = PeriodicConv2d(2, 4)
        self.block = Block(4)
        self.down = nn.Conv2d(4, 4, 4, 2, 1)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        x = self.block(self.stem(x))
        return self.head(torch.cat([x, self.up(F.gelu(self.down(x)))], 1))


def build():
    torch.manual_seed(1)
    return Net().double()


def data(height):
    generator = torch.Generator().manual_seed(2)
    fields = torch.randn(STEPS, SAMPLES, 3, 2, height, WIDTH, dtype=torch.float64, generator=generator)
    weights = torch.linspace(0.5, 1.5, height, dtype=torch.float64)
    return fields, weights / weights.mean()


def criterion(prediction, target, weights):
    weights = shard_lat_weights(weights, target.shape[-2])
    return ((prediction - target) ** 2 * weights[:, None]).mean()


def wrap(model, conf):
    parallelism = parse_parallelism_conf(conf)
    mesh, submeshes = build_device_mesh(parallelism, device="cpu")
    if submeshes.get("dp"):
        register_dp_group(submeshes["dp"].get_group())
    if submeshes.get("domain"):
        manager = initialize_domain_parallel(dist.get_world_size(), parallelism["domain"])
        converters = {PeriodicConv2d: lambda m: DomainParallelPeriodicConv2d(m)}
        model = convert_to_domain_parallel(model, manager, custom_converters=converters)
    if submeshes.get("tp"):
        model = apply_tensor_parallel(model, submeshes["tp"])
    if parallelism["data"] == "fsdp2":
        model = apply_fsdp2(model, submeshes.get("dp"), conf)
    elif parallelism["data"] == "ddp" and submeshes.get("dp"):
        model = nn.parallel.DistributedDataParallel(model, process_group=submeshes["dp"].get_group())
    return model, submeshes


def train(conf, height):
    model, submeshes = wrap(build(), conf)
    manager, padding = get_domain_manager(model), Padding()
    assert manager is get_domain_parallel_manager()
    dp_rank, dp_size = data_parallel_coords(conf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fields, weights = data(height)
    losses, gradients = [], []
    for batch in fields:
        batch = batch[dp_rank :: dp_size]
        x, total = batch[:, 0], 0.0
        for t in (1, 2):  # a rollout
            prediction = model(shard_spatial(padding.pad(x), manager))
            prediction = unpad_shard_interp(prediction, padding, manager, height, WIDTH)
            target = shard_spatial(batch[:, t], manager)
            loss = criterion(prediction, target, weights)
            scaler.scale(loss).backward()
            total = total + loss.detach()
            x = gather_spatial(prediction.detach(), manager)
        sync_domain_gradients(model, manager)
        if submeshes.get("tp"):
            sync_replicated_gradients(model, submeshes["tp"].get_group())
        scaler.unscale_(optimizer)
        gradients.append({n: whole(p.grad) for n, p in get_raw_model(model).named_parameters()})
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--domain", type=int, default=1)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=size)
    result = train({"trainer": {"parallelism": {"data": "ddp", "tensor": 1, "domain": args.domain}}}, 16)
    torch.save(result, f"{args.out}/{rank}.pt")
    dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("program") / "train.py"
    file.write_text(PROGRAM)
    return file


def on_one_rank(program, height):
    """The same training in plain torch."""
    dropin.install()
    own = SimpleNamespace(**runpy.run_path(str(program), run_name="program"))
    dropin.uninstall()
    model, padding = own.build(), own.Padding()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fields, weights = own.data(height)
    losses, gradients = [], []
    for batch in fields:
        x, total = batch[:, 0], 0.0
        for t in (1, 2):
            prediction = model(padding.pad(x))
            prediction = prediction[..., 3:-1, 2:-2]
            loss = ((prediction - batch[:, t]) ** 2 * weights[:, None]).mean()
            loss.backward()
            total, x = total + float(loss.detach()), prediction.detach()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, gradients


def run_program(rank, file, conf, height, uneven):
    dropin.install()
    program = runpy.run_path(str(file), run_name="program")
    if uneven:  # the one thing that must change where rows do not divide: the mean
        from credit_parallel import domain_mean

        def criterion(prediction, target, weights):
            return domain_mean((prediction - target) ** 2, weights=weights)

        program["train"].__globals__["criterion"] = criterion
    return program["train"](conf, height)


def compare(results, expected):
    losses, gradients = expected
    for own_losses, own_gradients in results:
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=1e-9, atol=1e-11)
        for own, all_of in zip(own_gradients, gradients, strict=True):
            assert set(own) == set(all_of)
            for name, gradient in all_of.items():
                error = (own[name] - gradient).abs().max() / gradient.abs().max()
                assert error < 1e-9, f"{name}: {error}"


LAYOUTS = [
    ("ddp", 1, 2, 16, False, {}),
    ("ddp", 1, 4, 16, False, {}),  # 20 padded rows in blocks of 2: 6, 6, 4, 4, but 4 of the target on each rank
    ("ddp", 1, 4, 14, True, {}),
    ("ddp", 2, 2, 16, False, {}),  # whose gradients are DTensors and plain tensors
    ("fsdp2", 1, 2, 16, False, {}),
    ("fsdp2", 1, 4, 16, False, {"activation_checkpoint": True}),  # folded: dp has one rank
    ("fsdp2", 2, 2, 14, True, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "tensor", "domain", "height", "uneven", "trainer"), LAYOUTS, ids=str)
def test_a_program_on_four_ranks_trains_like_one(program, mode, tensor, domain, height, uneven, trainer):
    conf = {"trainer": {"parallelism": {"data": mode, "tensor": tensor, "domain": domain}, **trainer}}
    results = run_processes(run_program, 4, program, conf, height, uneven, timeout=120)
    compare(results, on_one_rank(program, height))


# The command


def environment(**more):
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    } | more


def command(*arguments, cwd, launcher=("-m", "credit_parallel.dropin")):
    line = [sys.executable, *launcher, *arguments]
    return subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_program_started_as_torchrun_does(program, tmp_path):
    """Each rank by its environment; the ranks meet through a file."""
    ranks = []
    for rank in range(2):
        arguments = ["--rendezvous", str(tmp_path / "meet"), "--domain", "2", "--out", str(tmp_path)]
        line = [sys.executable, "-u", "-m", "credit_parallel.dropin", str(program), *arguments]
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        ranks.append(subprocess.Popen(line, env=environment(**names), stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    compare([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], on_one_rank(program, 16))


SCRIPT = """
import json, multiprocessing, os, sys
from helper import WHO
from credit.parallel.mesh import build_device_mesh

def work(x):
    from credit.parallel.mesh import build_device_mesh
    return [build_device_mesh.__module__, x]

class Thing:
    pass

if __name__ == "__main__":
    import pickle
    assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
    worked = []
    if "spawn" in sys.argv:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            worked = pool.map(work, [3])
    print(json.dumps([sys.argv, __name__, __file__, sys.path[0], worked, build_device_mesh.__module__]))
    sys.exit(5)
"""


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("WHO = 'helper'\n")
    return folder / "script.py"


@pytest.mark.slow
def test_the_command_runs_a_script(script, tmp_path):
    done = command("scripts/script.py", "-m", "spawn", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    argv, name, file, path, worked, mesh = json.loads(done.stdout)
    assert (argv, name, file) == (["scripts/script.py", "-m", "spawn"], "__main__", str(script))
    assert path == str(script.parent)
    assert worked == [["credit_mesh.mesh", 3]]
    assert mesh == "credit_mesh.mesh"


@pytest.mark.slow
def test_the_command_runs_a_module(script):
    done = command("-m", "script", "--a", cwd=script.parent)
    assert done.returncode == 5, done.stderr
    argv, name, file, path, _, mesh = json.loads(done.stdout)
    assert (argv, name, file, path) == ([str(script), "--a"], "__main__", str(script), str(script.parent))
    assert mesh == "credit_mesh.mesh"


CASES = [["fails.py"], ["wrong.py"], ["says.py"], ["nosuch.py"], ["-m", "fails"], ["folder"]]

# One process that imports torch; python itself ends each of the forked ones.
DRIVER = """
import json, os, sys
from credit_parallel.dropin.program import main

for i, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{i}.err", os.O_WRONLY | os.O_CREAT), 2)
        main(arguments)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_tracebacks_and_statuses_are_those_of_python(tmp_path):
    (tmp_path / "fails.py").write_text("def fail():\n    raise RuntimeError('as meant')\n\n\nfail()\n")
    (tmp_path / "wrong.py").write_text("def (:\n")
    (tmp_path / "says.py").write_text("raise SystemExit('a message')\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text("import beside\nbeside.fail()\n")
    (tmp_path / "folder" / "beside.py").write_text("def fail():\n    raise KeyError('as meant')\n")
    cases = [*CASES, ["-m", "nosuch"], [], ["--help"], ["-x", "fails.py"], ["-m"]]
    done = command(json.dumps(cases), cwd=tmp_path, launcher=("-c", DRIVER))
    statuses = [int(line) for line in done.stdout.split()]
    errors = [(tmp_path / f"{i}.err").read_text().splitlines() for i in range(len(cases))]
    for arguments, status, error in zip(CASES, statuses, errors, strict=False):
        theirs = command(*arguments, cwd=tmp_path, launcher=())
        assert status == theirs.returncode != 0
        # Of what runs a module python shows its frames.
        assert error == [line for line in theirs.stderr.splitlines() if "frozen runpy" not in line]
    nosuch, *usages = errors[len(CASES) :]
    assert "No module named nosuch" in nosuch[-1]
    assert all(error[0].startswith("usage:") for error in usages)
    assert statuses[len(CASES) :] == [1, 2, 0, 2, 2]
