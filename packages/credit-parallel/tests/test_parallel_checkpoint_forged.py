"""Checkpoints that someone has changed, checksums included: they load, or are refused by name; nothing in between."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parallel_former_format import as_former, write_index
from torch import nn

from credit_halo.testing import run_threads
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training.experiment import check
from credit_parallel.app.training.loop import train
from credit_parallel.checkpoint import (
    CheckpointError,
    NewerFormatError,
    export_plain,
    latest,
    load_checkpoint,
    load_plain,
    save_checkpoint,
)
from credit_parallel.checkpoint.json_values import DEEPEST

EXTRA = {"best": 0.5, "when": ("a", [None, True, {1: 2.5}]), "tensor": torch.arange(3), "worst": float("inf")}


class Training:
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.model(torch.randn(5, 3)).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()

    def save(self, folder, step):
        return save_checkpoint(folder, self.model, self.optimizer, step=step, scheduler=self.scheduler, extra=EXTRA)

    def load(self, folder):
        return load_checkpoint(folder, self.model, self.optimizer, scheduler=self.scheduler)

    def state(self):
        state = self.model.state_dict(), self.optimizer.state_dict()
        return copy.deepcopy(state)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


FORMATS = ["safetensors", "former"]


@pytest.fixture(scope="module", params=FORMATS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        training = Training(step)
        save = training.save(folder, step)
        if request.param == "former":
            as_former(save.folder)
    return folder, training.state()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def fresh(saved, scratch):
    folder = scratch / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[0], folder, ignore=shutil.ignore_patterns(".*"))
    return folder / "step-00000002"


def file_of(step):
    """The name of the only file of tensors."""
    (name,) = json.loads((step / "manifest.json").read_bytes())["files"]
    return name


def paths(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*at, key))


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**62, 2**64, 10**40, -1, 0.5, float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", ".", "..", "../x", "/x", "a/b", "rank-00000.bin", "rank-00000.safetensors", "F32", "I64"]),
    st.sampled_from(["index.json", "model/0.weight", "tuple"]),
    st.sampled_from(["float32", "int64", "complex64", "qint8", "float4_e2m1fn_x2", "Tensor", "bits8", "bool"]),
    st.sampled_from([[], {}, [[]], {"tensor": "model/0.weight"}, {"dict": [[[], 1]]}, {"tuple": 3}, {"other": []}]),
    st.sampled_from([[0], [10**12], [4, 3], [-1, 3], {"dict": []}, {"counter": [[1, "a"], [1, "b"]]}]),
)


def mutate(data, content):
    """The content, changed at one place."""
    everywhere = list(paths(content))
    path = data.draw(st.sampled_from(everywhere))
    if not path:
        return data.draw(ODD)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    how = data.draw(st.sampled_from(["replace", "remove", "twice", "borrow", "near"]))
    if how == "replace" or (how == "near" and type(parent[key]) is not int):
        parent[key] = data.draw(ODD)
    elif how == "near":
        parent[key] += data.draw(st.sampled_from([-64, -8, -1, 1, 8, 64]))
    elif how == "remove":
        del parent[key]
    elif how == "twice" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif how == "twice":
        parent[data.draw(st.sampled_from(["more", "0.weight", "lr", "tensor"]))] = copy.deepcopy(parent[key])
    else:
        other = content
        for part in data.draw(st.sampled_from(everywhere)):
            other = other[part]
        parent[key] = copy.deepcopy(other)
    return content


def loads_or_says_why(step, allowed):
    """Load into another training; the error if there was one, after which nothing of the model is changed."""
    training = Training(9)
    before = training.state()
    error = None
    try:
        training.load(step)
    except allowed as raised:
        error = raised
    if error is None:
        return training.state(), None
    assert str(step) in str(error)
    assert same(training.state(), before)
    return None, error


common = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.slow
@common
@given(st.data(), st.sampled_from(["index.json", "manifest.json"]))
def test_a_file_that_was_changed(saved, scratch, data, name):
    """What does not match its checksum is found out, and keeps nobody from the checkpoint before."""
    step = fresh(saved, scratch)
    changed = mutate(data, json.loads((step / name).read_bytes()))
    (step / name).write_text(json.dumps(changed))
    state, error = loads_or_says_why(step, CheckpointError)
    assert error or same(state, saved[1])
    if "install a later version" in str(error):
        with pytest.raises(NewerFormatError):
            latest(step.parent)
    elif "rank-00000" not in str(error) or "is not what was saved" not in str(error):  # which takes reading all of it
        # An earlier sequence makes an earlier checkpoint.
        assert latest(step.parent).name in (("step-00000001",) if error else ("step-00000001", "step-00000002"))


@pytest.mark.slow
@common
@given(st.data())
def test_an_index_with_a_checksum_that_is_right(saved, scratch, data):
    """Numbers may then be others, and names those of another model; what does not make sense is refused."""
    step = fresh(saved, scratch)
    write_index(step, mutate(data, json.loads((step / "index.json").read_bytes())))
    _, error = loads_or_says_why(step, (CheckpointError, ValueError))
    if isinstance(error, ValueError):
        assert re.search("is of another (model|optimizer)|was saved without", str(error))
    # The state of a generator lies in the bytes of a tensor, which `latest` does not read.
    if isinstance(error, CheckpointError) and not re.search("or of another|random generator", str(error)):
        assert latest(step.parent).name == "step-00000001"
        with pytest.raises(CheckpointError):
            export_plain(step, scratch / "plain.pt")


def changed(step, **tensor):
    index = json.loads((step / "index.json").read_bytes())
    index["tensors"]["model/0.weight"].update(tensor)
    write_index(step, index)


def chunks(step, *boxes, folder=""):
    """Give a tensor other chunks: offsets, sizes, and, which only the former format has, where they begin."""
    former = file_of(step).endswith(".bin")
    changed(step, chunks=[[*box[:2], folder + file_of(step), *(box[2:] if former else ())] for box in boxes])


def manifest_of(step, **entries):
    manifest = json.loads((step / "manifest.json").read_bytes())
    (step / "manifest.json").write_text(json.dumps({**manifest, **entries}))


FORGED = {
    "nested too deeply": lambda s: write_index(s, b"[" * 100_000),
    "manifest.json cannot be read: its blocks are nested": lambda s: (s / "manifest.json").write_text("[" * 100_000),
    "nested 64 times at most": lambda s: forge_value(s, "extra", nested(DEEPEST + 1)),
    "comes twice": lambda s: write_index(s, b'{"tensors": {}, "tensors": {}}'),
    "index.json cannot be read: it is no JSON": lambda s: write_index(s, b"\xff\xfe{"),
    "tensors is missing": lambda s: write_index(s, {"values": {}}),
    "shape must be a list": lambda s: changed(s, shape="43"),
    "shape must be a whole number": lambda s: changed(s, shape=[4, 3.0]),
    "shape must be the shape of a tensor": lambda s: changed(s, shape=[2**40, 2**40], chunks=[]),
    "dtype must be a dtype of torch": lambda s: changed(s, dtype="load"),
    "do not add up": lambda s: changed(s, shape=[4, 10**9]),
    "outside of it": lambda s: chunks(s, ([0, 1], [4, 3], 0)),
    "that overlap": lambda s: chunks(s, ([0, 0], [2, 3], 0), ([1, 0], [2, 3], 64)),
    "names files that are no part": lambda s: chunks(s, ([0, 0], [4, 3], 0), folder="../step-00000001/"),
    "must be offsets, sizes and a file": lambda s: changed(s, chunks=[[[0, 0], [4, 3]]]),
    "files must be names of files in this folder": lambda s: manifest_of(s, files={"../x": [1, 1]}),
    "files.x must be a whole number": lambda s: manifest_of(s, files={"x": [float("inf"), 1]}),
    "sequence must be a whole number": lambda s: manifest_of(s, sequence=True),
    "index must be a SHA-256": lambda s: manifest_of(s, index=None),
    "values.step must be the step of the manifest": lambda s: forge_value(s, "step", 7),
    "tensors.rng/1 is missing": lambda s: forge_value(s, "ranks", 2),
    "values.layout must be three numbers": lambda s: forge_value(s, "layout", [1]),
    "made of pairs whose keys differ": lambda s: forge_value(s, "extra", {"dict": [[1, 2], [1, 3]]}),
    "begins with extra": lambda s: forge_value(s, "extra", {"tensor": "model/0.weight"}),
    "manifest.json is missing": lambda s: ((s / "manifest.json").unlink(), os.mkfifo(s / "manifest.json")),
}


def forge_value(step, key, value):
    index = json.loads((step / "index.json").read_bytes())
    index["values"][key] = value
    write_index(step, index)


def nested(depth):
    return {"dict": [["x", nested(depth - 1)]]} if depth else 1


@pytest.mark.parametrize("message", FORGED)
def test_what_is_forged_is_refused_by_name(saved, scratch, caplog, message):
    step = fresh(saved, scratch)
    FORGED[message](step)
    refused_and_passed_over(step, message, caplog)


def refused_and_passed_over(step, message, caplog):
    _, error = loads_or_says_why(step, CheckpointError)
    assert message in str(error)
    assert latest(step.parent).name == "step-00000001"
    assert message in caplog.text
    assert "it is passed over" in caplog.text


MISPLACED = {"share bytes of": 64, "whole number from 0": -64, "which has": 10**9, "lies at 2": 2}


@pytest.mark.parametrize("saved", ["former"], indirect=True)
@pytest.mark.parametrize("message", MISPLACED)
def test_chunks_of_the_former_format_lie_apart(saved, scratch, caplog, message):
    step = fresh(saved, scratch)
    chunks(step, ([0, 0], [4, 3], MISPLACED[message]))
    refused_and_passed_over(step, message, caplog)


# Headers of safetensors


def rewrite(step, content):
    """Write another file of tensors, and its size and checksum into the manifest."""
    (step / file_of(step)).write_bytes(content)
    manifest_of(step, files={file_of(step): [len(content), zlib.crc32(content)]})


def header_of(content):
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def with_header(header, data):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def weight(content, **entries):
    """The file with another entry for a tensor of 4 x 3 float32."""
    header, data = header_of(content)
    header["model/0.weight"].update(entries)
    return with_header(header, data)


def neighbours(content):
    """The file with a tensor that begins amid another."""
    header, data = header_of(content)
    start, stop = header["model/0.bias"]["data_offsets"]
    header["model/0.bias"]["data_offsets"] = [start - 4, stop - 4]
    return with_header(header, data)


def twice(content):
    """The file with a tensor of two places."""
    header, data = header_of(content)
    entry = header["model/0.weight"]
    other = {**entry, "data_offsets": [0, 48] if entry["data_offsets"][0] else [48, 96]}
    text = json.dumps(header)[:-1] + f', "model/0.weight": {json.dumps(other)}}}'
    return with_header(text.encode(), data)


def renamed(content):
    header, data = header_of(content)
    header["model/0.heavy"] = header.pop("model/0.weight")
    return with_header(header, data)


NO_FILE, HAS = "rank-00000.safetensors cannot be read for", "rank-00000.safetensors has model/0.weight as "
HEADERS = {
    "nothing": (NO_FILE, lambda c: b""),
    "no header": (NO_FILE, lambda c: c[:7]),
    "a huge header": (NO_FILE, lambda c: (1 << 62).to_bytes(8, "little") + c[8:]),
    "a header of 200 MB": (NO_FILE, lambda c: (200 << 20).to_bytes(8, "little") + c[8:]),
    "a header longer than the file": (NO_FILE, lambda c: (len(c) + 1).to_bytes(8, "little") + c[8:]),
    "no JSON": (NO_FILE, lambda c: with_header(b"\xff" * 64, c)),
    "nested": (NO_FILE, lambda c: with_header(b"[" * 1000, c)),
    "cut off": (NO_FILE, lambda c: c[:-4]),
    "more than it says": (NO_FILE, lambda c: c + bytes(4)),
    "offsets that overlap": (NO_FILE, neighbours),
    "offsets beyond the file": (NO_FILE, lambda c: weight(c, data_offsets=[10**9, 10**9 + 48])),
    "offsets that go back": (NO_FILE, lambda c: weight(c, data_offsets=[48, 0])),
    "offsets below zero": (NO_FILE, lambda c: weight(c, data_offsets=[-48, 0])),
    "a shape beyond all numbers": (NO_FILE, lambda c: weight(c, shape=[1 << 40, 1 << 40])),
    "a shape that is too large": (NO_FILE, lambda c: weight(c, shape=[4, 4])),
    "an unknown dtype": (NO_FILE, lambda c: weight(c, dtype="F33")),
    "a dtype of another size": (NO_FILE, lambda c: weight(c, dtype="F64")),
    "another dtype": (
        "has model/0.weight as I32 of shape [4, 3], and index.json as F32",
        lambda c: weight(c, dtype="I32"),
    ),
    "another shape": (
        "has model/0.weight as F32 of shape [3, 4], and index.json as F32",
        lambda c: weight(c, shape=[3, 4]),
    ),
    "a name that comes twice": (NO_FILE, twice),
    "another name": (NO_FILE + " model/0.weight", renamed),
}


@pytest.mark.parametrize("saved", ["safetensors"], indirect=True)
@pytest.mark.parametrize("what", HEADERS)
def test_what_is_forged_in_a_header_is_refused_by_name(saved, scratch, caplog, what):
    step = fresh(saved, scratch)
    message, forge = HEADERS[what]
    rewrite(step, forge((step / file_of(step)).read_bytes()))
    refused_and_passed_over(step, message, caplog)
    assert run_threads(refused_on_ranks, 2, step, message) == [True, True]


def refused_on_ranks(rank, step, message):
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_checkpoint(step, nn.Linear(1, 1), verify=verify)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["safetensors"], indirect=True)
@common
@given(st.data())
def test_a_header_with_a_checksum_that_is_right(saved, scratch, data):
    """Tensors may then have the values of others; what does not make sense is refused."""
    step = fresh(saved, scratch)
    header, content = header_of((step / file_of(step)).read_bytes())
    rewrite(step, with_header(mutate(data, header), content))
    _, error = loads_or_says_why(step, CheckpointError)
    if error and "random generators" not in str(error):
        assert latest(step.parent).name == "step-00000001"


def test_a_forged_plain_file(tmp_path):
    save_checkpoint(tmp_path / "steps", nn.Linear(3, 4), step=1)
    export_plain(tmp_path / "steps", tmp_path / "plain.safetensors")
    good = (tmp_path / "plain.safetensors").read_bytes()
    header, content = header_of(good)
    start, stop = header["weight"]["data_offsets"]
    for forged in (
        good[:-4],
        with_header({**header, "weight": {**header["weight"], "data_offsets": [start, stop + 4]}}, content),
        with_header({**header, "__metadata__": {"dtypes": "[1]"}}, content),
        with_header({**header, "__metadata__": {"dtypes": '{"weight": "load"}'}}, content),
        with_header({**header, "__metadata__": {"dtypes": '{"other": "complex64"}'}}, content),
    ):
        (tmp_path / "plain.safetensors").write_bytes(forged)
        with pytest.raises(ValueError, match="plain.safetensors cannot be read as tensors alone"):
            load_plain(tmp_path / "plain.safetensors", nn.Linear(3, 4))


def test_states_that_make_no_sense(saved, scratch):
    for key, value, told in (
        ("scheduler", 5, "StepLR cannot load values.scheduler"),
        ("optimizer", {"state": {"0.weight": {"step": [1]}}}, "AdamW cannot load its state"),
    ):
        step = fresh(saved, scratch)
        index = json.loads((step / "index.json").read_bytes())
        known = index["values"][key]
        forge_value(step, key, {**known, **value} if isinstance(value, dict) else value)
        assert told in str(loads_or_says_why(step, CheckpointError)[1])
    step = fresh(saved, scratch)
    index = json.loads((step / "index.json").read_bytes())
    ((_, sizes, file, *_),) = index["tensors"]["rng/0"]["chunks"]
    content = (step / file).read_bytes()
    start = content.index(b'{"python": ')
    (step / file).write_bytes(content[:start] + b"x" * sizes[0] + content[start + sizes[0] :])
    training = Training(9)
    before = training.state()
    with pytest.raises(CheckpointError, match="state of random generators makes no sense"):
        load_checkpoint(step, training.model, verify=False)
    assert same(training.state(), before)


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    deep = 1
    for _ in range(DEEPEST + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        save_checkpoint(tmp_path, nn.Linear(1, 1), step=1, extra=deep)
    save_checkpoint(tmp_path, nn.Linear(1, 1), step=1, extra=deep[0])
    assert load_checkpoint(tmp_path, nn.Linear(1, 1)).extra == deep[0]


# Formats of later versions


def test_a_later_format_is_an_error_where_it_was_asked_for(saved, scratch):
    step = fresh(saved, scratch)
    (step / "manifest.json").write_text(json.dumps({"format": 3, "sequence": 5, "content": "of another kind"}))
    for ask in (latest, lambda folder: Training(9).load(folder), lambda folder: export_plain(folder, scratch / "p.pt")):
        with pytest.raises(
            NewerFormatError if ask is latest else CheckpointError, match=r"step-00000002 is of format 3"
        ):
            ask(step.parent)
    assert latest(step.parent / "none") is None
    assert Training(9).load(step.parent / "step-00000001").step == 1
    # Whoever goes on from the older one has the newest from then on.
    Training(3).save(step.parent, 3)
    assert latest(step.parent).name == "step-00000003"
    assert step.is_dir()


def test_a_later_format_whose_order_is_not_known_counts_as_the_last(saved, scratch):
    step = fresh(saved, scratch)
    (step.parent / "step-00000001" / "manifest.json").write_text('{"format": 3}')
    with pytest.raises(NewerFormatError, match="step-00000001 is of format 3"):
        latest(step.parent)


def on_ranks(rank, folder):
    with pytest.raises(CheckpointError, match="is of format 7"):
        load_checkpoint(folder, nn.Linear(1, 1))
    return True


def test_a_later_format_on_several_ranks(saved, scratch):
    step = fresh(saved, scratch)
    manifest_of(step, format=7)
    assert run_threads(on_ranks, 2, step.parent) == [True, True]


@pytest.mark.slow
def test_a_training_does_not_go_on_from_an_older_step(tmp_path):
    conf = {
        "data": {"options": {"height": 6, "width": 8, "trajectories": 1, "times": 6}, "valid": None},
        "model": {"name": "unet", "width": 8},
        "trainer": {"steps": 2, "batch_size": 1, "checkpoint_every": 1},
        "folder": str(tmp_path),
    }
    train(check(RunConfig.from_dict(conf), 1), torch.device("cpu"))
    manifest_of(tmp_path / "checkpoints" / "step-00000002", format=3)
    with pytest.raises(CheckpointError, match="step-00000002 is of format 3"):
        train(check(RunConfig.from_dict(conf), 1), torch.device("cpu"))
