"""Units. A link's Gbps is 10^9 bits a second; cache sizes are binary (KiB, MiB); lengths are tokens."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GBPS_BYTES_PER_S = 1e9 / 8
"""Bytes a second of one Gbps."""


def gbps_to_bytes_per_s(gbps: float) -> float:
    """Link capacity in bytes a second."""
    return gbps * GBPS_BYTES_PER_S


def bytes_per_s_to_gbps(bytes_per_s: float) -> float:
    """Rate in Gbps."""
    return bytes_per_s / GBPS_BYTES_PER_S
