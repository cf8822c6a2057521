"""Units in which people read and write sizes and bandwidths."""

MIB = 2.0**20
"""Bytes of a mebibyte."""
BYTES_PER_US_OF_A_GBPS = 125.0
"""Bytes in a microsecond at 1 Gbit/s."""
