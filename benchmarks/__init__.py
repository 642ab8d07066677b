"""Paired measurements: contenders of one task take turns in one process."""
