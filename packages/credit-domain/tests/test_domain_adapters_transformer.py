"""Transformer families: converted and exact on uneven ranks, and refused where they are not what they look like."""

from __future__ import annotations

from pathlib import Path

import families_transformer as families
import pytest
import torch
import torch.nn.functional as F
from domain_models import CubeEmbedding, MultiKernelEmbedding, PeriodicResidualNet, UNet
from families_transformer import (
    ChannelsLastSwin,
    CrossAttention,
    CrossFormer,
    Merging,
    PatchEmbed,
    PatchExpand,
    PatchMerging,
    ShiftedWindowAttention,
    SwinBlock,
    SwinUNet,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from credit_domain import (
    convert_to_domain_parallel,
    gather_tensor,
    granularity_of,
    plan_domain_parallel,
    shard_tensor,
    verify_domain_parallel,
)
from credit_domain.adapters import RegroupedModule, known_converters, known_families, register, registry, table
from credit_domain.adapters.crossformer import convert_cross_attention
from credit_domain.adapters.stochastic import DomainParallelDropPath
from credit_domain.adapters.swin import (
    convert_patch_embedding,
    convert_patch_expanding,
    convert_patch_merging,
    convert_shifted_attention,
    convert_swin_block,
)
from credit_domain.adapters.window_proof import simulated
from credit_domain.adapters.window_shares import shares_of
from credit_domain.blocks import WindowAttention
from credit_domain.layers import DomainParallelDropout
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

FAMILIES = {
    "CrossFormer": (CrossFormer, (1, 2, 48, 48)),
    "CrossFormer that pads": (lambda: CrossFormer(windows=(5, 4), pads=True), (1, 2, 17 * 4 + 4, 32)),
    "Swin V1": (lambda: SwinUNet(36, 24), (2, 2, 36, 24)),
    "Swin V2": (lambda: SwinUNet(48, 16, window=4, version=2), (1, 2, 48, 16)),
    "Swin V1, channels last": (ChannelsLastSwin, (1, 2, 17 * 2 + 6, 14)),
    "Swin V2, channels last": (lambda: ChannelsLastSwin(version=2), (1, 2, 42, 14)),
    "Swin without mask": (lambda: ChannelsLastSwin(3, masked=False), (1, 2, 38, 14)),
}


def made(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_exact(family, ranks):
    make, shape = FAMILIES[family]
    report = verify_domain_parallel(made(make), shape, ranks, custom_converters=known_converters())
    assert report, str(report)
    assert report.partition.rows == shape[-2]
    assert len(report.parameter_gradients) > 20


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("CrossFormer", (8, 32, 8)),  # one row at the lower level
        ("CrossFormer that pads", (8, 8, 8, 48)),
        ("Swin V1", (4, 4, 20, 8)),
        ("Swin V2", (40, 4, 4)),
        ("Swin V1, channels last", (4, 28, 4, 4)),
    ],
)
def test_ranks_with_less_than_a_window(family, sizes):
    make, shape = FAMILIES[family]
    converters = known_converters()
    report = verify_domain_parallel(
        made(make), shape, len(sizes), custom_converters=converters, partition=RowPartition(sizes)
    )
    assert report, str(report)


@pytest.mark.parametrize(
    ("make", "shape", "kind"),
    [
        (CrossFormer, (1, 2, 144, 48), "CrossAttention"),  # whole windows: the long-distance ones are wrong
        (lambda: SwinUNet(72, 12), (1, 2, 72, 12), "PatchEmbed"),
        (ChannelsLastSwin, (1, 2, 48, 14), "ShiftedWindowAttention"),
    ],
)
def test_without_converters_they_are_not(make, shape, kind):
    def by_the_rules(model, manager):
        return convert_to_domain_parallel(model, manager, known=False, check=False)

    report = verify_domain_parallel(made(make), shape, 3, convert=by_the_rules)
    assert not report
    assert report.difference.kind == kind


def test_known_families_need_not_be_passed():
    assert verify_domain_parallel(made(CrossFormer), (1, 2, 144, 48), 3)
    plan_domain_parallel(made(CrossFormer), (1, 2, 144, 48), 3)


class GridBlocks(nn.Module):
    """Blocks of (B, H, W, C) that store their resolution, as a list, and return them normalised."""

    class Block(SwinBlock):
        def forward(self, x):
            B, H, W, C = x.shape
            return super().forward(x.view(B, H * W, C)).view(B, H, W, C)

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block(4, [15, 10], 5, shift) for shift in (False, True))

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


def test_blocks_of_grids_that_store_their_resolution():
    report = verify_domain_parallel(
        made(GridBlocks), (2, 4, 15, 10), 4, custom_converters=known_converters(), partition=RowPartition((1, 2, 9, 3))
    )
    assert report, str(report)


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm(norm):
    model = made(CrossFormer)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            norm(module)
    report = verify_domain_parallel(model, (1, 2, 48, 48), 3, custom_converters=known_converters())
    assert report, str(report)


# Any partition


class RollsFirst(ShiftedWindowAttention):
    """Pads what it has rolled."""

    def forward(self, x):
        (_, H, W, _), s, shift = x.shape, self.window_size[0], self.shift_size[0]
        x = torch.roll(x, (-shift, -shift), (1, 2))
        x = F.pad(x, (0, 0, 0, -W % s, 0, -H % s))
        h, w = x.shape[1:3]
        mask = families.shift_mask(h, w, s, shift, x.device).to(x.dtype) if h > s and w > s else None
        x = families.join(families.WindowAttention.forward(self, families.cut(x, s), mask), s, h, w)[:, :H, :W]
        return torch.roll(x, (shift, shift), (1, 2))


@settings(max_examples=80)
@given(st.data())
def test_windows_of_any_partition(data):
    """All ranks one after the other; the exchange itself is tested elsewhere."""
    window = data.draw(st.integers(2, 5), "window")
    kind = data.draw(st.sampled_from(["short", "long", "shifted", "rolls first", "merge"]), "kind")
    sizes = tuple(data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any), "sizes"))
    shift = 0
    if kind in ("short", "long"):
        layer = convert_cross_attention(CrossAttention(4, kind, window, pads=True))
    elif kind == "merge":
        layer = convert_patch_merging(Merging(4))
    else:
        shift = data.draw(st.integers(kind == "rolls first", window - 1), "shift")
        kinds = {"shifted": ShiftedWindowAttention, "rolls first": RollsFirst}
        layer = convert_shifted_attention(kinds[kind](4, window, shift))
    cutting = layer.__dict__["_cutting"]
    assert cutting.shift == shift
    assert cutting.padding == {"rolls first": "roll pad"}.get(kind, "pad roll" if shift else "pad")
    plain = layer.wrapped.double().eval()
    x = torch.randn(2, sum(sizes), 2 * window - 1, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x if cutting.channels_last else x.movedim(-1, 1))
        found = simulated(plain, x, sizes, cutting, False)
    torch.testing.assert_close(found, expected if cutting.channels_last else expected.movedim(2, 1), rtol=0, atol=1e-12)


def test_every_row_is_worked_on_once():
    for rows in range(1, 25):
        source = RowPartition((rows // 3, 0, rows - rows // 3), allow_empty=True)
        for window in range(1, 7):
            for shift in range(window):
                for kind, first in (("windows", False), ("windows", True), ("dilated", False), ("merge", False)):
                    if shift and kind != "windows":
                        continue
                    shares = shares_of(source, window, shift, kind, first)
                    worked = sorted(row for share in shares for row in share.rows if row >= 0)
                    assert worked == list(range(rows))
                    assert all(share.rows for share in shares)


# What stays as it was


@pytest.mark.parametrize("family", ["CrossFormer", "Swin V1", "Swin V2, channels last"])
def test_state_dict_and_parameters_stay(family):
    def rank_main(rank):
        model = FAMILIES[family][0]()
        keys, parameters = list(model.state_dict()), list(model.parameters())
        convert_to_domain_parallel(model, initialize_domain_parallel(2, 2), custom_converters=known_converters())
        assert any(isinstance(module, RegroupedModule) for module in model.modules())
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(m.label.count(".") for m in model.modules() if isinstance(m, RegroupedModule) and "." in m.label)

    run_threads(rank_main, 2)


def test_checkpointing_autocast_and_batches():
    torch.manual_seed(0)
    whole = torch.randn(3, 2, 40, 14, dtype=torch.float64)
    reference = made(ChannelsLastSwin).double().eval()
    expected = reference(whole)
    expected.cos().sum().backward()
    gradients = [p.grad for p in reference.parameters()]
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        rough = reference.float()(whole.float())

    def rank_main(rank):
        model = ChannelsLastSwin().double().eval()
        model.load_state_dict(state)
        manager = initialize_domain_parallel(3, 3)
        convert_to_domain_parallel(model, manager, custom_converters=known_converters())
        manager.declare(RowPartition((4, 12, 24)))
        x = shard_tensor(whole, -2, manager)
        for part in (x[:1], x):  # another batch in between
            out = checkpoint(model, part, use_reentrant=False)
        model.zero_grad()
        out.cos().sum().backward()
        own = [p.grad for p in model.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            other = model.float()(x.float())
        return out.detach(), own, other.detach()

    ranks = run_threads(rank_main, 3)
    torch.testing.assert_close(torch.cat([out for out, _, _ in ranks], 2), expected.detach())
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(grads[i] for _, grads, _ in ranks), gradient)
    torch.testing.assert_close(torch.cat([other for _, _, other in ranks], 2), rough.detach(), rtol=0, atol=0.02)


def test_dropout_differs_between_ranks_and_paths_do_not():
    torch.manual_seed(0)  # of one generator, from which each rank draws other numbers

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        block = SwinBlock(4, (6, 6), 3, shift=True)
        model = convert_to_domain_parallel(nn.Sequential(block), manager, custom_converters=known_converters())
        assert isinstance(block.drop_path, DomainParallelDropPath)
        assert isinstance(block.attn.attn_drop, DomainParallelDropout)
        block.drop_path.wrapped.drop_prob = 0.5
        assert model(torch.randn(2, 18, 4)).shape == (2, 18, 4)
        return block.drop_path(torch.ones(32, 3, 2))

    first, second = run_threads(rank_main, 2)
    assert torch.equal(first, second)
    assert set(first.flatten().tolist()) == {0.0, 2.0}


# Refused


class Mixes(CrossAttention):
    """Has the parts of an attention, and adds a mean over rows."""

    def forward(self, x):
        return super().forward(x) + x.mean(2, keepdim=True)


class OtherNorm(CrossAttention):
    def __init__(self):
        super().__init__(4, "short", 2)
        self.norm = nn.GroupNorm(1, 4)


class RollsBack(SwinBlock):
    def attend(self, x):
        return super().attend(x.roll(2 * self.shift_size, 1)).roll(-2 * self.shift_size, 1)


class PadsInFront(CrossAttention):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, -x.shape[2] % self.window_size, 0)))[:, :, -x.shape[2] :]


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("convert", "module", "message"),
    [
        (
            convert_cross_attention,
            lambda: changed(CrossAttention(4, "short", 2), attn_type="grid"),
            "'short' or 'long'",
        ),
        (
            convert_cross_attention,
            lambda: changed(CrossAttention(4, "short", 2), window_size=None),
            "expected a window",
        ),
        (convert_cross_attention, lambda: Mixes(4, "short", 2), "does something else with rows"),
        (convert_cross_attention, lambda: PadsInFront(4, "short", 3), "does something else with rows"),
        (convert_cross_attention, OtherNorm, "OtherNorm holds norm .GroupNorm., which may mix rows"),
        (convert_swin_block, lambda: changed(SwinBlock(4, (6, 6), 3, True), H=6, W=6), "set from outside"),
        (convert_swin_block, lambda: changed(SwinBlock(4, (6, 6), 3, True), input_resolution=6), "as a pair"),
        (convert_swin_block, lambda: RollsBack(4, (6, 6), 3, True), "RollsBack was taken for .* does something else"),
        (convert_swin_block, lambda: changed(SwinBlock(4, (6, 6), 3, True), shift_size=3), "shift smaller than"),
        (convert_shifted_attention, lambda: changed(ShiftedWindowAttention(4, 3, 1), window_size=[3]), "a pair"),
        (convert_patch_merging, lambda: changed(PatchMerging((6, 6), 4), input_resolution=(7, 6)), "does not take"),
        (convert_patch_expanding, lambda: changed(PatchExpand((6, 6), 4, 4, 2), norm=nn.LayerNorm(8)), "C \\* n \\* n"),
        (convert_patch_embedding, lambda: changed(PatchEmbed(2, 4, (8, 8), 2), img_size=8), "img_size as a pair"),
    ],
)
def test_what_is_not_as_expected_is_refused(convert, module, message):
    with pytest.raises(ValueError, match=message):
        convert(module())


def test_the_sharded_dim_is_rows():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2, -1)
        with pytest.raises(ValueError, match="rows are dim -2.*got shard_dim=-1"):
            convert_to_domain_parallel(CrossFormer(), manager, -1, known_converters())

    run_threads(rank_main, 2)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (lambda: convert_cross_attention(CrossAttention(4, "long", 3)), (1, 4, 4, 6), "8 rows are no multiple of 3"),
        (lambda: convert_swin_block(SwinBlock(4, (6, 6), 3, True)), (1, 24, 4), "is for 6 rows; the ranks have 4, 4"),
        (lambda: convert_swin_block(SwinBlock(4, (6, 6), 3, True)), (1, 20, 4), "expected tokens of whole rows of 6"),
        (lambda: convert_shifted_attention(ShiftedWindowAttention(4, 3, 1)), (1, 24, 4), "stores its resolution"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_on_all_ranks(layer, shape, message):
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        converted = layer()
        converted.__dict__["manager"] = manager
        with pytest.raises(ValueError, match=message):
            converted(torch.randn(shape))
        with pytest.raises(ValueError, match="was given more than its input"):
            converted(torch.randn(shape), torch.ones(1))

    run_threads(rank_main, 2)


# The registry


def test_nothing_else_matches():
    for model in (UNet(), MultiKernelEmbedding(), PeriodicResidualNet(), CubeEmbedding()):
        for name, module in model.named_modules():
            for family in known_families():
                if family.name.startswith(("Swin", "CrossFormer", "Stochastic")):
                    assert not family.match(module), f"{family.name} matches {name}"
    own = WindowAttention(4, (2, 2), 2)  # exact already
    converted = [
        convert_cross_attention(CrossAttention(4, "long", 2)),
        convert_swin_block(SwinBlock(4, (6, 6), 3, True)),
        convert_shifted_attention(ShiftedWindowAttention(4, 3, 1)),
        convert_patch_merging(Merging(4)),
        convert_patch_expanding(PatchExpand((6, 6), 4, 4, 2)),
        convert_patch_embedding(PatchEmbed(2, 4, (8, 8), 2)),
        DomainParallelDropPath(families.DropPath(0.5)),
    ]
    for module in (own, *converted):
        assert not any(match(module) for match in known_converters())


def test_the_page_lists_what_is_known():
    page = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
    assert table() in page


def test_registry(monkeypatch):
    class Own(nn.Module):
        pass

    monkeypatch.setattr(registry, "_families", dict(registry._families))
    count = len(known_converters())
    register(Own, lambda module: nn.Identity(), name="own", notes="of a test")
    assert len(known_converters()) == count + 1
    assert isinstance(known_converters()[Own](Own()), nn.Identity)
    register("package.Own", lambda module: nn.Identity(), name="own")
    assert len(known_converters()) == count + 1
    assert table().splitlines()[-1] == "| own | package.Own |  |"
    assert "CrossFormer attention" in table()


def test_windows_of_what_is_converted_do_not_count_for_the_granularity():
    model = SwinUNet(36, 24)
    assert granularity_of(model, input_shape=(1, 2, 36, 24)) % 3 == 0
    plan = plan_domain_parallel(model, (1, 2, 36, 24), 4, custom_converters=known_converters())
    assert plan.partition.sizes == (12, 8, 8, 8)

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        shape = (1, 2, 36, 24)
        convert_to_domain_parallel(SwinUNet(36, 24), manager, custom_converters=known_converters(), input_shape=shape)
        assert manager.granularity == 4

    run_threads(rank_main, 2)


def test_gathered_result_is_that_of_one_rank():
    torch.manual_seed(0)
    model, whole = SwinUNet(36, 24).eval(), torch.randn(1, 2, 36, 24)
    expected = model(whole).detach()

    def rank_main(rank):
        twin = SwinUNet(36, 24).eval()
        twin.load_state_dict(model.state_dict())
        manager = initialize_domain_parallel(3, 3)
        twin = convert_to_domain_parallel(twin, manager, custom_converters=known_converters(), input_shape=whole.shape)
        manager.declare(36)
        return gather_tensor(twin(shard_tensor(whole, -2, manager)), -2, manager)

    for found in run_threads(rank_main, 3):
        torch.testing.assert_close(found.detach(), expected)
