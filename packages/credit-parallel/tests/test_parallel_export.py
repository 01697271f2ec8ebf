"""``credit-parallel export``: the weights of a training for other programs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from credit_parallel.app.cli.main import main
from credit_parallel.checkpoint import save_checkpoint


@pytest.fixture
def trained(tmp_path):
    """The folder of a training, as far as this command knows one, and its model."""
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path / "run" / "checkpoints", model, step=1)
    return tmp_path / "run", model.state_dict()


def test_the_command_writes_either_format(trained, tmp_path, capsys):
    folder, state = trained
    where = [folder, folder / "checkpoints", folder / "checkpoints" / "step-00000001"]
    for source, name in zip(where, ("a.safetensors", "b.pt", "c"), strict=True):
        options = ["--format", "safetensors"] if name == "c" else []
        assert main(["export", str(source), str(tmp_path / name), *options]) == 0
        assert capsys.readouterr().err == f"wrote {tmp_path / name}\n"
    for name in "ac":
        found = load_file(next(tmp_path.glob(f"{name}*")))
        torch.testing.assert_close(found, dict(state), rtol=0, atol=0)
    torch.testing.assert_close(torch.load(tmp_path / "b.pt", weights_only=True), dict(state), rtol=0, atol=0)


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "a.pt")]) == 2
    assert "there is no complete checkpoint in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
