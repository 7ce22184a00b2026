"""Control messages that survive the connection they travel on: numbered, acknowledged, sent again (go back N).

    envelope   u64 number  u64 acknowledged  u64 check  message

Big-endian. Numbers count a session's messages of one direction from 1; 0 is for what needs no delivery: `Hello`,
`Ping`, and what is said without a session. `acknowledged`: all of the peer's numbers up to it have come. The check is
xxh3-64 of everything but itself.
"""

from __future__ import annotations

import struct
from collections import deque

import xxhash

from sglang_prfaas.errors import ChecksumError, LocalError, ProtocolError

ENVELOPE = struct.Struct(">QQQ")
MAX_UNACKNOWLEDGED = 16384
"""Messages kept for a peer that does not acknowledge; a decode rank may have 4096 requests open, of four messages."""
RESEND_S = 1.0


def seal(body: bytes, number: int = 0, acknowledged: int = 0) -> bytes:
    """A message in its envelope."""
    return ENVELOPE.pack(number, acknowledged, _check(number, acknowledged, body)) + body


def unseal(data: bytes) -> tuple[int, int, bytes]:
    """Number, acknowledged, and message. Raises ProtocolError for what is too short, ChecksumError for what is
    corrupt."""
    if len(data) < ENVELOPE.size:
        raise ProtocolError(f"control message refused: {len(data)} bytes, its envelope alone has {ENVELOPE.size}")
    number, acknowledged, check = ENVELOPE.unpack_from(data)
    body = data[ENVELOPE.size :]
    if check != _check(number, acknowledged, body):
        raise ChecksumError(f"control message of {len(data)} bytes refused: its check is wrong")
    return number, acknowledged, body


def _check(number: int, acknowledged: int, body: bytes) -> int:
    result: int = xxhash.xxh3_64_intdigest(number.to_bytes(8, "big") + acknowledged.to_bytes(8, "big") + body)
    return result


class Mailbox:
    """Both directions of one session at one end. Not thread-safe."""

    def __init__(self, now_s: float) -> None:
        self._posted = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._received = 0
        self._owing = False
        self._moved_s = now_s

    def post(self, body: bytes, now_s: float) -> bytes:
        """The next message, kept until it is acknowledged. Raises LocalError where too many are."""
        if len(self._kept) >= MAX_UNACKNOWLEDGED:
            raise LocalError(f"{MAX_UNACKNOWLEDGED} control messages were not acknowledged")
        if not self._kept:
            self._moved_s = now_s
        self._posted += 1
        self._kept.append((self._posted, body))
        self._owing = False
        return seal(body, self._posted, self._received)

    def unnumbered(self, body: bytes) -> bytes:
        """A message that may be lost. It acknowledges like any other."""
        self._owing = False
        return seal(body, 0, self._received)

    def accept(self, number: int, acknowledged: int, now_s: float) -> bool:
        """A message came. Returns whether it is to be acted on: not one that came before, nor one after a gap.
        Raises ProtocolError for an acknowledgement of what was never sent."""
        if acknowledged > self._posted:
            raise ProtocolError(f"control message {acknowledged} acknowledged, {self._posted} were sent")
        while self._kept and self._kept[0][0] <= acknowledged:
            self._kept.popleft()
            self._moved_s = now_s
        if number == 0:
            return True
        self._owing = True
        if number != self._received + 1:
            return False
        self._received = number
        return True

    @property
    def owing(self) -> bool:
        """Whether the peer waits for an acknowledgement."""
        return self._owing

    def resend(self, now_s: float, *, at_once: bool = False) -> list[bytes]:
        """What is to be sent again: all that is kept, once nothing was acknowledged for RESEND_S, or `at_once` on a new
        connection."""
        if not self._kept or (not at_once and now_s - self._moved_s < RESEND_S):
            return []
        self._moved_s = now_s
        self._owing = False
        return [seal(body, number, self._received) for number, body in self._kept]
