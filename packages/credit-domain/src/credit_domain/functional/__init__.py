"""Operations on sharded tensors, for authors of models: each is torch's own, of the whole tensor.

They take and return this rank's rows. All of them take these keyword arguments:

- ``dim``: the sharded dim; latitude, -2, unless an operation says otherwise.
- ``partition``: who holds which rows of the input; where None, the ranks ask each other at each call.
- ``manager``: whose domain group takes part; None is the present one, or nobody else.
- ``label``: what errors and traces call the operation; the same on every rank.

All other arguments mean what they mean in torch, of the whole tensor, unless an operation says otherwise. All raise an
``ExchangeError`` if a peer died, or did not answer within the timeout of the group.
"""

from credit_domain.ops.conv.convolution import conv1d, conv2d, conv3d
from credit_domain.ops.conv.transposed import conv_transpose1d, conv_transpose2d, conv_transpose3d
from credit_domain.ops.dropout.dropping import (
    alpha_dropout,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from credit_domain.ops.interpolation.interpolation import interpolate
from credit_domain.ops.norms.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from credit_domain.ops.padding.boundary import pad_boundary, unpad_boundary
from credit_domain.ops.padding.padding import pad
from credit_domain.ops.pixel import pixel_shuffle, pixel_unshuffle
from credit_domain.ops.pooling.adaptive_pooling import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
)
from credit_domain.ops.pooling.pooling import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from credit_domain.ops.rearranging import crop, flip, partition_of, regroup, regroup_back, repartition, roll
from credit_domain.ops.reductions import amax, amin, logsumexp, mean, softmax, std, sum, var, var_mean

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "alpha_dropout",
    "amax",
    "amin",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "crop",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "flip",
    "group_norm",
    "instance_norm",
    "interpolate",
    "layer_norm",
    "logsumexp",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mean",
    "pad",
    "pad_boundary",
    "partition_of",
    "pixel_shuffle",
    "pixel_unshuffle",
    "regroup",
    "regroup_back",
    "repartition",
    "rms_norm",
    "roll",
    "softmax",
    "std",
    "sum",
    "unpad_boundary",
    "var",
    "var_mean",
]
