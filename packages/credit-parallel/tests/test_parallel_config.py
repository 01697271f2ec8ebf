"""The configuration of a run: what it takes, and what it says of the rest."""

from __future__ import annotations

import re

import pytest
import yaml

from credit_mesh import ParallelismConfig
from credit_parallel.app.config import RunConfig

WHOLE = """
folder: runs/a
data:
  source: era5.nc
  variables: [t2m, z]
  levels: [500, 850]
  lead: 6h
  history: 2
  forcings: [solar]
  train: [2019-03-01, 2019-03-24]
  valid: ["2019-03-24", null]
  options: {engine: netcdf4}
model: {name: my.models:UNet, width: 8}
trainer:
  parallelism: {data: fsdp2, domain: 2}
  steps: 10
  clip: null
  latitude_weights: null
"""


def test_a_whole_one():
    run = RunConfig.from_dict(yaml.safe_load(WHOLE))
    assert run.data.train == ("2019-03-01", "2019-03-24")
    assert run.data.valid == ("2019-03-24", None)
    assert run.data.levels == (500.0, 850.0)
    assert run.model.options == {"width": 8}
    assert run.trainer.parallelism == ParallelismConfig("fsdp2", 1, 2)
    assert run.trainer.clip is None
    assert run.trainer.latitude_weights is None


def test_there_and_back(tmp_path):
    run = RunConfig.from_dict(yaml.safe_load(WHOLE))
    (tmp_path / "c.yml").write_text(run.to_yaml())
    assert RunConfig.from_file(tmp_path / "c.yml") == run
    assert RunConfig.from_dict({"trainer": {"steps": 1}}).to_dict()["model"] == {"name": "unet"}


WRONG = [
    ({"trainer": {"steps": 1, "batchsize": 2}}, "unknown key trainer.batchsize: 2; did you mean batch_size?"),
    ({"trianer": {}, "trainer": {"steps": 1}}, "unknown key trianer: {}; did you mean trainer?"),
    ({"trainer": {"steps": 1}, "data": {"zzz": 1}}, "unknown key data.zzz: 1; the keys are "),
    ({"trainer": {}}, "trainer: say either steps or epochs; got steps=None and epochs=None"),
    ({"trainer": {"steps": 1, "epochs": 1}}, "say either steps or epochs"),
    ({"trainer": {"steps": 1.5}}, "trainer.steps must be a whole number, 1 or more; got 1.5"),
    ({"trainer": {"steps": True}}, "trainer.steps must be a whole number"),
    (
        {"trainer": {"steps": 1, "lr": "1e-3"}},
        "trainer.lr must be a number above 0; got '1e-3' (YAML reads 1e-3 as text",
    ),
    ({"trainer": {"steps": 1, "lr": 0}}, "trainer.lr must be a number above 0; got 0"),
    ({"trainer": {"steps": 1, "amp": "false"}}, "trainer.amp must be true or false; got 'false'"),
    ({"trainer": {"steps": 1, "amp": True, "dtype": "float64"}}, "trainer.amp computes in bfloat16"),
    ({"trainer": {"steps": 1, "device": "gpu"}}, "trainer.device must be one of auto, cpu, cuda; got 'gpu'"),
    ({"trainer": {"steps": 1, "betas": [0.9]}}, "trainer.betas must be two numbers"),
    ({"trainer": {"steps": 1, "clip": -1}}, "trainer.clip must be a positive number, or null; got -1"),
    ({"trainer": {"steps": 1, "parallelism": {"domain": 0}}}, "trainer: parallelism.domain must be"),
    ({"trainer": {"steps": 1, "parallelism": {"damain": 2}}}, "trainer: unknown key in the parallelism block"),
    ({"trainer": {"steps": 1}, "data": {"lead": 0}}, "data.lead must be a number of steps of the file"),
    ({"trainer": {"steps": 1}, "data": {"train": [0, 2]}}, "data.train must be two times"),
    ({"trainer": {"steps": 1}, "data": {"train": ["2019-03-01", 0.5]}}, "data.train must be two times"),
    ({"trainer": {"steps": 1}, "data": {"variables": [1]}}, "data.variables must be a list of names; got [1]"),
    ({"trainer": {"steps": 1}, "data": {"levels": ["500"]}}, "data.levels must be a list of numbers"),
    ({"trainer": {"steps": 1}, "data": []}, "data must be a block of keys and values; got []"),
    ({"trainer": {"steps": 1}, "folder": 3}, "folder must be text; got 3"),
    ([], "the configuration must be a block of keys and values; got []"),
]


@pytest.mark.parametrize(("conf", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_named(conf, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        RunConfig.from_dict(conf)
    assert "\n" not in str(error.value)


def test_files(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yml: No such file"):
        RunConfig.from_file(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_text("a: [1\nb: 2\n")
    with pytest.raises(ValueError, match=r"bad\.yml is no YAML: .*line") as error:
        RunConfig.from_file(tmp_path / "bad.yml")
    assert "\n" not in str(error.value)
    (tmp_path / "key.yml").write_text("trainer: {steps: 1, stpes: 2}\n")
    with pytest.raises(ValueError, match=r"key\.yml: unknown key trainer\.stpes: 2; did you mean steps\?"):
        RunConfig.from_file(tmp_path / "key.yml")


def test_changes(tmp_path):
    (tmp_path / "c.yml").write_text("trainer: {steps: 1, parallelism: {domain: 2}}\nmodel:\n")
    changes = ["trainer.steps=7", "trainer.parallelism={}", "model.width=8", "data.variables=[a, b]", "folder=x"]
    run = RunConfig.from_file(tmp_path / "c.yml", changes)
    assert (run.trainer.steps, run.trainer.parallelism.domain, run.folder) == (7, 1, "x")
    assert (run.model.options, run.data.variables) == ({"width": 8}, ("a", "b"))
    for change, message in (
        ("trainer.steps", "expected a key and its value"),
        ("=1", "expected a key and its value"),
        ("trainer.steps.x=1", "steps is no block"),
        ("trainer.steps=[1", "what follows = is no YAML"),
        ("trainer.stpes=1", "did you mean steps?"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            RunConfig.from_file(tmp_path / "c.yml", [change])
