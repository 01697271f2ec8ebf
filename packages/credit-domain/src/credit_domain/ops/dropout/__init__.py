"""Dropout, with masks that differ between ranks, or are the same for whole channels."""
