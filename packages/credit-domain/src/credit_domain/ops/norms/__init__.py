"""Normalisations, with the statistics of all ranks' rows."""
