"""Convolutions and transposed convolutions, which compute their own rows while the halo travels."""
