"""Convolutions and transposed convolutions, which compute their own rows while the halo travels."""

import credit_domain.ops.conv.overlap_op  # noqa: F401 - the operators that compiled code calls
