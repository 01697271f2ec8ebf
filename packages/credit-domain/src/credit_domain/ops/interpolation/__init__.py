"""Resampling to another number of rows."""
