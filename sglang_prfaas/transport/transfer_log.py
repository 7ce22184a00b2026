"""One JSON line per finished transfer, appended to a file: what moved, how long each stage took, how it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import time

import msgspec
from msgspec import Struct


class TransferRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A finished transfer as one end saw it. Durations in seconds."""

    role: str
    """prefill or decode."""
    room: int
    status: str
    """done or failed."""
    unix_time_s: float
    site: str = ""
    server: str = ""
    rank: int = 0
    reason: str = ""
    peer: str = ""
    bytes: int = 0
    """As they lie in memory."""
    wire_bytes: int = 0
    """The same as they were sent: fewer where full-attention pages were encoded."""
    kv_bytes: int = 0
    """decode: of the bytes expected, those of full-attention pages."""
    codec: str = "raw"
    """How full-attention pages were encoded."""
    rail: str = "prfaas"
    """What moved it: prfaas, or the inner rail of its site."""
    pages: int = 0
    ahead_bytes: int = 0
    """prefill: handed to the mover layer by layer, while a chunk was computed."""
    cached_prefix_tokens: int = 0
    resent_chunks: int = 0
    """prefill: chunks sent more than once; decode: chunks that were there already."""
    corrupt_chunks: int = 0
    """Chunks that arrived with a wrong checksum, and were sent again."""
    handshake_s: float = 0.0
    """prefill: until decode was ready; decode: until the session was up."""
    queue_s: float = 0.0
    """prefill: from then until the first forward pass."""
    prefill_s: float = 0.0
    """prefill: from the first forward pass until the last chunk was handed over."""
    wait_s: float = 0.0
    """decode: from the reservation until the first byte; over an inner rail until the last."""
    transfer_s: float = 0.0
    """From the first byte to the last. decode, over an inner rail: 0, as it does not see the first."""
    exposed_s: float = 0.0
    """prefill: from the last chunk handed over until decode had every byte: the transfer prefill could not hide."""


def append(path: str, record: TransferRecord) -> None:
    """Append one line; lines of several processes do not mix. Raises OSError, also for a line that went in in part."""
    line = msgspec.json.encode(record) + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(descriptor)


def read(path: str) -> list[TransferRecord]:
    """All records of a file, none where it does not exist; without lines that a full disk cut short."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            with contextlib.suppress(msgspec.DecodeError):
                records.append(msgspec.json.decode(line, type=TransferRecord))
    return records


def unix_time_s() -> float:
    """Wall-clock time for records; nothing is measured with it."""
    return time.time()
