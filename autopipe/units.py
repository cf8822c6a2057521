"""Units in which sizes are shown to people."""

MIB = 2.0**20
"""Bytes of a mebibyte."""
