"""Blocks of one class, each compiled as one graph, of more shapes than torch makes versions of one function."""

import functools

import pytest
import torch
from torch import nn

from credit_parallel.app.training.experiment import compile_blocks

MANY = 10


class Block(nn.Module):
    _fsdp2_shard = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width + 1)

    def forward(self, x):
        return self.linear(x).sin()


@pytest.fixture
def limit():
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        yield lambda: torch._dynamo.config.recompile_limit


@pytest.mark.slow
def test_blocks_of_many_shapes_compile_without_a_limit_for_the_whole_process(monkeypatch, limit):
    quick = functools.partial(torch.compile, backend="aot_eager", dynamic=False)  # inductor takes a minute for them
    if "recompile_limit" not in torch.compile.__kwdefaults__:
        pytest.skip("torch.compile of this version takes no limit")
    monkeypatch.setattr(torch, "compile", quick)
    model = nn.Sequential(*(Block(2 + n) for n in range(MANY)))
    inputs = [torch.ones(1, 2 + n) for n in range(MANY)]
    expected = [block(x) for block, x in zip(model, inputs, strict=True)]
    compile_blocks(model, {})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for block, x, y in zip(model, inputs, expected, strict=True):
                torch.testing.assert_close(block(x), y)
    assert limit() == 8


def test_an_older_torch_gets_a_limit_for_the_whole_process(monkeypatch, limit):
    monkeypatch.setattr(torch, "compile", lambda function, *, fullgraph: function)
    compile_blocks(nn.Sequential(*(Block(2 + n) for n in range(MANY))), {})
    assert limit() == 8 * MANY
