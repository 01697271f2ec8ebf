"""Padding, of any tensor and of a global grid."""
