"""The files of checkpoints: openable by anybody's tools, exact in every dtype, written tensor by tensor."""

from __future__ import annotations

import ast
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_parallel_checkpoint import make, on
from test_parallel_context import conf_of
from torch import nn

import credit_parallel.checkpoint
from credit_halo.testing import run_processes, run_threads
from credit_parallel import parallelize
from credit_parallel.checkpoint import export_plain, latest, load_checkpoint, load_plain, save_checkpoint, tensor_files
from credit_parallel.checkpoint.tensor_files import Piece, write_tensors

FLOATS = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]
WHOLE = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
COMPLEX = [torch.complex128, torch.complex64, torch.complex32]
DTYPES = [*FLOATS, *WHOLE, *COMPLEX, torch.bool]
NATIVE = [*FLOATS[:6], *WHOLE[:5], torch.bool]
"""Those that safetensors has had since 0.4.3."""

half_complex = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def values_of(dtype):
    whole = torch.tensor([[0.0, 1, 2], [4, 8, 16]], dtype=torch.float64)
    return (torch.complex(whole, -whole) if dtype.is_complex else whole).to(dtype)


class Odd(nn.Module):
    """A buffer of each dtype, one without elements, and a scalar."""

    def __init__(self, *, filled=True):
        super().__init__()
        for dtype in DTYPES:
            values = values_of(dtype)
            self.register_buffer(f"of_{str(dtype)[6:]}", values if filled else torch.empty_like(values))
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5 if filled else 0.0, dtype=torch.float64))


def assert_filled(state):
    filled = Odd().state_dict()
    assert state.keys() == filled.keys()
    for name, value in filled.items():
        assert state[name].dtype == value.dtype
        assert state[name].shape == value.shape
        assert torch.equal(state[name].contiguous().flatten().view(torch.uint8), value.flatten().view(torch.uint8)), (
            name
        )


def load_and_look(rank, folder):
    model = Odd(filled=False)
    assert load_checkpoint(folder, model).step == 1
    assert_filled(model.state_dict())


@half_complex
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_dtype_comes_back_bit_for_bit(asynchronous, tmp_path):
    save_checkpoint(tmp_path, Odd(), step=1, asynchronous=asynchronous).wait()
    load_and_look(0, tmp_path)
    run_threads(load_and_look, 2, tmp_path)


@half_complex
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_every_dtype_is_exported(form, tmp_path):
    save_checkpoint(tmp_path / "steps", Odd(), step=1)
    export_plain(tmp_path / "steps", tmp_path / "plain", format=form)
    model = Odd(filled=False)
    assert load_plain(tmp_path / "plain", model) == ([], [])
    assert_filled(model.state_dict())


@half_complex
def test_anybody_can_open_a_file(tmp_path):
    """With the values of most dtypes as they are; complex numbers are pairs, and others integers of the same bits."""
    step = save_checkpoint(tmp_path, Odd(), step=1).folder
    file = load_file(step / "rank-00000.safetensors")
    for dtype in DTYPES:
        found, values = file[f"model/of_{str(dtype)[6:]}"], values_of(dtype)
        expected = torch.view_as_real(values) if dtype.is_complex else values
        if dtype not in (*NATIVE, *COMPLEX):
            assert not found.dtype.is_floating_point
            expected = values.view(found.dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert file["model/none"].shape == (0, 3)
    assert file["model/scalar"] == 2.5
    with safe_open(step / "rank-00000.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        named = json.loads(opened.metadata()["dtypes"])
        assert named == {f"model/of_{str(d)[6:]}": str(d)[6:] for d in DTYPES if d not in NATIVE}
        assert torch.equal(opened.get_slice("model/of_float32")[1:], values_of(torch.float32)[1:])


def test_the_files_of_ranks_add_up(tmp_path):
    on(("fsdp2", 1, 1, 3), "adamw", 0, None, tmp_path, 1)
    parts = [load_file(path) for path in sorted(latest(tmp_path).glob("*.safetensors"))]
    assert len(parts) == 3
    export_plain(tmp_path, tmp_path / "plain.pt")
    for name, whole in torch.load(tmp_path / "plain.pt", weights_only=True).items():
        found = [part[f"model/{name}"] for part in parts if f"model/{name}" in part]
        torch.testing.assert_close(torch.cat(found) if whole.ndim else found[0], whole, rtol=0, atol=0)


def refused(rank, folder):
    model = nn.Linear(2, 2)
    if rank == 1:
        packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        model.packed = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"on rank 1: .*such dtypes: model/packed \(float4_e2m1fn_x2\)"):
        save_checkpoint(folder, model, step=1)
    return latest(folder)


def test_other_dtypes_are_refused_on_all_ranks(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("packed", torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    with pytest.raises(ValueError, match=r"such dtypes: model/packed \(float4_e2m1fn_x2\)"):
        save_checkpoint(tmp_path, model, step=1)
    assert run_threads(refused, 2, tmp_path) == [None, None]


def test_a_file_is_written_with_one_tensor_in_memory(tmp_path):
    """None is kept once it is written, and a file of the library's own has the same tensors."""
    alive, most = weakref.WeakSet(), 0

    class Data(torch.Tensor):
        pass

    def get(i):
        nonlocal most
        tensor = torch.full((1000,), float(i)).as_subclass(Data)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    pieces = [Piece(f"part {i}", torch.float32, (1000,), lambda i=i: get(i)) for i in range(8)]
    size, _ = write_tensors(tmp_path / "a.safetensors", pieces, "a test")
    assert (tmp_path / "a.safetensors").stat().st_size == size
    assert most <= 2
    tensors = {f"part {i}": torch.full((1000,), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "b.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors"), tensors, rtol=0, atol=0)
    torch.testing.assert_close(load_file(tmp_path / "b.safetensors"), tensors, rtol=0, atol=0)


def test_values_of_every_size_are_aligned(tmp_path):
    """Whatever the order of the tensors, and however long their names are."""
    for extra in range(9):
        pieces = [
            Piece("x" * extra + str(i), dtype, (3,), lambda dtype=dtype: torch.arange(3).to(dtype))
            for i, dtype in enumerate((torch.bool, torch.float64, torch.int16, torch.float32, torch.uint8, torch.int64))
        ]
        write_tensors(tmp_path / f"{extra}.safetensors", pieces, "a test")
        content = (tmp_path / f"{extra}.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for piece in pieces:
            assert (start + header[piece.name]["data_offsets"][0]) % piece.dtype.itemsize == 0


def test_names_that_no_program_would_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_LONGEST_HEADER", 200)
    with pytest.raises(Exception, match="would have a header of .* bytes; safetensors takes 200"):
        save_checkpoint(tmp_path, nn.Linear(2, 2), step=1)
    assert latest(tmp_path) is None
    assert not list(tmp_path.glob("step*"))


def test_what_is_loaded_is_no_part_of_the_file(tmp_path):
    step = save_checkpoint(tmp_path, nn.Linear(2, 2), step=1, extra=torch.arange(3)).folder
    before = (step / "rank-00000.safetensors").read_bytes()
    extra = load_checkpoint(tmp_path, nn.Linear(2, 2)).extra
    extra += 5
    assert (step / "rank-00000.safetensors").read_bytes() == before


# Plain files


@pytest.mark.parametrize("layout", [("fsdp2", 1, 1, 3), ("fsdp2", 1, 2, 2), ("ddp", 2, 1, 1)], ids=str)
def test_a_plain_safetensors_file(layout, tmp_path):
    on(layout, "sgd", 0, None, tmp_path / "steps", 1)
    export_plain(tmp_path / "steps", tmp_path / "out.pt")
    export_plain(tmp_path / "steps", tmp_path / "out.safetensors")
    expected = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors"), expected, rtol=0, atol=0)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "content": "state dict of a plain model"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pt", "out.safetensors", "steps"]
    run_processes(load_plain_on_ranks, 2, tmp_path, fork=True)
    export_plain(tmp_path / "again", tmp_path / "again.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "again.safetensors"), expected, rtol=0, atol=0)


def load_plain_on_ranks(rank, folder):
    context = parallelize(make(3 + rank), conf_of("fsdp2", 1, 1))
    assert load_plain(folder / "out.safetensors", context) == ([], [])
    context.save(folder / "again", step=1)


def test_files_of_other_programs(tmp_path):
    """Of wrapped models too, and whatever their names end in."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    save_file({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "weights.bin")
    assert load_plain(tmp_path / "weights.bin", other) == ([], [])
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(ValueError, match="there is no state dict under 'ema'; there are module.bias, module.weight"):
        load_plain(tmp_path / "weights.bin", other, key="ema")


class Noted(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def test_what_a_safetensors_file_cannot_hold(tmp_path):
    save_checkpoint(tmp_path / "steps", Noted(2, 2), step=1)
    with pytest.raises(ValueError, match="holds tensors alone.* also has _extra_state: write it with format='torch'"):
        export_plain(tmp_path / "steps", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps"]
    export_plain(tmp_path / "steps", tmp_path / "out", format="torch")
    assert torch.load(tmp_path / "out", weights_only=True)["_extra_state"] == {"seen": 3}
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.zeros(2)))
    save_checkpoint(tmp_path / "named", model, step=1)
    with pytest.raises(ValueError, match="none of the name __metadata__"):
        export_plain(tmp_path / "named", tmp_path / "named.safetensors")
    with pytest.raises(ValueError, match="format must be 'safetensors', 'torch' or None; got 'zip'"):
        export_plain(tmp_path / "steps", tmp_path / "out", format="zip")
    with pytest.raises(ValueError, match=r"torch.load would not read .*other.safetensors"):
        export_plain(tmp_path / "steps", tmp_path / "other.safetensors", format="torch")


# Imports


def test_checkpoints_do_not_import_the_context():
    """Which imports them."""
    for path in Path(credit_parallel.checkpoint.__file__).parent.glob("*.py"):
        imported = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"credit_parallel", "credit_parallel.context"}, path.name
