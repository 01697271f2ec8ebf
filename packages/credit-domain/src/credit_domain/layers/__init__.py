"""Layers on sharded rows: each wraps torch's module of the same name, and gives the numbers of one rank.

All of them are made of the module to wrap and take

- ``shard_dim``: the sharded dim; latitude, -2, unless a layer says otherwise, or the only dim. A dim counted from the
  first is that of batched tensors.
- ``manager``: whose domain group takes part; None looks up the present one at each call.
- ``label``: what errors and traces call the layer, the same on every rank; None takes the name of the class.

Their errors and collectives are those of the function of the same name in :mod:`credit_domain.functional`.
"""

from credit_domain.engine.layer import DomainParallelLayer
from credit_domain.ops.conv.conv_layers import (
    DomainParallelConv1d,
    DomainParallelConv2d,
    DomainParallelConv3d,
    DomainParallelConvTranspose1d,
    DomainParallelConvTranspose2d,
    DomainParallelConvTranspose3d,
    DomainParallelPeriodicConv2d,
)
from credit_domain.ops.dropout.dropout_layers import (
    DomainParallelAlphaDropout,
    DomainParallelDropout,
    DomainParallelDropout1d,
    DomainParallelDropout2d,
    DomainParallelDropout3d,
    DomainParallelFeatureAlphaDropout,
)
from credit_domain.ops.interpolation.interpolation import DomainParallelInterpolate, DomainParallelUpsample
from credit_domain.ops.norms.norm_layers import (
    DomainParallelBatchNorm1d,
    DomainParallelBatchNorm2d,
    DomainParallelBatchNorm3d,
    DomainParallelGroupNorm,
    DomainParallelInstanceNorm1d,
    DomainParallelInstanceNorm2d,
    DomainParallelInstanceNorm3d,
    DomainParallelLayerNorm,
    DomainParallelRMSNorm,
)
from credit_domain.ops.padding.padding_layers import DomainParallelCrossEmbedBranch, DomainParallelPad
from credit_domain.ops.pixel import DomainParallelPixelShuffle, DomainParallelPixelUnshuffle
from credit_domain.ops.pooling.pooling_layers import (
    DomainParallelAdaptiveAvgPool1d,
    DomainParallelAdaptiveAvgPool2d,
    DomainParallelAdaptiveAvgPool3d,
    DomainParallelAdaptiveMaxPool1d,
    DomainParallelAdaptiveMaxPool2d,
    DomainParallelAdaptiveMaxPool3d,
    DomainParallelAvgPool1d,
    DomainParallelAvgPool2d,
    DomainParallelAvgPool3d,
    DomainParallelLPPool1d,
    DomainParallelLPPool2d,
    DomainParallelLPPool3d,
    DomainParallelMaxPool1d,
    DomainParallelMaxPool2d,
    DomainParallelMaxPool3d,
)

__all__ = [
    "DomainParallelAdaptiveAvgPool1d",
    "DomainParallelAdaptiveAvgPool2d",
    "DomainParallelAdaptiveAvgPool3d",
    "DomainParallelAdaptiveMaxPool1d",
    "DomainParallelAdaptiveMaxPool2d",
    "DomainParallelAdaptiveMaxPool3d",
    "DomainParallelAlphaDropout",
    "DomainParallelAvgPool1d",
    "DomainParallelAvgPool2d",
    "DomainParallelAvgPool3d",
    "DomainParallelBatchNorm1d",
    "DomainParallelBatchNorm2d",
    "DomainParallelBatchNorm3d",
    "DomainParallelConv1d",
    "DomainParallelConv2d",
    "DomainParallelConv3d",
    "DomainParallelConvTranspose1d",
    "DomainParallelConvTranspose2d",
    "DomainParallelConvTranspose3d",
    "DomainParallelCrossEmbedBranch",
    "DomainParallelDropout",
    "DomainParallelDropout1d",
    "DomainParallelDropout2d",
    "DomainParallelDropout3d",
    "DomainParallelFeatureAlphaDropout",
    "DomainParallelGroupNorm",
    "DomainParallelInstanceNorm1d",
    "DomainParallelInstanceNorm2d",
    "DomainParallelInstanceNorm3d",
    "DomainParallelInterpolate",
    "DomainParallelLPPool1d",
    "DomainParallelLPPool2d",
    "DomainParallelLPPool3d",
    "DomainParallelLayer",
    "DomainParallelLayerNorm",
    "DomainParallelMaxPool1d",
    "DomainParallelMaxPool2d",
    "DomainParallelMaxPool3d",
    "DomainParallelPad",
    "DomainParallelPeriodicConv2d",
    "DomainParallelPixelShuffle",
    "DomainParallelPixelUnshuffle",
    "DomainParallelRMSNorm",
    "DomainParallelUpsample",
]
