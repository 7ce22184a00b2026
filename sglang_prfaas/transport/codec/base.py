"""What a codec of one buffer is, and which dtypes of KVCache there are codecs for."""

from __future__ import annotations

from typing import Any, Protocol

from sglang_prfaas.transport.memory import Bytes

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""KVCache dtypes that codecs know. Others, FP8 above all, are sent as they are."""


class Codec(Protocol):
    """Encodes whole items of one buffer, each of `item_bytes` bytes. Any number of them encodes by itself."""

    item_bytes: int

    def least_bytes(self, items: int) -> int:
        """Fewest bytes that so many items take encoded."""

    def most_bytes(self, items: int) -> int:
        """Most bytes that so many items take encoded; fewer than they have."""

    def encode(self, raw: Any) -> Bytes | None:
        """`raw` `[items, item_bytes]` uint8, in numpy or as a torch tensor on any device. None where that would not
        save anything."""

    def decode(self, payload: Bytes, out: Bytes) -> None:
        """`payload` to `out` `[items, item_bytes]`. Raises ProtocolError where it is not what `encode` makes."""
