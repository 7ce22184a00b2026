"""The bootstrap directory of a prefill server: its ranks register, decode ranks look them up. ZeroMQ, no HTTP.

Registration is accepted from this host only, unless the server spans several nodes, and with keys from ranks of the own
site only; lookups from anywhere, with keys from every site of peers.toml.
"""

from __future__ import annotations

import ipaddress
import logging

import msgspec
import zmq

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, ProtocolError
from sglang_prfaas.transport.addresses import endpoint, resolve
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.messages import (
    Deregister,
    Directory,
    Lookup,
    RankInfo,
    Register,
    Registered,
    decode_to_directory,
    encode,
)
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.refusals import RefusalLog

logger = logging.getLogger(__name__)


class RankTable:
    """Who has registered, as a plain value: the state behind the directory."""

    def __init__(self) -> None:
        self._ranks: dict[tuple[int, int, int], tuple[str, RankInfo]] = {}
        self._last: Register | None = None

    def register(self, message: Register) -> None:
        """Add a rank, or replace what an earlier process left in its place; other sizes drop every rank of the old
        ones. Raises ProtocolError for a rank beyond its own sizes."""
        beyond = [
            f"{name} rank {rank} of {size}"
            for name, rank, size in zip(("DP", "TP", "PP"), _key(message.rank), _sizes(message), strict=True)
            if rank >= size
        ]
        if beyond:
            raise ProtocolError(f"a rank beyond its size registers: {', '.join(beyond)}")
        if self._last is not None and _sizes(self._last) != _sizes(message):
            self._ranks.clear()
        self._last = message
        self._ranks[_key(message.rank)] = (message.boot_id, message.rank)

    def deregister(self, message: Deregister) -> None:
        """Remove a rank, unless a newer process has taken its place."""
        held = self._ranks.get(_key(message.rank))
        if held is not None and held[0] == message.boot_id:
            del self._ranks[_key(message.rank)]

    def directory(self, *, with_rails: bool = True) -> Directory:
        """The answer to a lookup. with_rails: whether the asking rank may know of inner rails."""
        if self._last is None or not self._ranks:
            return Directory(False, 0, 0, 0, True, ())
        dp, tp, pp = _sizes(self._last)
        ranks = tuple(rank for _, rank in self._ranks.values())
        if not with_rails:
            ranks = tuple(msgspec.structs.replace(rank, rail=None) for rank in ranks)
        follow, page_tokens = self._last.follow_bootstrap_room, self._last.page_tokens
        return Directory(len(ranks) == dp * tp * pp, dp, tp, pp, follow, ranks, page_tokens)


def _key(rank: RankInfo) -> tuple[int, int, int]:
    return rank.dp_rank, rank.tp_rank, rank.pp_rank


def _sizes(message: Register) -> tuple[int, int, int]:
    return message.dp_size, message.tp_size, message.pp_size


class DirectoryServer:
    """Serves a `RankTable` at `host:port`. Raises LocalError where the port is taken, ConfigError where others could
    reach it without keys, or keys do not fit."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        remote_ranks: bool = False,
        clock: Clock | None = None,
        config: TransportConfig | None = None,
    ) -> None:
        config = config or TransportConfig()
        clock = clock or MonotonicClock()
        self.table = RankTable()
        host = resolve(host)
        self._host = host
        self._remote_ranks = remote_ranks
        self._security = load_security(config)
        self._security.may_listen("the bootstrap directory", host, config)
        self._refusals = RefusalLog(logger, clock)
        self._loop = ZmqLoop("prfaas-directory", clock, self._security, config.control_messages_per_s)
        self._socket = self._loop.socket(zmq.ROUTER, host)
        try:
            self._socket.bind(endpoint(host, port))
        except zmq.ZMQError as error:
            self._loop.stop()
            raise LocalError(
                f"bootstrap port {port} on {host} cannot be used: {error}. Give every prefill server on a host its own "
                "--disaggregation-bootstrap-port."
            ) from None
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        """The port bound: `port`, or the one that was free for 0."""
        self._loop.add(self._socket, self._receive)
        self._loop.start()

    def close(self) -> None:
        self._loop.stop()

    def _receive(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            return
        peer, body = frames
        try:
            message = decode_to_directory(body.bytes)
        except ProtocolError as error:
            self._refusals.warn(f"directory: {error}")
            return
        if isinstance(message, Lookup):
            own = self._security.keys is None or str(body.get("User-Id")) == self._security.site
            self._socket.send_multipart([peer.bytes, encode(self.table.directory(with_rails=own))], zmq.NOBLOCK)
            return
        refusal = self._refusal(body)
        if refusal:
            self._refusals.warn(f"directory: {type(message).__name__} from {refusal} refused")
            return
        try:
            if isinstance(message, Register):
                self.table.register(message)
            else:
                self.table.deregister(message)
        except ProtocolError as error:
            self._refusals.warn(f"directory: {error}")
            return
        self._socket.send_multipart([peer.bytes, encode(Registered())], zmq.NOBLOCK)

    def _refusal(self, frame: zmq.Frame) -> str:
        """Where a message came from, if that is not somebody who may change the table; else an empty string."""
        address = str(frame.get("Peer-Address") or "")
        if not self._remote_ranks and not is_local(address, self._host):
            return f"{address}, not this host,"
        if self._security.keys is not None and (site := str(frame.get("User-Id"))) != self._security.site:
            return f"{address}, of site {site},"
        return ""


def is_local(address: str, host: str) -> bool:
    """Whether a peer at `address` is on the machine of a directory bound to `host`."""
    if not address:
        return False
    if address == host:
        return True
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
