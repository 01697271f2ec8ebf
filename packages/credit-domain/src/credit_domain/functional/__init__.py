"""Operations on sharded tensors, for authors of models: each is torch's own, of the whole tensor.

They take and return this rank's rows. The sharded dim is ``dim``; ``partition`` says who holds which rows of the input.
"""

from credit_domain.functional.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
]
