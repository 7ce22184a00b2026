"""Which codec a session uses, and the codecs of its buffers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection, Mapping
from typing import NamedTuple

from msgspec import Struct

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.codec.base import ELEMENT_BYTES, Codec
from sglang_prfaas.transport.codec.quantised import Quantised, group_width
from sglang_prfaas.transport.codec.shuffled import Shuffled
from sglang_prfaas.transport.framing import ChunkHeader
from sglang_prfaas.transport.layout import Layout

logger = logging.getLogger(__name__)

RAW = "raw"
LOSSLESS = ("shuffle",)
LOSSY = ("fp8", "int8")
KV = 0
"""The component that codecs are for: full attention. Recurrent state is sent as it is."""

_NEEDS = {"fp8": ("torch", "prfaas_kernels"), "int8": ("torch", "prfaas_kernels"), "shuffle": ("zstandard",)}


class CodecChoice(Struct, frozen=True):
    """Which codec a prefill rank prefers: `by_site` for decode ranks of a site, else `default`."""

    default: str = RAW
    by_site: Mapping[str, str] = {}

    def of(self, site: str) -> str:
        return self.by_site.get(site, self.default)


def missing(codec: str) -> str:
    """The module without which a codec cannot be used here; empty where none is missing."""
    return next((name for name in _NEEDS.get(codec, ()) if importlib.util.find_spec(name) is None), "")


def offered(accept: str) -> tuple[str, ...]:
    """The codecs that a decode rank can decode and takes. accept: all, lossless or none."""
    names = {"all": (*LOSSLESS, *LOSSY), "lossless": LOSSLESS}.get(accept, ())
    return tuple(name for name in names if not missing(name))


def obstacle(codec: str, layout: Layout, offers: Collection[str], chunk_bytes: int) -> str:
    """Why a session cannot use a codec, and sends the bytes as they are; empty where it can. chunk_bytes: the session's
    longest chunk."""
    if module := missing(codec):
        return f"Python's module {module} is not installed here"
    if codec not in offers:
        return f"decode takes {', '.join(sorted(offers)) or 'none'}"
    element_bytes = ELEMENT_BYTES.get(layout.kv_dtype)
    if element_bytes is None:
        return f"the KVCache's dtype is {layout.kv_dtype}, codecs are for {', '.join(ELEMENT_BYTES)}"
    if layout.kv_format:
        return f"the KVCache's byte layout is {layout.kv_format}, codecs are for the default one"
    for size in set(layout.components[KV].item_bytes):
        if size > chunk_bytes:
            return f"a page has {size} bytes, a chunk at most {chunk_bytes}; codecs need whole pages in a chunk"
        if size % element_bytes or (size and codec in LOSSY and not group_width(size // element_bytes)):
            return f"the elements of {size} bytes cannot be put into groups"
    return ""


class Place(NamedTuple):
    """Where an encoded chunk belongs, in bytes of its stream, and what decodes it."""

    header: ChunkHeader
    codec: Codec | None = None


class SessionCodec:
    """The codecs of a session's buffers; none for `raw`. Only for a codec without `obstacle`."""

    def __init__(self, name: str = RAW, layout: Layout | None = None) -> None:
        self.name = name
        self._codecs: list[Codec | None] = []
        if name != RAW and layout is not None:
            self._codecs = [_codec(name, layout.kv_dtype, size) for size in layout.components[KV].item_bytes]

    def of(self, component: int, buffer: int) -> Codec | None:
        """The codec of a buffer, None where its bytes are sent as they are."""
        return self._codecs[buffer] if component == KV and buffer < len(self._codecs) else None

    def place(self, header: ChunkHeader, chunk_bytes: int) -> Place:
        """Where a chunk that comes belongs. Raises ProtocolError for an encoded one that cannot be, before any memory
        is taken for it; what it decodes to has at most `chunk_bytes`."""
        if not header.items:
            return Place(header)
        codec = self.of(header.component, header.buffer)
        if codec is None:
            raise ProtocolError(
                f"encoded chunk for component {header.component}, buffer {header.buffer}, which has no codec in this "
                f"session ({self.name})"
            )
        items, size = header.items, codec.item_bytes
        if items * size > chunk_bytes:
            raise ProtocolError(f"encoded chunk of {items} items of {size} bytes, at most {chunk_bytes} are allowed")
        if not codec.least_bytes(items) <= header.length <= codec.most_bytes(items):
            raise ProtocolError(
                f"encoded chunk of {header.length} bytes, expected {codec.least_bytes(items)} to "
                f"{codec.most_bytes(items)} for {items} items of {size} bytes ({self.name})"
            )
        raw = ChunkHeader(header.transfer_id, header.component, header.buffer, header.offset * size, items * size)
        return Place(raw, codec)


def _codec(name: str, dtype: str, item_bytes: int) -> Codec | None:
    if not item_bytes:
        return None
    return Shuffled(dtype, item_bytes) if name in LOSSLESS else Quantised(name, dtype, item_bytes)
