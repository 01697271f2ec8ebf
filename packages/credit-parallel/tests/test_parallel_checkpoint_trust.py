"""A run folder of someone else runs no code of its choice: models, data, options, files of the working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_former_format import as_former, write_index

from credit_parallel.app.cli.main import main
from credit_parallel.app.config import RunConfig
from credit_parallel.app.models import EXAMPLES
from credit_parallel.app.training.experiment import check
from credit_parallel.app.training.loop import train
from credit_parallel.app.trust import restricted
from credit_parallel.checkpoint import latest
from credit_parallel.checkpoint.json_values import pack, unpack

CONF = {
    "data": {"options": {"height": 6, "width": 8, "trajectories": 2, "times": 8}, "valid": [0.5, 1.0]},
    "model": {"name": "unet", "width": 8},
    "trainer": {"steps": 1, "batch_size": 2},
}
MODULE = """
import pathlib
from torch import nn
from credit_parallel.app.examples.unet import UNet

pathlib.Path({mark!r}).touch()

class Own(UNet): pass

def make(in_channels, out_channels, width):
    pathlib.Path({called!r}).touch()
    return UNet(in_channels, out_channels, width=width)

class Other:
    def __init__(self, **options):
        pathlib.Path({called!r}).touch()
"""


@pytest.fixture(scope="module", params=["safetensors", "former"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(check(RunConfig.from_dict({**CONF, "folder": str(folder)}), 1), torch.device("cpu"))
    if request.param == "former":
        as_former(latest(folder / "checkpoints"))
    return folder


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of this test alone, importable, which says whether it was imported and what of it was called."""
    name = f"named_by_{tmp_path.name}".replace("-", "_")
    (tmp_path / "code").mkdir()
    mark, called = tmp_path / "imported", tmp_path / "called"
    (tmp_path / "code" / f"{name}.py").write_text(MODULE.format(mark=str(mark), called=str(called)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "code")])
    return name, mark, called


def changed(trained, tmp_path, change, key="config"):
    """A copy of the run whose checkpoint says something else, with checksums that are right."""
    copy = tmp_path / "downloaded"
    subprocess.run(["cp", "-r", str(trained), str(copy)], check=True)
    step = latest(copy / "checkpoints")
    index = json.loads((step / "index.json").read_bytes())
    extra = unpack(index["values"]["extra"], str)
    extra[key] = change(extra[key]) or extra[key]
    index["values"]["extra"] = pack(extra, "extra", {})
    write_index(step, index)
    return copy


def named(trained, tmp_path, name):
    return changed(trained, tmp_path, lambda config: config["model"].update(name=name))


def told(capsys, *arguments):
    status = main(["forecast", *map(str, arguments), "--steps", "1", "--quiet"])
    return status, capsys.readouterr().err


def test_the_name_of_a_shipped_model_is_enough(trained, tmp_path, capsys):
    assert told(capsys, trained)[0] == 0
    for i, name in enumerate((EXAMPLES["unet"], EXAMPLES["unet"].replace(".app.", "."))):  # today's, and the former
        (tmp_path / str(i)).mkdir()
        assert told(capsys, named(trained, tmp_path / str(i), name))[0] == 0


@pytest.mark.parametrize("attribute", ["Own", "make", "Other"])
def test_a_checkpoint_alone_names_no_code(trained, tmp_path, capsys, code, attribute):
    name, mark, _ = code
    status, text = told(capsys, named(trained, tmp_path, f"{name}:{attribute}"))
    assert status == 2
    assert f"names the model '{name}:{attribute}'" in text
    assert f"--model {name}:{attribute}" in text
    assert "--trust" in text
    assert not mark.exists()
    assert name not in sys.modules


def test_what_a_trusted_checkpoint_names_is_a_module_before_it_is_called(trained, tmp_path, capsys, code):
    name, mark, called = code
    for i, attribute in enumerate(("make", "Other", "pathlib.Path", "nn")):
        (tmp_path / str(i)).mkdir()
        status, text = told(capsys, named(trained, tmp_path / str(i), f"{name}:{attribute}"), "--trust")
        assert status == 2
        assert "must be a subclass of torch.nn.Module" in text
    (tmp_path / "last").mkdir()
    assert told(capsys, named(trained, tmp_path / "last", f"{name}:Own"), "--trust")[0] == 0
    assert mark.exists()
    assert not called.exists()


def test_what_the_user_names(trained, tmp_path, capsys, code):
    name, _, called = code
    status, text = told(capsys, trained, "--model", f"{name}:Other")
    assert status == 2
    assert "must be a subclass of torch.nn.Module; got the class Other" in text
    assert not called.exists()
    folder = named(trained, tmp_path, "os:system")
    assert told(capsys, folder, "--model", f"{name}:make") == (0, "")
    assert called.exists()


def test_only_the_user_has_the_working_directory_searched(trained, tmp_path, capsys, monkeypatch):
    name = f"found_in_{tmp_path.name}"  # no other test has imported it
    (tmp_path / f"{name}.py").write_text("from credit_parallel.app.examples.unet import UNet\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    folder = named(trained, tmp_path, f"{name}:UNet")
    status, text = told(capsys, folder, "--trust")
    assert status == 2
    assert f"there is no module {name!r}, among the installed ones" in text
    assert str(tmp_path) not in sys.path
    assert told(capsys, folder, "--model", f"{name}:UNet")[0] == 0


def test_ranks_search_the_working_directory_only_where_the_command_does(trained, tmp_path):
    (tmp_path / "tqdm.py").write_text("raise SystemExit('code of the working directory ran')\n")
    script = "import sys; sys.path[:] = filter(None, sys.path); from credit_parallel.app.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "forecast", str(trained), "--ranks", "2", "--steps", "1", "--domain", "1"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "forecast(s) from" in done.stdout, done.stderr
    assert "code of the working directory" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "https://example.invalid/data.zarr"}, "names data at the address"),
        ({"source": "{tmp}/unknown.grib"}, "of unknown kind"),
        ({"source": "{tmp}/known.nc", "options": {"backend_kwargs": {"indexpath": "here.idx"}}}, "option indexpath="),
        ({"source": "{tmp}/known.nc", "options": {"indexpath": "here.idx"}}, "option indexpath="),
        ({"source": "{tmp}/known.nc", "options": {"engine": "named.by.someone"}}, "option engine="),
        ({"source": "{tmp}/known.nc", "options": {"backend_kwargs": ["x"]}}, "must be a block"),
        ({"source": "{tmp}/pickled.zarr"}, "which hold pickled objects"),
        ({"source": "{tmp}/deep.zarr"}, "cannot be read"),
    ],
)
def test_data_that_could_run_code(tmp_path, data, message):
    (tmp_path / "unknown.grib").write_bytes(b"none of them")
    (tmp_path / "known.nc").write_bytes(b"CDF\x01")
    for name, metadata in (("pickled", '{"filters": [{"id": "\\u0070ickle"}]}'), ("deep", "[" * 100_000)):
        (tmp_path / f"{name}.zarr" / "u").mkdir(parents=True)
        (tmp_path / f"{name}.zarr" / ".zgroup").write_text("{}")
        (tmp_path / f"{name}.zarr" / "u" / ".zarray").write_text(metadata)
    conf = {**CONF, "data": {**data, "source": data["source"].format(tmp=tmp_path)}}
    config = RunConfig.from_dict(conf)
    with pytest.raises(ValueError, match=message):
        restricted(config, "run/step-1")
    assert restricted(config, "run/step-1", trust=True)[0] == config
    if "options" not in data:
        assert restricted(config, "run/step-1", data=config.data.source)[0].data.source == config.data.source


@pytest.mark.parametrize("source", ["a.grib", "*.grib"])
def test_index_files_of_grib_are_left_alone(tmp_path, source):
    (tmp_path / "a.grib").write_bytes(b"GRIB and so on")
    conf = {**CONF, "data": {"source": str(tmp_path / source)}}
    assert restricted(RunConfig.from_dict(conf), "run")[0].data.options == {"indexpath": ""}
    assert restricted(RunConfig.from_dict(conf), "run", trust=True)[0].data.options == {}


@pytest.mark.parametrize("statistics", [5, {"mean": 5}, {"mean": [[1]], "channels": ["u"]}])
def test_statistics_that_make_no_sense(trained, tmp_path, capsys, statistics):
    status, text = told(capsys, changed(trained, tmp_path, lambda _: statistics, "statistics"))
    assert status == 2
    assert "is damaged: values.extra.statistics must be" in text


words = st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=12)


@given(st.one_of(st.builds("{}:{}".format, words, words), words, st.sampled_from(["os:system", "subprocess:Popen"])))
def test_any_other_name_is_refused_before_anything_is_imported(name):
    config = RunConfig.from_dict({**CONF, "model": {"name": name}})
    before = set(sys.modules)
    if name in (*EXAMPLES, *EXAMPLES.values()):
        return
    with pytest.raises(ValueError, match="a checkpoint alone cannot say which code runs"):
        restricted(config, Path("run"))
    assert set(sys.modules) == before
