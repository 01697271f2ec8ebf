"""Private names of torch: where they may stand, what the page says of them, and what happens where one is gone."""

import ast
import copy
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import Variable
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_domain import _torch_private as in_domain
from credit_domain import convert_to_domain_parallel, shard_tensor
from credit_domain.casts import cast_module
from credit_domain.model.rules import decide
from credit_domain.model.saved_names import with_plain_names
from credit_halo import _torch_private as in_halo
from credit_halo.extend import group_by_name
from credit_halo.testing import run_threads
from credit_mesh import initialize_domain_parallel
from credit_parallel import _torch_private as in_parallel
from credit_parallel.domain import get_raw_model

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
MODULES = [path for path in SOURCES if path.name == "_torch_private.py"]
PAGE = ROOT / "docs" / "private-names.md"
QUOTED = r"torch\.[\w.]*\._[\w.]+|_\w+\.?"
PYTHONS = ("__call__", "__dict__", "__name__", "__version__")

# Where the names are


def private_parts(dotted):
    """The parts of a dotted name with an underscore, and the last part; nothing for a public name."""
    parts = dotted.strip(".").split(".")
    private = {part for part in parts if part.startswith("_") and part not in PYTHONS}
    return private | {parts[-1]} if private else set()


def torch_imports(tree):
    """What an import takes from torch, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "torch")


def names_in(path):
    """The private names that a module of them has, by their parts."""
    tree = ast.parse(path.read_text())
    stored = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    own = {name for name in stored if name.startswith("_")}
    texts = [name for _, name in torch_imports(tree)]
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            texts += re.findall(r"[\w.]+", ast.unparse(node))
        elif isinstance(node, ast.Constant) and re.fullmatch(QUOTED, str(node.value)):
            texts.append(node.value)
    found = set().union(*(private_parts(text) for text in texts if text.split(".")[0] not in own))
    return {name for name in found if not name.startswith("_credit")}


def names_of_torch():
    """Names with an underscore that torch's classes have, and those in the modules of private names."""
    kinds = (nn.Module, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.Sequential, nn.Parameter, DTensor)
    kinds += (DeviceMesh, DistributedDataParallel, torch.optim.AdamW, torch.distributed.ProcessGroup)
    objects = (nn.Module(), nn.ConvTranspose2d(1, 1, 1), torch.library.CustomOpDef)
    found = {name for each in (*kinds, *objects) for name in dir(each)}
    found |= {name for path in MODULES for name in names_in(path)}
    return {name for name in found if name.startswith("_") and (not name.endswith("__") or "chunk" in name)}


def own_names(tree):
    """What a module or its classes define under names that torch may have too."""
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return functions | {node.attr for node in stored if ast.unparse(node.value) in ("self", "cls")}


def used_outside(source, theirs):
    """Each use of a private name of torch in a module."""
    tree = ast.parse(source)
    roots = {"torch"} | {name.split(".")[-1] for _, name in torch_imports(tree)}
    theirs = theirs - own_names(tree)
    for line, name in torch_imports(tree):
        if private_parts(name):
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of_torch = ast.unparse(node.value).split(".")[0] in roots and not node.attr.endswith("__")
            if of_torch or node.attr in theirs:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and str(node.value).rstrip(".") in theirs:
            yield node.lineno, repr(node.value)


def test_private_names_are_used_in_their_modules_alone():
    theirs = names_of_torch()
    outside = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        if path not in MODULES
        for line, name in used_outside(path.read_text(), theirs)
    ]
    assert len(MODULES) == 3
    assert not outside, "\n".join(
        ["move these to _torch_private.py, and tell of them in docs/private-names.md", *outside]
    )


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C.f()",
        "import torch._dynamo",
        "from torch._inductor import ir",
        "from torch.nn.modules.conv import _ConvNd",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "from torch.distributed import distributed_c10d\ndistributed_c10d._anything",
        "def f(module):\n    return module._modules",
        "def f(x):\n    return getattr(x, '_version')",
    ],
)
def test_a_private_name_elsewhere_is_found(source):
    assert list(used_outside(source, names_of_torch()))


def test_the_page_lists_the_private_names():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    parts = set().union(*map(private_parts, listed))
    used = set().union(*map(names_in, MODULES))
    assert not used - parts, "not on the page"
    assert not parts - used, "on the page, and not used"
    assert len(listed) == len(set(listed))


def test_errors_call_names_as_the_page_does():
    page = PAGE.read_text()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            text = str(node.value) if isinstance(node, ast.Constant) else ""
            if text.startswith("torch.") and re.fullmatch(QUOTED, text):
                assert f"`{text}`" in page, text


# What happens where one is gone


@pytest.fixture
def hide(monkeypatch):
    """Take an attribute away."""
    return monkeypatch.delattr


@pytest.fixture
def hide_of_tensors(monkeypatch):
    """Take an attribute of tensors away, which torch's own class is too fixed for."""

    def hide(name):
        def missing(self):
            raise AttributeError(name)

        monkeypatch.setattr(torch.Tensor, name, property(missing), raising=False)

    return hide


def refused(name):
    """The error says what is gone, from which torch, and what to do."""
    return pytest.raises(RuntimeError, match=rf"torch {re.escape(torch.__version__)} has no .*{name}.*compatibility.md")


def test_without_resolve_process_group(hide):
    hide(distributed_c10d, "_resolve_process_group")
    with refused("_resolve_process_group"):
        group_by_name("0")


def test_without_the_map_of_groups(hide):
    hide(distributed_c10d, "_world")
    with refused("_world.pg_map"):
        in_halo.groups_of_process()


@torch.library.custom_op("credit_private_names::copy", mutates_args=())
def operator(x: torch.Tensor) -> torch.Tensor:
    """An operator that has an order."""
    return x.clone()


@pytest.fixture
def waiting(monkeypatch):
    """The operators that inductor was not told of yet."""
    operators = [operator]
    monkeypatch.setattr(in_halo, "_waiting", operators)
    return operators


def test_without_a_context_of_tracing_inductor_is_prepared(hide, monkeypatch, waiting):
    told = []
    monkeypatch.setattr(in_halo, "_lower_in_order", told.append)
    in_halo.prepare_inductor()
    assert (told, waiting) == ([], [operator])
    hide(torch._guards, "TracingContext")
    in_halo.prepare_inductor()
    assert (told, waiting) == ([torch.ops.credit_private_names.copy.default], [])


@pytest.mark.parametrize(
    "name",
    [
        "torch._inductor.ir.MultiOutput",
        "torch._inductor.lowering.lowerings",
        "torch._inductor.lowering.make_fallback",
        "torch._inductor.lowering.tag_to_layout_constraint",
        "torch._inductor.virtualized.V",
        "torch._library.utils.get_layout_constraint_tag",
    ],
)
@pytest.mark.parametrize("whole", [False, True], ids=["name", "module"])
def test_without_a_part_of_inductor(hide, monkeypatch, waiting, name, whole):
    module, _, last = name.rpartition(".")
    monkeypatch.setattr(in_halo, "_tracing", lambda: True)
    __import__(module)
    if whole:
        monkeypatch.setitem(sys.modules, module, None)
    else:
        hide(sys.modules[module], last)
    for _ in range(2):  # not only the first time
        with refused(module if whole else last):
            in_halo.prepare_inductor()
    assert waiting == [operator]


def test_without_the_overload_of_an_operator(monkeypatch, waiting):
    monkeypatch.setattr(in_halo, "_tracing", lambda: True)
    waiting[:] = [object()]
    with refused("_opoverload"):
        in_halo.prepare_inductor()


@pytest.mark.parametrize("gone", ["operations", "additional_buffer_deps"])
def test_without_what_orders_the_operations_of_a_graph(monkeypatch, waiting, gone):
    from torch._inductor import lowering, virtualized

    monkeypatch.setattr(in_halo, "_tracing", lambda: True)
    graph = {name: value for name, value in (("operations", []), ("additional_buffer_deps", {})) if name != gone}
    monkeypatch.setattr(virtualized, "V", SimpleNamespace(graph=SimpleNamespace(**graph)))
    in_halo.prepare_inductor()
    lower = lowering.lowerings.pop(torch.ops.credit_private_names.copy.default)
    with refused(gone):
        lower(torch.ones(1))


COMPILED = """
    import torch
    import torch._library.utils

    del torch._library.utils.get_layout_constraint_tag
    from credit_halo import all_sum

    torch.distributed.init_process_group("gloo", init_method="file://{path}", rank=0, world_size=1)
    group = torch.distributed.group.WORLD

    def f(x):
        return 2 * all_sum(x, group)

    assert f(torch.ones(3)).tolist() == [2, 2, 2]
    try:
        torch.compile(f, backend="aot_eager", fullgraph=True)(torch.ones(3))
    except Exception as error:
        assert "get_layout_constraint_tag" in str(error) and "compatibility.md" in str(error), error
    else:
        raise AssertionError("compiled, and in which order is not known")
"""


def test_compiled_code_is_refused_without_a_part_of_inductor(tmp_path):
    code = textwrap.dedent(COMPILED).format(path=tmp_path / "meet")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("_parameters", in_domain.parameters_of),
        ("_buffers", in_domain.buffers_of),
        ("_modules", in_domain.children_of),
        ("_forward_pre_hooks", in_domain.pre_hooks_of),
    ],
)
def test_without_a_dict_of_modules(name, ask):
    module = nn.Linear(2, 2)
    assert ask(module) is vars(module).pop(name)
    with refused(f"torch.nn.Module.{name}"):
        ask(module)


@pytest.mark.parametrize("name", ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"])
def test_a_copy_that_is_traced_needs_the_dicts_of_hooks(name):
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    in_domain.drop_hooks(module)
    assert not module._forward_hooks
    del vars(module)[name]
    with refused(f"torch.nn.Module.{name}"):
        in_domain.drop_hooks(module)


def test_without_tensors_that_hold_no_memory(monkeypatch):
    assert in_domain.fake_mode() is not None
    monkeypatch.delattr("torch._subclasses.FakeTensorMode")
    with refused("torch._subclasses.FakeTensorMode"):
        in_domain.fake_mode()


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_modules"])
def test_a_layer_shares_all_that_a_module_has_or_is_refused(monkeypatch, name):
    monkeypatch.setattr(in_domain, "SHARED", tuple(shared for shared in in_domain.SHARED if shared != name))
    with refused(f"torch.nn.Module.{name}"):
        convert_to_domain_parallel(nn.Conv2d(1, 1, 3), SimpleNamespace(domain_parallel_size=2, granularity=1))


def test_without_the_version_of_tensors_none_is_taken_for_one_seen_before(hide_of_tensors):
    x = torch.randn(1, 2, 12, 8, dtype=torch.float64)
    first, second = (nn.Conv2d(2, 2, 3, padding=1).double() for _ in range(2))
    assert in_domain.version_of(x) == in_domain.version_of(x)
    with torch.no_grad():
        whole = first(x) + second(x)
    hide_of_tensors("_version")
    assert in_domain.version_of(x) != in_domain.version_of(x)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.first(x) + self.second(x)

    def rank(_):
        manager = initialize_domain_parallel(2, 2)
        model = convert_to_domain_parallel(copy.deepcopy(Branches()), manager, check=False)
        own = shard_tensor(x, -2, manager)
        with torch.no_grad():
            return [model(own) for _ in range(3)]

    for parts in zip(*run_threads(rank, 2), strict=True):
        torch.testing.assert_close(torch.cat(parts, -2), whole)


def test_without_apply(hide):
    hide(nn.Module, "_apply")
    with refused("torch.nn.Module._apply"):
        cast_module(nn.Linear(2, 2), torch.float64)


def test_without_conv_forward_subclasses_are_refused(hide):
    class Own(nn.Conv2d):
        pass

    assert decide(Own(1, 1, 3), -2).fate == "converted"
    for kind in (nn.Conv2d, nn.Conv2d.__base__):
        hide(kind, "_conv_forward")
    assert decide(nn.Conv2d(1, 1, 3), -2).fate == "converted"
    with refused("torch.nn.Conv2d._conv_forward"):
        decide(Own(1, 1, 3), -2)


def test_without_metadata_of_a_state_dict():
    model = nn.Sequential(nn.Conv2d(1, 1, 3))
    state = {"0.conv.weight": model[0].weight, "0.conv.bias": model[0].bias}
    assert set(with_plain_names(model, state)) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("kind", "name", "ask"),
    [
        (DeviceMesh, "_flatten", lambda mesh: in_parallel.flatten(mesh, "all")),
        (DeviceMesh, "_get_root_mesh", in_parallel.root_of),
    ],
)
def test_without_a_name_of_meshes(hide, kind, name, ask):
    hide(kind, name)
    with refused(f"DeviceMesh.{name}"):
        ask(kind.__new__(kind))


def test_without_chunks_of_a_sharded_tensor(hide):
    hide(DTensor, "__create_chunk_list__")
    local = SimpleNamespace(device_mesh=SimpleNamespace(get_coordinate=lambda: [0]))
    assert not hasattr(DTensor, "__create_chunk_list__")
    with refused("DTensor.__create_chunk_list__"):
        in_parallel.offsets_of(local)


def test_without_the_engine(hide):
    hide(Variable, "_execution_engine")
    with refused("_execution_engine.queue_callback"):
        in_parallel.after_backward(lambda: None)


def test_without_the_number_of_a_backward(hide):
    hide(torch._C, "_current_graph_task_id")
    with refused("torch._C._current_graph_task_id"):
        in_parallel.current_backward()


@pytest.fixture
def ask_ddp_again():
    """What DDP was seen to do is forgotten."""
    in_parallel._tell_ddp.cache_clear()
    yield
    in_parallel._tell_ddp.cache_clear()


@pytest.mark.usefixtures("ask_ddp_again")
@pytest.mark.parametrize(
    "ask", [lambda module: in_parallel.leave_to_others(module, ["weight"]), in_parallel.left_to_others]
)
def test_without_a_way_to_tell_ddp(hide, monkeypatch, ask):
    name = "_set_params_and_buffers_to_ignore_for_model"
    with monkeypatch.context() as context:
        context.delattr(DistributedDataParallel, name)
        with refused(name):
            ask(nn.Linear(1, 1))
    other = staticmethod(lambda module, names: setattr(module, "_elsewhere", names))
    monkeypatch.setattr(DistributedDataParallel, name, other)
    with refused("_ddp_params_and_buffers_to_ignore"):
        ask(nn.Linear(1, 1))


def test_without_base_every_tensor_counts_as_a_view(hide_of_tensors):
    x = torch.ones(2)
    assert not in_parallel.is_view(x)
    hide_of_tensors("_base")
    assert in_parallel.is_view(x)


def test_without_the_module_in_a_compiled_one():
    model = nn.Linear(1, 1)
    assert get_raw_model(torch.compile(model, backend="eager")) is model
    assert get_raw_model(model) is model

    class OptimizedModule(nn.Module):
        pass

    with refused("_orig_mod"):
        get_raw_model(OptimizedModule())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64], ids=str)
def test_without_functions_of_many_tensors_they_are_taken_one_by_one(hide, dtype):
    values = [torch.randn(4, 3).to(dtype), torch.randn(5).to(dtype)]
    exact = torch.promote_types(dtype, torch.float32)

    def results():
        copied = [torch.zeros_like(value) for value in values]
        in_parallel.copy_all(copied, values)
        in_parallel.scale_all(copied, torch.tensor(0.5))
        norms = [norm.abs() for p in (1.0, 2.0, float("inf")) for norm in in_parallel.norms_of(values, p, exact)]
        return [*copied, *norms]

    expected = results()
    for name in ("_foreach_copy_", "_foreach_mul_", "_foreach_norm"):
        hide(torch, name)
    torch.testing.assert_close(results(), expected)
