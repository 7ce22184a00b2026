"""Lossless: the first byte of all elements, then the second and so on, in one Zstandard frame (RFC 8878).

Neighbouring values of a KVCache differ little in magnitude, so that the byte with the exponent's upper bits repeats
itself; the bytes of the mantissa do not."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.codec.base import ELEMENT_BYTES
from sglang_prfaas.transport.memory import Bytes

LEVEL = 1
"""Of Zstandard; measured in docs/operations.md."""
LEAST_FRAME_BYTES = 9
"""Magic, header and one block."""


class Shuffled:
    """Bytes of equal weight put together, and compressed. Raises ImportError without `zstandard`."""

    def __init__(self, dtype: str, item_bytes: int, level: int = LEVEL) -> None:
        import zstandard  # noqa: F401  (whether it is there)

        self.item_bytes = item_bytes
        self._planes = ELEMENT_BYTES[dtype]
        self._level = level

    def least_bytes(self, items: int) -> int:
        return LEAST_FRAME_BYTES

    def most_bytes(self, items: int) -> int:
        return items * self.item_bytes - 1

    def encode(self, raw: Any) -> Bytes | None:
        import zstandard

        data: Bytes = raw if isinstance(raw, np.ndarray) else raw.cpu().numpy()
        planes = np.ascontiguousarray(data.reshape(-1, self._planes).T)
        frame = zstandard.ZstdCompressor(level=self._level).compress(planes.data)
        return np.frombuffer(frame, np.uint8) if len(frame) <= self.most_bytes(len(data)) else None

    def decode(self, payload: Bytes, out: Bytes) -> None:
        import zstandard

        try:
            # Looked at first: the frame says itself how much memory is taken for it.
            size = zstandard.frame_content_size(payload.data)
            if size != out.nbytes:
                raise ProtocolError(f"a compressed chunk says that it has {size} bytes, expected {out.nbytes}")
            planes = zstandard.ZstdDecompressor().decompress(payload.data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"a chunk cannot be decompressed: {error}") from None
        np.copyto(out.reshape(-1, self._planes), np.frombuffer(planes, np.uint8).reshape(self._planes, -1).T)
