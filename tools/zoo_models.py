"""The models of the zoo: from their own packages, unmodified and small, and some written as papers describe them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Entry(NamedTuple):
    """A model of the zoo.

    Attributes:
        package: The distribution that it is from; empty for what is written here.
        make: Makes it.
        shapes: Shapes of its arguments.
        single: Whether it computes in float32 whatever its arguments are.
    """

    package: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    single: bool = False


class Called(nn.Module):
    """A model of which something else than ``forward`` is called, or whose result holds more than tensors."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Tensor) -> Any:
        return self.call(self.model, *args)


def prepare() -> None:
    """Let torchvision be imported where its operators are built for another torch; no model here calls them."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return
    text = (Path(found.submodule_search_locations[0]) / "_meta_registrations.py").read_text()
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r'(?:torchvision::|register_meta\(")(\w+)"', text))):
            library.define(f"{name}(Tensor x) -> Tensor")
        _kept.append(library)


_kept: list[Any] = []


def timm(name: str, features: bool = True, **how: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model = timm.create_model(name, pretrained=False, **how)
        return Called(model, lambda model, x: model.forward_features(x)) if features else model

    return make


def segmentation(name: str, **how: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None, in_channels=3, classes=2, **how)

    return make


def unet2d() -> nn.Module:
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=(32, 32),
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return Called(model, lambda model, x, t: model(x, t[:, 0], return_dict=False)[0])


def decoder() -> nn.Module:
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return Called(model, lambda model, x: model.decode(x, return_dict=False)[0])


def operator(name: str, **how: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import neuralop.models

        return getattr(neuralop.models, name)(in_channels=2, out_channels=2, hidden_channels=8, **how)

    return make


def vision(name: str, **how: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models.segmentation, name)(
            weights=None, weights_backbone=None, num_classes=2, aux_loss=False, **how
        )

    return make


def swin() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    how = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2, "stochastic_depth_prob": 0.0}
    return SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=3, **how)


def spherical() -> nn.Module:
    from torch_harmonics.examples.models.sfno import SphericalFourierNeuralOperator

    sizes = {"img_size": (33, 32), "scale_factor": 2, "in_chans": 2, "out_chans": 2, "embed_dim": 8, "num_layers": 3}
    return SphericalFourierNeuralOperator(**sizes, normalization_layer="instance_norm")


def aurora() -> nn.Module:
    import aurora

    surface, static, levels = ("2t", "10u"), ("lsm", "z"), (500, 850)
    model = aurora.Aurora(
        surf_vars=surface,
        static_vars=static,
        atmos_vars=("t", "u"),
        window_size=(2, 4, 4),
        encoder_depths=(2, 2),
        encoder_num_heads=(2, 4),
        decoder_depths=(2, 2),
        decoder_num_heads=(4, 2),
        latent_levels=4,
        patch_size=4,
        embed_dim=16,
        num_heads=2,
        enc_depth=1,
        dec_depth=1,
        drop_path=0.0,
        drop_rate=0.0,
        use_lora=False,
        autocast=False,
    )

    def call(model: nn.Module, x: Tensor, fixed: Tensor) -> list[Tensor]:
        rows, columns = x.shape[-2:]
        about = aurora.Metadata(
            lat=torch.linspace(90, -90, rows),
            lon=torch.linspace(0, 360, columns + 1)[:-1],
            time=(datetime(2026, 1, 1),),
            atmos_levels=levels,
        )
        made = model(
            aurora.Batch(
                surf_vars={name: x[:, :, at] for at, name in enumerate(surface)},
                static_vars={name: fixed[0, at] for at, name in enumerate(static)},
                atmos_vars={"t": x[:, :, 2:4], "u": x[:, :, 4:6]},
                metadata=about,
            )
        )
        return [*made.surf_vars.values(), *made.atmos_vars.values()]

    return Called(model, call)


class EarthBlock(nn.Module):
    """Shifted windows over levels, rows and columns, with a bias for each row of windows and sizes that are stored."""

    def __init__(self, size: tuple[int, int, int], window: tuple[int, int, int], channels: int, shift: bool) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, tuple(n // 2 for n in window) if shift else (0, 0, 0)
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )
        tokens = window[0] * window[1] * window[2]
        types = (size[0] // window[0]) * (size[1] // window[1])
        self.bias = nn.Parameter(torch.randn(1, types, 1, 2, tokens, tokens) * 0.1)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        (z, h, w), (a, b, c), channels = self.size, self.window, x.shape[-1]
        t = torch.roll(self.norm(x).view(1, z, h, w, channels), tuple(-s for s in self.shift), (1, 2, 3))
        t = t.view(1, z // a, a, h // b, b, w // c, c, channels).permute(0, 5, 1, 3, 2, 4, 6, 7)
        t = t.reshape(1, w // c, (z // a) * (h // b), a * b * c, channels)
        q, k, v = self.qkv(t).view(*t.shape[:-1], 3, 2, channels // 2).permute(4, 0, 2, 1, 5, 3, 6)
        t = ((q @ k.transpose(-1, -2) + self.bias).softmax(-1) @ v).permute(0, 2, 1, 4, 3, 5).reshape(t.shape)
        t = self.out(t).view(1, w // c, z // a, h // b, a, b, c, channels).permute(0, 2, 4, 3, 5, 1, 6, 7)
        t = torch.roll(t.reshape(1, z, h, w, channels), self.shift, (1, 2, 3)).reshape(x.shape)
        x = x + t
        return x + self.mlp(x)


class Pangu(nn.Module):
    """Patches of levels, rows and columns, padded to windows; earth-specific windows; and back to the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4))
        self.blocks = nn.Sequential(*[EarthBlock((2, 12, 16), (2, 6, 4), 8, shift) for shift in (False, True)])
        self.back = nn.ConvTranspose3d(8, 3, (2, 4, 4), (2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(F.pad(x, (0, 0, 1, 2)))
        t = self.blocks(t.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(1, 8, 2, 12, 16)
        return self.back(t)[:, :, :, 1:-2]


class CrossBlock(nn.Module):
    """Attention among neighbours, or among every ``n``-th row and column."""

    def __init__(self, channels: int, window: int, far: bool) -> None:
        super().__init__()
        self.window, self.far = window, far
        self.norm, self.mix = nn.GroupNorm(1, channels), nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        n = self.window
        t = self.norm(x)
        if self.far:
            t = t.view(b, c, n, h // n, n, w // n).permute(0, 3, 5, 2, 4, 1)
        else:
            t = t.view(b, c, h // n, n, w // n, n).permute(0, 2, 4, 3, 5, 1)
        t = t.reshape(-1, n * n, c)
        t = self.mix(t, t, t, need_weights=False)[0].view(b, h // n, w // n, n, n, c)
        t = t.permute(0, 5, 3, 1, 4, 2) if self.far else t.permute(0, 5, 1, 3, 2, 4)
        return x + t.reshape(b, c, h, w)


class CrossFormer(nn.Module):
    """Embeddings of several widths, near and far attention, and an interpolation to the full grid."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Conv2d(3, 4, k, 2, (k - 2) // 2) for k in (2, 4, 8))
        self.blocks = nn.Sequential(CrossBlock(12, 4, False), CrossBlock(12, 4, True))
        self.head = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        t = self.blocks(torch.cat([layer(x) for layer in self.embed], 1))
        return F.interpolate(self.head(t), size=(33, 64), mode="bilinear")


class Columns(nn.Module):
    """Attention along columns between shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.columns = CrossBlock(8, 4, False), nn.MultiheadAttention(8, 2, batch_first=True)
        self.into, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.into(x))
        b, c, h, w = x.shape
        t = x.permute(0, 3, 2, 1).reshape(b * w, h, c)
        t = self.columns(t, t, t, need_weights=False)[0].reshape(b, w, h, c).permute(0, 3, 2, 1)
        return self.out(torch.roll(self.first(torch.roll(x + t, (-2, -2), (2, 3))), (2, 2), (2, 3)))


class MeshGraph(nn.Module):
    """From the grid to a mesh along edges, messages on the mesh, and back along edges, with sums at the nodes."""

    def __init__(self, rows: int = 24, columns: int = 32, nodes: int = 42) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, first, second in (
            ("up", rows * columns, nodes),
            ("mesh", nodes, nodes),
            ("down", nodes, rows * columns),
        ):
            self.register_buffer(f"{name}_from", torch.randint(0, first, (900,), generator=draw))
            self.register_buffer(f"{name}_to", torch.randint(0, second, (900,), generator=draw))
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 3)
        self.mesh_nodes = nn.Parameter(torch.randn(nodes, 8))
        self.edges = nn.ModuleDict({name: nn.Linear(16, 8) for name in ("up", "mesh", "down")})
        self.nodes = nn.ModuleDict({name: nn.Linear(16, 8) for name in ("up", "mesh", "down")})

    def along(self, name: str, source: Tensor, target: Tensor) -> Tensor:
        first, second = getattr(self, f"{name}_from"), getattr(self, f"{name}_to")
        message = F.silu(self.edges[name](torch.cat([source[:, first], target[:, second]], -1)))
        total = torch.zeros_like(target).index_add(1, second, message)
        return target + F.silu(self.nodes[name](torch.cat([target, total], -1)))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x.flatten(2).transpose(1, 2))
        mesh = self.along("up", grid, self.mesh_nodes.expand(x.shape[0], -1, -1))
        for _ in range(2):
            mesh = self.along("mesh", mesh, mesh)
        return self.out(self.along("down", mesh, grid)).transpose(1, 2).reshape(x.shape)


IMAGE = ((2, 3, 64, 64),)
ZOO: dict[str, Entry] = {
    "ConvNeXt V2": Entry(
        "timm", timm("convnextv2_atto", False, num_classes=5, depths=(1,) * 4, dims=(8, 8, 16, 16)), IMAGE
    ),
    "Swin V2": Entry(
        "timm",
        timm(
            "swinv2_tiny_window8_256",
            img_size=64,
            window_size=4,
            embed_dim=12,
            depths=(2, 2),
            num_heads=(2, 4),
            drop_path_rate=0.0,
        ),
        IMAGE,
    ),
    "MaxViT": Entry("timm", timm("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1,) * 4), IMAGE),
    "ViT": Entry(
        "timm",
        timm("vit_tiny_patch16_224", img_size=(32, 64), patch_size=4, embed_dim=24, depth=2, num_heads=4),
        ((1, 3, 32, 64),),
    ),
    "EfficientNet": Entry("timm", timm("efficientnet_b0", False, num_classes=3, drop_path_rate=0.0), IMAGE),
    "swin_v2": Entry("torchvision", swin, ((1, 3, 32, 32),)),
    "deeplabv3": Entry("torchvision", vision("deeplabv3_mobilenet_v3_large"), IMAGE),
    "fcn": Entry("torchvision", vision("fcn_resnet50"), IMAGE),
    "Unet": Entry("segmentation-models-pytorch", segmentation("Unet"), IMAGE),
    "Unet, scSE": Entry("segmentation-models-pytorch", segmentation("Unet", decoder_attention_type="scse"), IMAGE),
    "UnetPlusPlus": Entry("segmentation-models-pytorch", segmentation("UnetPlusPlus"), IMAGE),
    "FPN": Entry("segmentation-models-pytorch", segmentation("FPN"), IMAGE),
    "PSPNet": Entry("segmentation-models-pytorch", segmentation("PSPNet"), IMAGE),
    "DeepLabV3Plus": Entry("segmentation-models-pytorch", segmentation("DeepLabV3Plus"), IMAGE),
    "UNet2DModel": Entry("diffusers", unet2d, ((1, 3, 32, 32), (1, 1))),
    "AutoencoderKL decoder": Entry("diffusers", decoder, ((1, 4, 16, 16),)),
    "FNO": Entry("neuraloperator", operator("FNO", n_modes=(8, 8), n_layers=2), ((1, 2, 33, 32),)),
    "TFNO": Entry(
        "neuraloperator",
        operator("TFNO", n_modes=(8, 8), n_layers=2, factorization="tucker", rank=0.5),
        ((1, 2, 33, 32),),
    ),
    "UNO": Entry(
        "neuraloperator",
        operator(
            "UNO",
            n_layers=3,
            uno_out_channels=[8, 8, 8],
            uno_n_modes=[[6, 6]] * 3,
            uno_scalings=[[1, 1], [0.5, 0.5], [2, 2]],
            channel_mlp_skip="linear",
        ),
        ((1, 2, 32, 32),),
    ),
    "SFNO": Entry("torch-harmonics", spherical, ((1, 2, 33, 32),), single=True),
    "Aurora": Entry("microsoft-aurora", aurora, ((1, 2, 6, 32, 64), (1, 2, 32, 64))),
    "Pangu": Entry("", Pangu, ((1, 3, 4, 45, 64),)),
    "CrossFormer": Entry("", CrossFormer, ((1, 3, 32, 64),)),
    "columns between windows": Entry("", Columns, ((1, 3, 24, 32),)),
    "grid and mesh": Entry("", MeshGraph, ((2, 3, 24, 32),)),
}
