"""Pooling: by windows that slide over the rows, and to a given number of rows."""
