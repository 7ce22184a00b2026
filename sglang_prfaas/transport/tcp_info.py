"""What Linux knows of a TCP connection: `struct tcp_info` of include/uapi/linux/tcp.h, read with getsockopt(TCP_INFO).

The struct has only ever grown at its end, and a kernel returns as many bytes as it knows: figures that it does not give
are 0. Other systems have no such struct, or another one under the same name; there `read` returns None.
"""

from __future__ import annotations

import itertools
import socket
import struct
import sys

from msgspec import Struct

_MAX_BYTES = 1024
"""More than any kernel returns; Linux 6.12 has 248."""
_LEAST_BYTES = 104
"""Linux 2.6.10: up to `tcpi_total_retrans`."""

_LAYOUT = struct.Struct("=8B24I4Q6I4Q2I2Q")
"""After those of Linux 2.6.10, in order: pacing_rate, max_pacing_rate, bytes_acked, bytes_received; segs_out, segs_in,
notsent_bytes, min_rtt, data_segs_in, data_segs_out; delivery_rate, busy_time, rwnd_limited, sndbuf_limited; delivered,
delivered_ce; bytes_sent, bytes_retrans."""
_FIELD_ENDS = tuple(itertools.accumulate([8] * 4 + [4] * 6 + [8] * 4 + [4] * 2 + [8] * 2, initial=_LEAST_BYTES))
"""Of those after the first, in bytes."""
_APP_LIMITED = 1
"""Lowest bit of the eighth byte: `tcpi_delivery_rate_app_limited`."""


class TcpInfo(Struct, frozen=True, kw_only=True):
    """One look at a connection, as its sender. Counters start with the connection."""

    mss_bytes: int
    unacked_segments: int
    """Sent, and not acknowledged yet."""
    lost_segments: int
    cwnd_segments: int
    retransmitted_segments: int
    """Ever."""
    rtt_s: float
    """Smoothed."""
    pacing_bytes_per_s: int = 0
    acked_bytes: int = 0
    notsent_bytes: int = 0
    """In the socket's buffer, not sent for the first time yet."""
    min_rtt_s: float = 0.0
    """Over the kernel's window, net.ipv4.tcp_min_rtt_wlen."""
    sent_segments: int = 0
    """Segments with data, retransmitted ones included."""
    delivery_bytes_per_s: int = 0
    """The latest sample, or the largest of the application's own making."""
    app_limited: bool = False
    """Whether that sample was limited by what there was to send."""
    busy_s: float = 0.0
    """Time with data in the socket's buffer."""
    rwnd_limited_s: float = 0.0
    """Part of it in which the receiver's window was full."""
    sndbuf_limited_s: float = 0.0
    """Part of it in which the send buffer was too small."""

    @property
    def unacked_bytes(self) -> int:
        """An estimate from above: every segment counted as full."""
        return self.unacked_segments * self.mss_bytes


def parse(data: bytes) -> TcpInfo | None:
    """`data`: what the kernel returned, of any length. None where it is shorter than Linux has ever had it."""
    if len(data) < _LEAST_BYTES:
        return None
    if len(data) < _LAYOUT.size:
        known = max(end for end in _FIELD_ENDS if end <= len(data))
        data = data[:known].ljust(_LAYOUT.size, b"\0")
    fields = _LAYOUT.unpack_from(data)
    flags, words, later = fields[7], fields[8:32], fields[32:]
    min_rtt_us = later[7] if later[7] != 0xFFFFFFFF else 0  # no sample yet
    return TcpInfo(
        mss_bytes=words[2],
        unacked_segments=words[4],
        lost_segments=words[6],
        cwnd_segments=words[18],
        retransmitted_segments=words[23],
        rtt_s=words[15] / 1e6,
        pacing_bytes_per_s=later[0] if later[0] != (1 << 64) - 1 else 0,
        acked_bytes=later[2],
        notsent_bytes=later[6],
        min_rtt_s=min_rtt_us / 1e6,
        sent_segments=later[9],
        delivery_bytes_per_s=later[10],
        app_limited=bool(flags & _APP_LIMITED),
        busy_s=later[11] / 1e6,
        rwnd_limited_s=later[12] / 1e6,
        sndbuf_limited_s=later[13] / 1e6,
    )


def read(sock: socket.socket) -> TcpInfo | None:
    """A look at a TCP socket; a few microseconds. None where the system does not tell. Raises OSError for one that is
    closed."""
    if sys.platform != "linux":
        return None
    return parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MAX_BYTES))
