"""The converter: nothing passes in silence, and everything around the layers stays as it was."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from domain_models import CubeEmbedding, MultiKernelEmbedding, PeriodicConv2d, UNet
from torch import nn
from torch.nn.utils import parametrizations

import credit_domain.layers as dl
from credit_domain import conversion_report, convert_to_domain_parallel, granularity_of, validate_sharding_constraints
from credit_domain.convert import (
    _needs_halo_conv2d,
    _needs_halo_conv3d,
    _needs_halo_conv_transpose2d,
    _needs_halo_conv_transpose3d,
    _replace_module,
)
from credit_domain.model.rules import decide

MANAGER = SimpleNamespace(domain_parallel_size=2)


def convert(model, **settings):
    return convert_to_domain_parallel(model, MANAGER, **settings)


def test_the_table_of_the_reference():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 4, 1),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 4, 4, 2, 1),
        nn.ConvTranspose2d(4, 4, 2, 2),
        nn.PixelShuffle(2),
        nn.GELU(),
    )
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    converted = convert(model)
    assert converted is model
    assert [type(m).__name__ for m in model] == [
        "DomainParallelConv2d",
        "Conv2d",
        "DomainParallelGroupNorm",
        "DomainParallelConvTranspose2d",
        "ConvTranspose2d",
        "DomainParallelPixelShuffle",
        "GELU",
    ]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model._domain_parallel_manager is MANAGER
    assert model[0].label == "0"


def decisions():
    """What becomes of each layer of torch.nn, with plausible arguments, by name."""
    abstract = {"Module", "Container", "RNNBase", "RNNCellBase", "LinearCrossEntropyOptions", "NLLLoss2d"}
    made = {}
    for name in torch.nn.modules.__all__:
        kind = getattr(torch.nn.modules, name)
        if name not in abstract and not name.startswith("Lazy") and inspect.isclass(kind):
            made[name] = decide(_make(kind), -2)
    return made


def test_every_layer_of_torch_is_converted_local_or_refused():
    """A layer that a later torch adds is refused until somebody thought about it."""
    made = decisions()
    assert {name for name, decision in made.items() if decision.fate == "own code"} == set()
    unknown = {name for name, decision in made.items() if decision.reason.endswith("has no rule")}
    assert unknown <= {"Unfold", "Fold", "PairwiseDistance"}
    assert made["Conv2d"].fate == "converted"
    assert made["MultiheadAttention"].fate == "refused"
    assert made["Linear"].fate == "local"
    assert made["MSELoss"].fate == "refused"

    class Novel(nn.Module):
        __module__ = "torch.nn.modules.novel"

    decision = decide(Novel(), -2)
    assert (decision.fate, decision.reason) == ("refused", "torch.nn.Novel has no rule")


def table():
    """The table of the documentation."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, decision in decisions().items():
        groups.setdefault((decision.fate, decision.reason), []).append(f"`{name}`")
    order = {"converted": 0, "local": 1, "refused": 2}
    lines = ["| layers of `torch.nn` | | why |", "|---|---|---|"]
    for (fate, reason), names in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        lines.append(f"| {' '.join(names)} | {fate} | {reason} |")
    return "\n".join(lines)


def test_the_table_of_the_documentation_is_this_one():
    """Write it anew with ``python -m pytest -k table_of_the_documentation`` under ``CREDIT_WRITE_DOCS=1``."""
    page = Path(__file__).parents[3] / "docs" / "converting.md"
    if not page.exists() or not torch.__version__.startswith("2.13"):
        pytest.skip("the documentation is not here, or lists the layers of another torch")
    start, end = "<!-- table: begin -->\n", "\n<!-- table: end -->"
    before, rest = page.read_text().split(start)
    written, after = rest.split(end)
    if os.environ.get("CREDIT_WRITE_DOCS"):
        page.write_text(before + start + table() + end + after)
    else:
        assert written == table()


def _make(kind):
    four = """in_channels out_channels num_features num_channels in_features out_features input_size hidden_size
        embed_dim d_model n_classes num_embeddings embedding_dim in1_features in2_features num_classes"""
    arguments = {
        **dict.fromkeys(four.split(), 4),
        **dict.fromkeys(
            ["num_groups", "groups", "num_heads", "nhead", "size", "upscale_factor", "downscale_factor"], 2
        ),
        **dict.fromkeys(["padding", "output_size", "dim", "num_layers"], 1),
        **{"kernel_size": 3, "value": 0.0, "threshold": 0.0, "norm_type": 2.0, "cutoffs": [2]},
        **{"normalized_shape": (4, 4), "unflattened_size": (2, 2)},
    }
    if kind in (nn.TransformerEncoder, nn.TransformerDecoder):
        layer = nn.TransformerEncoderLayer if kind is nn.TransformerEncoder else nn.TransformerDecoderLayer
        return kind(
            layer(4, 2, batch_first=True), 1, **({"enable_nested_tensor": False} if "En" in kind.__name__ else {})
        )
    if kind in (nn.Transformer,):
        return nn.Transformer(4, 2, 1, 1, 4, batch_first=True)
    if kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        return kind(4, 4)
    if kind is nn.Fold:
        return nn.Fold(4, 2)
    if kind in (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d):
        return kind(2, output_size=2)
    wanted = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        needed = parameter.default is inspect.Parameter.empty and name != "self"
        if needed and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            wanted[name] = arguments[name]
    return kind(**wanted)


def test_refusals_name_every_module_and_change_nothing():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 1, 3),
            "own": Standardised(1, 1, 3),
            "deep": nn.Sequential(nn.Identity(), nn.MultiheadAttention(4, 2)),
            "fold": nn.Unfold(3),
        }
    )
    with pytest.raises(ValueError, match="3 modules may mix rows") as caught:
        convert(model)
    text = str(caught.value)
    assert "own (Standardised): Standardised is a Conv2d with a forward of its own" in text
    assert "deep.1 (MultiheadAttention): it attends over positions of all ranks" in text
    assert "fold (Unfold)" in text
    assert "custom_converters" in text
    assert "local=[...]" in text
    assert type(model["conv"]) is nn.Conv2d
    convert(model, local=[Standardised, "deep.1", model["fold"]])
    assert type(model["conv"]) is dl.DomainParallelConv2d
    assert type(model["own"]) is Standardised
    fates = {m.name: (m.fate, m.reason) for m in conversion_report(model).modules}
    assert fates["own"] == ("local", "declared local")


def test_subclasses_that_only_build_differently_are_converted():
    class Same(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

    class Gated(nn.Linear):
        def forward(self, x):
            return super().forward(x).sigmoid()

    model = nn.Sequential(Same(2), Gated(2, 2))
    convert(model)
    assert type(model[0]) is dl.DomainParallelConv2d
    assert type(model[1]) is Gated


def test_shared_modules_stay_shared_and_the_root_is_returned():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.ReLU())})
    convert(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is dl.DomainParallelConv2d
    root = nn.Conv2d(2, 2, 3)
    converted = convert(root)
    assert type(converted) is dl.DomainParallelConv2d
    assert converted.conv is root
    again = convert(converted)
    assert again is converted


def test_parametrised_layers_are_converted():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)))
    keys = list(model.state_dict())
    convert(model)
    assert type(model[0]) is dl.DomainParallelConv2d
    assert list(model.state_dict()) == keys


def test_custom_converters_win_by_type_path_and_predicate():
    class Periodic2(PeriodicConv2d):
        pass

    def make():
        return nn.Sequential(PeriodicConv2d(2, 2), Periodic2(2, 2), nn.Conv2d(2, 2, 3))

    for key in (
        PeriodicConv2d,
        f"{PeriodicConv2d.__module__}.PeriodicConv2d",
        lambda m: hasattr(m, "conv") and hasattr(m, "padding"),
    ):
        model = make()
        keys = list(model.state_dict())
        custom = {key: dl.DomainParallelPeriodicConv2d, Periodic2: lambda m: nn.Identity()}
        convert(model, custom_converters=custom)
        assert [type(m) for m in model] == [dl.DomainParallelPeriodicConv2d, nn.Identity, dl.DomainParallelConv2d]
        assert model[0]._modules["conv"].label
        assert [key for key in keys if not key.startswith("1.")] == list(model.state_dict())
    # A key for a layer of torch comes before the rule.
    model = make()
    convert(model, custom_converters={nn.Conv2d: lambda m: m, PeriodicConv2d: lambda m: m})
    assert type(model[2]) is nn.Conv2d


def test_report_and_log(caplog):
    model = UNet()
    with caplog.at_level(logging.INFO, "credit_domain.convert"):
        convert(model)
    report = conversion_report(model)
    assert report.granularity == 4
    assert str(report) in caplog.text
    assert "modules converted" in str(report)
    assert "own code   (model): UNet" in str(report)
    converted = {module.name for module in report.of("converted")}
    assert "down1" in converted
    assert "stem.shortcut" not in converted
    with pytest.raises(ValueError, match="Linear is not converted"):
        conversion_report(nn.Linear(1, 1))


def test_a_granularity_that_was_set_is_kept():
    """Windows that no module declares, or a second model on the same rows."""
    manager = SimpleNamespace(domain_parallel_size=2, granularity=6)
    model = convert_to_domain_parallel(UNet(), manager)
    assert manager.granularity == 12
    assert conversion_report(model).granularity == 12


def test_what_cannot_be_made_changes_nothing():
    manager = SimpleNamespace(domain_parallel_size=2, granularity=1)

    def fails(module):
        raise ValueError("no such thing")

    model = nn.Sequential(nn.Conv2d(1, 1, 4, 4), nn.Bilinear(1, 1, 1))
    with pytest.raises(ValueError, match="no such thing"):
        convert_to_domain_parallel(model, manager, custom_converters={nn.Bilinear: fails})
    assert type(model[0]) is nn.Conv2d
    assert manager.granularity == 1


def test_one_rank_is_left_alone():
    model = UNet()
    assert convert_to_domain_parallel(model, SimpleNamespace(domain_parallel_size=1)) is model
    assert type(model.down1) is nn.Conv2d


@pytest.mark.parametrize(
    ("model", "granularity"),
    [
        (UNet(), 4),
        (UNet(odd=True), 4),
        (MultiKernelEmbedding(), 4),
        (CubeEmbedding(), 4),
        (nn.Sequential(nn.Conv2d(1, 1, 3)), 1),
        (nn.Sequential(nn.Conv2d(1, 1, 3, (2, 1)), nn.MaxPool2d(3, 3), nn.Upsample(scale_factor=2)), 6),
        (nn.Linear(2, 2), 1),
    ],
)
def test_granularity_is_the_total_stride(model, granularity):
    assert granularity_of(model) == granularity


def test_declared_windows_count_at_their_level():
    class Window(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.window_size = size

        def forward(self, x):
            return x

    model = nn.Sequential(nn.Conv2d(1, 1, 4, 4), Window(6), nn.Conv2d(1, 1, 2, 2), Window((3, 5)))
    assert granularity_of(model) == 24
    assert granularity_of(model, input_shape=(1, 1, 96, 96)) == 24
    assert granularity_of(model, window_sizes=(2, 5)) == 40
    assert validate_sharding_constraints(model, 24) == []
    warnings = validate_sharding_constraints(model, 20)
    assert len(warnings) == 2
    assert "20 rows are 5 after a total stride of 4, no multiple of the window of 6 rows" in warnings[0]
    assert warnings[1] == "2: 20 rows are no multiple of the total stride 8"
    assert validate_sharding_constraints(model, 40, window_sizes=[2, 5]) == []
    assert validate_sharding_constraints(model, 24, window_sizes=[2, 5]) != []
    with pytest.raises(ValueError, match="local_h must be at least 1"):
        validate_sharding_constraints(model, 0)
    with pytest.raises(ValueError, match="could not be run for its shapes"):
        granularity_of(model, input_shape=(1, 7, 96, 96))


def test_needs_halo():
    assert not _needs_halo_conv2d(nn.Conv2d(1, 1, 1))
    assert _needs_halo_conv2d(nn.Conv2d(1, 1, 3))
    assert not _needs_halo_conv2d(nn.Conv2d(1, 1, (1, 3), padding=(0, 1)))
    assert _needs_halo_conv2d(nn.Conv2d(1, 1, 1, 2))
    assert _needs_halo_conv3d(nn.Conv3d(1, 1, (1, 3, 1)))
    assert not _needs_halo_conv3d(nn.Conv3d(1, 1, (3, 1, 3)))
    assert not _needs_halo_conv_transpose2d(nn.ConvTranspose2d(1, 1, 2, 2))
    assert _needs_halo_conv_transpose2d(nn.ConvTranspose2d(1, 1, 4, 2, 1))
    assert _needs_halo_conv_transpose2d(nn.ConvTranspose2d(1, 1, 1, 2))
    assert not _needs_halo_conv_transpose3d(nn.ConvTranspose3d(1, 1, (2, 4, 4), (2, 4, 4)))


def test_replace_module():
    parent = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1))
    old, new = parent[0], nn.GELU()
    _replace_module(parent, "0", old, new)
    assert parent[0] is new
    with pytest.raises(ValueError, match="Sequential has no child '0'"):
        _replace_module(parent, "0", old, new)


def test_mistakes():
    with pytest.raises(ValueError, match="manager must have a domain_parallel_size"):
        convert_to_domain_parallel(nn.ReLU(), None)
    with pytest.raises(ValueError, match="shard_dim must be a spatial dim"):
        convert(nn.ReLU(), shard_dim=-4)
    with pytest.raises(ValueError, match="a 1-D layer does not have the sharded dim -2"):
        convert(nn.Sequential(nn.Conv1d(1, 1, 3)))
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Softmax(-1))
    with pytest.raises(ValueError, match="it normalises over dim -1, which may be the sharded one"):
        convert(model, shard_dim=-1)
