"""What a prefill rank has sent to one site since it started, and what went wrong on the way."""

from __future__ import annotations

from msgspec import Struct


class CodecCounts(Struct, kw_only=True):
    """Of the sessions with one encoding of full-attention KVCache; `raw` is none."""

    sessions: int = 0
    """That stand now."""
    bytes: int = 0
    """Payload as it lies in memory."""
    wire_bytes: int = 0
    """The same as it was sent."""


class LinkCounts(Struct, kw_only=True):
    """Counters only grow. A request counts once it has ended and is forgotten."""

    done: int = 0
    failed: int = 0
    resent_chunks: int = 0
    """Sent again, as they arrived corrupt or their connection was lost."""
    corrupt_chunks: int = 0
    reconnects: int = 0
    """Data connections made again after the first time."""
    sessions_ended: int = 0
    codecs: dict[str, CodecCounts] = {}

    def codec(self, name: str) -> CodecCounts:
        """Those of an encoding."""
        return self.codecs.setdefault(name, CodecCounts())
