"""Converters for modules of the field that rules cannot guess, proved by verification; see ``docs/adapters.md``."""

from collections.abc import Callable

from torch import nn

from credit_domain.adapters import crossformer, cube, stochastic, swin
from credit_domain.adapters import unet_families as unet
from credit_domain.adapters.adapter import Adapter
from credit_domain.adapters.registry import Family, known_converters, known_families, register, table
from credit_domain.adapters.window_families import RegroupedModule

_CONVOLUTIONAL: dict[Callable[[nn.Module], bool], tuple[str, str, str]] = {
    unet.is_token_attention: (
        "Attention over all tokens",
        "convolutions of one point `to_qkv`, `heads` and `to_out`",
        "full or linear, (B, C, H, W); with learned keys and values `mem_kv`",
    ),
    unet.is_periodic_conv: (
        "Periodic convolution",
        "an only child `conv` without padding, and a number `padding`",
        "longitude wraps around, rows reflect",
    ),
    unet.is_decoder_block: (
        "Decoder of a UNet",
        "`conv1`, `conv2`, perhaps `attention1` and `attention2`; takes a tensor and a skip",
        "doubles rows and columns, and concatenates",
    ),
    cube.is_patch_recovery: (
        "Patch recovery",
        "a transposed convolution `conv` and `img_size`",
        "cuts what was padded",
    ),
    cube.is_patch_merging: (
        "Pangu patch merging",
        "`norm` and `linear` of four times C",
        "(..., H, W, C); pads odd sizes",
    ),
    cube.is_patch_expanding: ("Pangu patch expanding", "`linear1`, `norm`, `linear2`", "cut to `output_resolution`"),
    cube.is_resizing_model: (
        "FuXi",
        "`cube_embedding`, `u_transformer`, `fc`, `patch_size` and `img_size`",
        "the model itself; its body is converted by the other families",
    ),
}
for _match, _converter in {**unet.CONVERTERS, **cube.CONVERTERS}.items():
    _name, _matches, _notes = _CONVOLUTIONAL.get(_match, (_match.__name__, "", ""))
    register(_match, _converter, name=_name, matches=_matches, notes=_notes)

__all__ = [
    "Adapter",
    "Family",
    "RegroupedModule",
    "crossformer",
    "cube",
    "known_converters",
    "known_families",
    "register",
    "stochastic",
    "swin",
    "table",
    "unet",
]
