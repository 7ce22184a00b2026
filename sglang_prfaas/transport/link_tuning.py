"""`[transport]` as it holds for one link: with what its `[[links]]` entry says, and what capacity and round trip need.

A window smaller than the bandwidth-delay product leaves a link idle (RFC 7323, section 1.1). Each connection needs its
share of that product, and twice it, as the window falls after a loss. Linux grows buffers by itself up to the third
number of net.ipv4.tcp_rmem and tcp_wmem, of which half is payload; a buffer that was set by hand grows no more, and is
cut to net.core.rmem_max or wmem_max. So buffers are set only where that gives more, and connections added where neither
is enough.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.core.units import bytes_per_s_to_gbps, gbps_to_bytes_per_s
from sglang_prfaas.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
WINDOWS = 2.0
"""Bandwidth-delay products that the buffers of a link should hold together."""
PAYLOAD_SHARE = 0.5
"""Of an autotuned buffer (net.ipv4.tcp_adv_win_scale = 1)."""

_PROC = Path("/proc/sys/net")


class KernelBuffers(Struct, frozen=True):
    """Payload bytes that one connection's buffer of one direction may hold, 0 where the system does not tell."""

    grown_bytes: int = 0
    """By itself."""
    set_bytes: int = 0
    """Where it is set."""

    @property
    def most_bytes(self) -> int:
        return max(self.grown_bytes, self.set_bytes)


def kernel_buffers(direction: Literal["send", "receive"], proc: Path = _PROC) -> KernelBuffers:
    """Of this machine."""
    letter = direction[0].replace("s", "w")
    try:
        grown = int((proc / f"ipv4/tcp_{letter}mem").read_text().split()[2])
        largest = int((proc / f"core/{letter}mem_max").read_text())
    except (OSError, ValueError, IndexError):
        return KernelBuffers()
    return KernelBuffers(int(PAYLOAD_SHARE * grown), largest)


def for_link(config: TransportConfig, link: LinkConfig | None, kernel: KernelBuffers) -> TransportConfig:
    """`config` with what holds for `link`, at the end whose buffers `kernel` are."""
    if link is None:
        return config
    product = WINDOWS * gbps_to_bytes_per_s(link.capacity_gbps) * link.rtt_ms / 1e3
    connections = link.connections or config.connections
    if not link.connections and kernel.most_bytes:
        connections = min(MAX_CONNECTIONS, max(connections, math.ceil(product / kernel.most_bytes)))
    buffer_bytes = link.socket_buffer_bytes or config.socket_buffer_bytes
    if not buffer_bytes and kernel.set_bytes > kernel.grown_bytes < product / connections:
        buffer_bytes = min(kernel.set_bytes, math.ceil(product / connections))
    return msgspec.structs.replace(
        config,
        connections=connections,
        socket_buffer_bytes=buffer_bytes,
        congestion_control=link.congestion_control or config.congestion_control,
        pacing_mbps=link.pacing_mbps or config.pacing_mbps,
    )


def shortfall(tuned: TransportConfig, link: LinkConfig | None, kernel: KernelBuffers) -> str:
    """What keeps the connections of a link, tuned like this, from filling it; an empty string where nothing does."""
    if link is None or not link.rtt_ms or not kernel.most_bytes:
        return ""
    buffer_bytes = min(tuned.socket_buffer_bytes, kernel.set_bytes) or kernel.grown_bytes
    reach = bytes_per_s_to_gbps(tuned.connections * buffer_bytes / (link.rtt_ms / 1e3))
    if reach >= link.capacity_gbps:
        return ""
    return (
        f"{tuned.connections} connections with buffers of {buffer_bytes} bytes carry at most {reach:.3g} of "
        f"{link.capacity_gbps:g} Gbit/s over {link.rtt_ms:g} ms; raise net.core.rmem_max and wmem_max, the third "
        "numbers of net.ipv4.tcp_rmem and tcp_wmem, or connections"
    )


def check_congestion_control(name: str, key: str) -> None:
    """Raises ConfigError, with the key, for one that this machine's kernel does not have, or does not let us use."""
    if not name:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        set_congestion_control(sock, name, key)


def check_links(links: Mapping[str, LinkConfig], config: TransportConfig, kernel: KernelBuffers) -> None:
    """What can be known of links before they are used. Logs what keeps one from being filled. Raises ConfigError."""
    check_congestion_control(config.congestion_control, "transport.congestion_control")
    for site, link in links.items():
        check_congestion_control(link.congestion_control, f"links.{site}.congestion_control")
        why = shortfall(for_link(config, link, kernel), link, kernel)
        if why:
            logger.warning("prfaas: link to %s: %s", site, why)


class LinkTuning:
    """`[transport]` as it holds for each of the links of one end, whose buffers `kernel` are. `links`: by the site they
    lead to. Raises ConfigError as `check_links` does."""

    def __init__(self, config: TransportConfig, links: Mapping[str, LinkConfig], kernel: KernelBuffers) -> None:
        check_links(links, config, kernel)
        self._config = config
        self._links = links
        self._kernel = kernel

    def for_site(self, site: str) -> TransportConfig:
        """Of the link to a site."""
        return for_link(self._config, self._links.get(site), self._kernel)

    def for_agreed(self, site: str, connections: int) -> TransportConfig:
        """The same, where both ends have agreed on so many connections."""
        link = self._links.get(site)
        fixed = msgspec.structs.replace(link, connections=connections) if link is not None else None
        return msgspec.structs.replace(for_link(self._config, fixed, self._kernel), connections=connections)

    def for_asked(self, site: str, connections: int) -> TransportConfig:
        """The same, where the other end asks for so many connections. As many there are, or more if this end needs
        them, but where the link's entry names a number."""
        link = self._links.get(site)
        tuned = self.for_site(site)
        if link is not None and link.connections:
            return tuned
        needed = tuned.connections if tuned.connections > self._config.connections else 1
        return msgspec.structs.replace(tuned, connections=max(connections, needed))


def set_congestion_control(sock: socket.socket, name: str, key: str = "transport.congestion_control") -> None:
    """On a TCP socket. Raises ConfigError as above."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except PermissionError:
        raise ConfigError(
            f"{key}: the kernel does not let this user choose {name!r}; add it to "
            "net.ipv4.tcp_allowed_congestion_control"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{key}: the kernel has no {name!r} ({error.strerror}); load its module (modprobe tcp_{name}), or name one "
            "of /proc/sys/net/ipv4/tcp_available_congestion_control"
        ) from None
