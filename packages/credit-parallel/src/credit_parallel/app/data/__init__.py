"""Data sets of which every rank reads its own rows alone."""
