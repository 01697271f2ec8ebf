"""The configuration of a run: what it takes, and what it says of the rest."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
import yaml

from credit_mesh import ParallelismConfig
from credit_parallel.app.cli.main import main
from credit_parallel.app.config import ConfigError, ModelConfig, RunConfig, TrainerConfig
from credit_parallel.app.training.resuming import changes

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
  max_grad_norm: null
  latitude_weights: null
"""


def test_a_whole_one():
    run = RunConfig.from_dict(yaml.safe_load(WHOLE))
    assert run.data.train == ("2019-03-01", "2019-03-24")
    assert run.data.valid == ("2019-03-24", None)
    assert run.data.levels == (500.0, 850.0)
    assert run.model.options == {"width": 8}
    assert run.trainer.parallelism == ParallelismConfig("fsdp2", 1, 2)
    assert run.trainer.max_grad_norm is None
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
    (
        {"trainer": {"steps": 1, "max_grad_norm": -1}},
        "trainer.max_grad_norm must be a positive number, or null; got -1",
    ),
    (
        {"trainer": {"steps": 1, "parallelism": {"domain": 0}}},
        "trainer.parallelism.domain must be a whole number, 1 or more; got 0",
    ),
    (
        {"trainer": {"steps": 1, "parallelism": {"damain": 2}}},
        "unknown key trainer.parallelism.damain: 2; did you mean domain?",
    ),
    ({"trainer": {"steps": 1}, "data": {"lead": 0}}, "data.lead must be a number of steps of the file"),
    ({"trainer": {"steps": 1}, "data": {"train": [0, 2]}}, "data.train must be two times"),
    ({"trainer": {"steps": 1}, "data": {"train": ["2019-03-01", 0.5]}}, "data.train must be two times"),
    ({"trainer": {"steps": 1}, "data": {"variables": [1]}}, "data.variables must be a list of names; got [1]"),
    ({"trainer": {"steps": 1}, "data": {"levels": ["500"]}}, "data.levels must be a list of numbers"),
    ({"trainer": {"steps": 1}, "data": []}, "data must be a block of keys and values; got []"),
    ({"trainer": {"steps": 1}, "folder": 3}, "folder must be text; got 3"),
    ({"folder": "a"}, "trainer must be a block of keys and values, with steps or epochs; it is missing"),
    (
        {"trainer": {"steps": "10"}},
        "trainer.steps must be a whole number, 1 or more; got '10' (YAML reads 10 as text; write 10)",
    ),
    ({"trainer": {"steps": 1, "lr": "1e-5"}}, "got '1e-5' (YAML reads 1e-5 as text; write 1.0e-05)"),
    ({"trainer": {"steps": 1}, "lr": 0.1}, "unknown key lr: 0.1; did you mean trainer.lr?"),
    ({"trainer": {"steps": 1, "acumulate": 2}}, "unknown key trainer.acumulate: 2; did you mean grad_accum_steps?"),
    ({"trainer": {"steps": 1}, "model": {1: 2}}, "model must be a block of keys and values; got {1: 2}"),
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


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path, capsys):
    path = tmp_path / "c.yml"
    path.write_text(
        "folder: 3\ndata: {lead: 0, vars: [t]}\nmodel: [unet]\ntrainer: {steps: 1, lr: 1e-3, betas: [0.9], keep: 0}\n"
    )
    expected = [
        "data.lead must be a number of steps of the file, 1 or more, or text such as 6h; got 0",
        "unknown key data.vars: ['t']; did you mean variables?",
        "model must be a block of keys and values; got ['unet']",
        "trainer.lr must be a number above 0; got '1e-3' (YAML reads 1e-3 as text; write 0.001)",
        "trainer.betas must be two numbers from 0 to below 1; got [0.9]",
        "trainer.keep must be a whole number, 1 or more; got 0",
        "folder must be text; got 3",
    ]
    with pytest.raises(ConfigError) as error:
        RunConfig.from_file(path)
    assert sorted(error.value.mistakes) == sorted(f"{path}: {line}" for line in expected)
    assert main(["train", "-c", str(path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == sorted(f"credit-parallel train: {path}: {line}" for line in expected)


def test_blocks_made_in_python_are_checked_too():
    with pytest.raises(ConfigError) as error:
        TrainerConfig(steps=0, device="gpu")
    assert error.value.mistakes == (
        "trainer.steps must be a whole number, 1 or more; got 0",
        "trainer.device must be one of auto, cpu, cuda; got 'gpu'",
    )
    with pytest.raises(ConfigError, match="^model.name must be text; got ''$"):
        ModelConfig("", {"width": 8})
    trainer = TrainerConfig(steps=1, parallelism=ParallelismConfig("ddp"))
    with pytest.raises(AttributeError):
        trainer.steps = 2


FORMER = "trainer: {steps: 1, accumulate: 2, clip: 0.5}\n"


def test_former_keys_are_read_and_named_once(tmp_path, caplog):
    path = tmp_path / "c.yml"
    path.write_text(FORMER)
    with caplog.at_level(logging.WARNING):
        run = RunConfig.from_file(path)
    assert (run.trainer.grad_accum_steps, run.trainer.max_grad_norm) == (2, 0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "trainer.accumulate is now called trainer.grad_accum_steps; the former name is still read",
        "trainer.clip is now called trainer.max_grad_norm; the former name is still read",
    ]
    assert not {"accumulate", "clip"} & run.to_dict()["trainer"].keys()
    for change in ("trainer.clip=0.1", "trainer.max_grad_norm=0.1"):  # in place of the file's
        assert RunConfig.from_file(path, [change]).trainer.max_grad_norm == 0.1


@pytest.mark.parametrize(("environment", "count"), [({}, 2), ({"RANK": "0"}, 2), ({"RANK": "1"}, 0)])
def test_only_the_first_rank_names_former_keys(environment, count, tmp_path, monkeypatch, caplog):
    path = tmp_path / "c.yml"
    path.write_text(FORMER + "data: {options: {height: 6, width: 8}}\n")
    for name, value in {**environment, "WORLD_SIZE": "2"}.items() if environment else ():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        main(["train", "-c", str(path), "--check", "--quiet"])
    assert sum("is now called" in record.getMessage() for record in caplog.records) == count


def test_a_key_under_both_names_is_refused():
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict({"trainer": {"steps": 1, "clip": 1.0, "max_grad_norm": 2.0}})
    (line,) = error.value.mistakes
    assert line == "trainer.clip is the former name of trainer.max_grad_norm; give one of them, not both"


def test_checkpoints_with_former_keys_are_compared_by_the_present_ones():
    saved = RunConfig.from_dict({"trainer": {"steps": 1, "max_grad_norm": 0.5}}).to_dict()
    now = RunConfig.from_dict({"trainer": {"steps": 1, "max_grad_norm": 0.5, "grad_accum_steps": 2}}).to_dict()
    saved["trainer"]["clip"] = saved["trainer"].pop("max_grad_norm")
    saved["trainer"]["accumulate"] = saved["trainer"].pop("grad_accum_steps")
    assert changes(saved, now) == []
    saved["trainer"]["clip"] = 1.0
    assert changes(saved, now) == ["trainer.max_grad_norm: 1.0 in the checkpoint, 0.5 now"]


def test_the_schema_is_written_for_editors(tmp_path, capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == RunConfig.json_schema()
    assert main(["schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == schema
    trainer = schema["$defs"]["TrainerConfig"]["properties"]
    assert trainer["batch_size"]["description"].startswith("Samples of one step, on all replicas together")
    assert trainer["batch_size"]["minimum"] == 1
    assert trainer["clip"]["deprecated"] is True
    assert schema["additionalProperties"] is False


@pytest.mark.slow
def test_the_library_does_not_load_pydantic():
    code = "import sys, credit_parallel; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
