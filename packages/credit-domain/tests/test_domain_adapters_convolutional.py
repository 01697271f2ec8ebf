"""Convolutional families, written for one rank, converted by their adapters, and verified exact on sharded rows."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from domain_models import PeriodicConv2d
from domain_reference import check_layer, randn
from families_convolutional import (
    SCSE,
    Attention,
    DecoderBlock,
    DiffusionUNet,
    DownSample,
    FuXiLike,
    LinearAttention,
    MergePoints,
    PaddedResNetUNet,
    PanguLike,
    PatchRecovery,
    ResNetUNet,
    UpSample,
)
from torch import nn

import credit_domain.functional as DF
from credit_domain import convert_to_domain_parallel, layers, plan_domain_parallel, verify_domain_parallel
from credit_domain.adapters import cube, known_families, unet
from credit_domain.adapters.adapter import Adapter
from credit_domain.blocks import FullAttention
from credit_halo.testing import RankError
from credit_mesh import RowPartition, get_domain_parallel_manager

RANKS = pytest.mark.parametrize("ranks", [2, 3, 4])
HERE = (unet.__name__, cube.__name__)
ALL = {family.match: family.converter for family in known_families() if family.match.__module__ in HERE}
TIME = torch.tensor([3.0, 70.0])


def padded(**settings):
    return {**ALL, PaddedResNetUNet: functools.partial(unet.DomainParallelPadded, **settings)}


def verify(model, inputs, ranks, converters=ALL, **settings):
    report = verify_domain_parallel(model, inputs, ranks, custom_converters=converters, **settings)
    assert report, str(report)
    return report


def convert(module, shard_dim=-2, converters=ALL):
    manager = get_domain_parallel_manager() or SimpleNamespace(domain_parallel_size=2)
    return convert_to_domain_parallel(module, manager, shard_dim, converters)


# The families


@RANKS
@pytest.mark.parametrize(("down", "memory"), [("strided", 0), ("unshuffled", 3)])
def test_diffusion_unet(ranks, down, memory):
    report = verify(DiffusionUNet(down=down, memory=memory), {"x": (2, 2, 20, 8), "time": TIME}, ranks)
    assert set(report.input_gradients) == {"x", "time"}
    assert ranks == 2 or len(set(report.partition.sizes)) > 1


@RANKS
def test_resnet_unet(ranks):
    report = verify(ResNetUNet(), (2, 2, 40, 16), ranks)
    assert len(set(report.partition.sizes)) > 1


def test_resnet_unet_of_stride_32():
    report = verify(ResNetUNet(widths=(2, 2, 2, 4, 4)), (2, 2, 128, 32), 3)
    assert report.partition.sizes == (64, 32, 32)


@RANKS
@pytest.mark.parametrize(("both_sides", "mode"), [(False, "constant"), (True, "reflect")])
def test_resnet_unet_that_pads(ranks, both_sides, mode):
    model = PaddedResNetUNet(both_sides=both_sides, mode=mode)
    verify(model, (2, 2, 37, 19), ranks, padded(multiple=8, both_sides=both_sides, mode=mode))


def test_padding_needs_whole_blocks():
    with pytest.raises(RankError, match="the ranks hold 13, 27 rows; divide the input in blocks of 8 rows"):
        check_layer(
            PaddedResNetUNet().double(),
            lambda m: convert(m, converters=padded(multiple=8)),
            randn(2, 2, 37, 16),
            RowPartition((13, 24)),
            declare=False,
        )


def test_running_statistics_and_any_partition():
    """Decoders put their rows where the skip connections have theirs, whatever the boundaries between ranks."""
    torch.manual_seed(0)
    for sizes, declare in (((16, 8, 16), True), ((9, 20, 11), False)):
        model = ResNetUNet().double()
        check_layer(model, convert, randn(2, 2, 40, 16), RowPartition(sizes), declare=declare, rtol=1e-7, atol=1e-9)


@RANKS
@pytest.mark.parametrize("rows", [31, 40])
def test_pangu(ranks, rows):
    verify(PanguLike((5, rows, 16)), {"upper": (1, 2, 5, rows, 16), "surface": (1, 2, rows, 16)}, ranks)


@RANKS
@pytest.mark.parametrize("rows", [33, 40])
def test_fuxi(ranks, rows):
    verify(FuXiLike((rows, 16)), (1, 2, 2, rows, 16), ranks)


def test_columns_sharded():
    verify(DiffusionUNet(), {"x": (1, 2, 8, 20), "time": TIME[:1]}, 3, shard_dim=-1)
    verify(PaddedResNetUNet(), (2, 2, 11, 37), 2, padded(multiple=8), shard_dim=-1)
    # LayerNorm of channels that come last looks like one over columns, and has to be declared.
    settings = {"shard_dim": -1, "local": [nn.LayerNorm]}
    verify(PanguLike((3, 16, 31)), {"upper": (1, 2, 3, 16, 31), "surface": (1, 2, 16, 31)}, 3, **settings)
    verify(FuXiLike((16, 33)), (1, 2, 2, 16, 33), 2, **settings)


def test_merging_of_points_that_are_listed_otherwise():
    model = MergePoints(3).double()
    whole, partition = randn(2, 11, 5, 3), RowPartition((2, 5, 4))
    check_layer(model, convert, whole, partition, -3, declare=False)


# What conversion leaves as it was


@pytest.mark.parametrize("make", [lambda: DiffusionUNet(memory=2), ResNetUNet, PanguLike, FuXiLike])
def test_names_and_parameters_stay(make):
    model = make()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    converted = convert(model)
    assert list(converted.state_dict()) == keys
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert any(isinstance(module, (Adapter, layers.DomainParallelPeriodicConv2d)) for module in converted.modules())


def test_children_are_converted_and_labelled():
    model = convert(ResNetUNet())
    block = model.decoder[0]
    assert isinstance(block, unet.DomainParallelDecoderBlock)
    assert block.label == "decoder.0"
    assert type(block.wrapped.conv1[0]) is layers.DomainParallelConv2d
    assert block.conv1[0].label == "decoder.0.conv1.0"
    assert type(block.attention1.cSE[0]) is layers.DomainParallelAdaptiveAvgPool2d
    root = convert(PaddedResNetUNet(), converters=padded(multiple=8))
    assert isinstance(root, unet.DomainParallelPadded)
    assert type(root.conv1) is layers.DomainParallelConv2d
    assert isinstance(root.decoder[1], unet.DomainParallelDecoderBlock)
    plan = plan_domain_parallel(ResNetUNet(), (1, 2, 40, 16), 3, custom_converters=ALL)
    assert "decoder.1.conv2.0" in [layer.name for layer in plan.layers]


def test_an_adapter_of_ones_own():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.roll(x, 2, dims=-2))

    class ShardedHead(Adapter):
        def forward(self, x):
            return self.wrapped.conv(DF.roll(x, 2, -2, dim=self.shard_dim, manager=self.manager))

    verify(nn.Sequential(Head(), nn.ReLU()), (1, 2, 11, 4), 3, {Head: ShardedHead})
    verify(Head(), (1, 2, 11, 4), 2, {Head: ShardedHead})
    report = verify_domain_parallel(Head(), (1, 2, 11, 4), 2, custom_converters={Head: lambda m: m})
    assert report.difference.module in ("", "conv")


# What looks the same and is not


class MeanLinearAttention(LinearAttention):
    def forward(self, x):
        return super().forward(x) / (x.shape[-2] * x.shape[-1])


class GatedAttention(Attention):
    def forward(self, x):
        return super().forward(x).sigmoid() * x


class LatitudeAttention(Attention):
    def forward(self, x):
        return super().forward(x.mT).mT + 0 * x[..., :1, :1].sum() + x.shape[-1]


class ZeroPaddedConv2d(PeriodicConv2d):
    def forward(self, x):
        p = self.padding
        return self.conv(F.pad(F.pad(x, (p, p, 0, 0), mode="circular"), (0, 0, p, p)))


class SummingDecoderBlock(DecoderBlock):
    def forward(self, x, skip=None):
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class FixedDecoderBlock(DecoderBlock):
    def forward(self, x, skip):
        return super().forward(x.reshape(2, -1, 20, 8), skip)


class RecoveryFromTheStart(PatchRecovery):
    def forward(self, x):
        rows, columns = self.img_size
        return self.conv(x)[:, :, -rows:, -columns:]


class NormalisedDownSample(DownSample):
    def forward(self, x):
        return F.normalize(super().forward(x), dim=-1)


class ActivatedUpSample(UpSample):
    def forward(self, x):
        return super().forward(x).relu()


class NearestFuXi(FuXiLike):
    def forward(self, x):
        return F.interpolate(super().forward(x), size=self.img_size) + 1


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (MeanLinearAttention(4), "full or linear attention over all tokens, and its forward computes something else"),
        (GatedAttention(4), "full or linear attention"),
        (LatitudeAttention(4), "full or linear attention"),
        (ZeroPaddedConv2d(2, 2), "circular columns and reflected rows, and its forward computes something else"),
        (SummingDecoderBlock(2, 2, 2), "a decoder that doubles rows and columns"),
        (FixedDecoderBlock(2, 2, 2), "and its forward does not take .2, 4, 6, 8., None"),
        (RecoveryFromTheStart(2, 2, (10, 10), (4, 4)), "a recovery of a grid from its patches"),
        (NormalisedDownSample(2), "a merging of 2 x 2 points, channels last"),
        (ActivatedUpSample(4, 2, (2, 9, 8)), "an expansion to 2 x 2 points"),
        (NearestFuXi(), "a model that resizes its output to img_size"),
    ],
)
def test_what_looks_the_same_and_is_not_is_refused(module, words):
    name = type(module).__name__
    model = nn.Sequential(nn.Conv2d(2, 2, 3), module)
    with pytest.raises(ValueError, match=f"1: {name} has the parts of .*{words}") as caught:
        convert(model)
    assert "custom_converters" in str(caught.value)
    assert type(model[0]) is nn.Conv2d  # nothing was changed
    assert convert(model, converters={**ALL, type(module): lambda m: m})[1] is module


def test_a_model_that_pads_otherwise_is_refused():
    wrong = ({"multiple": 4}, {"multiple": 16}, {"multiple": 8, "both_sides": True}, {"multiple": 8, "mode": "reflect"})
    for settings in wrong:
        with pytest.raises(ValueError, match=f"a model that pads to multiples of {settings['multiple']}"):
            convert(PaddedResNetUNet(), converters=padded(**settings))


class WindowedAttention(Attention):
    def __init__(self):
        super().__init__(4)
        self.window_size = 7


class LearnedScale(Attention):
    def __init__(self):
        super().__init__(4)
        self.scale = nn.Parameter(torch.ones(()))


def test_predicates_are_strict():
    others = [
        nn.Conv2d(2, 2, 3),
        SCSE(4),
        WindowedAttention(),
        LearnedScale(),
        FullAttention(4),
        PanguLike(),
        ResNetUNet(),
        convert(nn.Sequential(Attention(4)))[0],
        convert(nn.Sequential(PeriodicConv2d(2, 2)))[0],
    ]
    for module in others:
        assert not any(match(module) for match in ALL), type(module).__name__
    ours = [Attention(4), PeriodicConv2d(2, 2), DecoderBlock(2, 2, 2), FuXiLike(), *PanguLike().children()]
    matched = [[match.__name__ for match in ALL if match(module)] for module in ours]
    assert [len(names) for names in matched[:4]] == [1] * 4
    assert sorted(name for names in matched[4:] for name in names) == [
        "is_patch_expanding", "is_patch_merging", "is_patch_recovery", "is_patch_recovery",
    ]  # fmt: skip


def test_modules_without_weights_are_proved_too():
    with torch.device("meta"):
        model = nn.Sequential(LinearAttention(4, memory=2), DecoderBlock(2, 2, 2))
    converted = convert(model)
    assert isinstance(converted[0], unet.DomainParallelTokenAttention)
    assert converted[0].form == "linear"
    assert next(converted.parameters()).is_meta


def test_levels_cannot_be_sharded():
    with pytest.raises(ValueError, match="recover_upper: shard_dim must be -2 .rows. or -1 .columns.; got -3"):
        convert(nn.ModuleDict({"recover_upper": PatchRecovery(2, 2, (5, 10, 10), (2, 4, 4))}), -3)
