"""What a rank serves, in the terms that both ends of a transfer must share, and how two of them differ.

A rank's memory is a list of components (full-attention pages, recurrent state, window pages, auxiliary data). A
component is a list of buffers, usually one per layer, which share their item indices: item i of a request lies at slot
`indices[i]` of every buffer. Slots and addresses are each side's own business and never cross the wire.
"""

from __future__ import annotations

from msgspec import Struct


class Sharding(Struct, frozen=True, forbid_unknown_fields=True):
    """How the items of some consecutive buffers are divided among the ranks of a server.

    An item is `rows` rows. A row holds the rank's part of every section, one after the other; section s has
    `sections[s]` units (heads, channels) of `unit_bytes` bytes in all ranks together. Without sections an item is the
    same on every rank.
    """

    buffers: int
    rows: int = 1
    sections: tuple[int, ...] = ()
    unit_bytes: int = 0


class Component(Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of cache. `item_bytes[b]` is the size of one item of buffer b in bytes."""

    name: str
    item_bytes: tuple[int, ...]
    shardings: tuple[Sharding, ...] = ()
    """Of all buffers in order; empty where it is not known, and then both ends must have the same width."""


class Layout(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that must be equal on both ends before a byte may move."""

    model: str
    """Architecture and a digest of the model's configuration."""
    kv_dtype: str
    page_tokens: int
    """Tokens of one full-attention page."""
    tp_size: int
    """Attention tensor-parallel width."""
    kv_format: str
    """Byte layout of full-attention pages, where a pool has more than one; else empty."""
    layer_ids: tuple[int, ...]
    """Layers of the full-attention buffers, in order."""
    components: tuple[Component, ...]
    tp_rank: int = 0
    """Which of the `tp_size` ranks it is of."""

    def request_bytes(self, counts: tuple[int, ...]) -> int:
        """Bytes of a request with `counts[c]` items of component c."""
        return sum(sum(c.item_bytes) * n for c, n in zip(self.components, counts, strict=True))


def differences(prefill: Layout, decode: Layout) -> list[str]:
    """Why two ranks of servers of one width cannot exchange KVCache: one message per difference, with both values.
    Empty when they can."""
    found: list[str] = []

    def compare(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            found.append(f"{what}: prefill has {_short(ours)}, decode has {_short(theirs)}")

    compare("model", prefill.model, decode.model)
    compare("KVCache dtype", prefill.kv_dtype, decode.kv_dtype)
    compare("page size in tokens", prefill.page_tokens, decode.page_tokens)
    compare("attention TP width", prefill.tp_size, decode.tp_size)
    compare("attention TP rank", prefill.tp_rank, decode.tp_rank)
    compare("KVCache byte layout", prefill.kv_format or "default", decode.kv_format or "default")
    compare("full-attention layers", list(prefill.layer_ids), list(decode.layer_ids))
    compare("components", [c.name for c in prefill.components], [c.name for c in decode.components])
    if [c.name for c in prefill.components] == [c.name for c in decode.components]:
        for ours, theirs in zip(prefill.components, decode.components, strict=True):
            compare(f"buffers of {ours.name}", len(ours.item_bytes), len(theirs.item_bytes))
            if len(ours.item_bytes) == len(theirs.item_bytes) and ours.item_bytes != theirs.item_bytes:
                first = next(
                    i for i, (a, b) in enumerate(zip(ours.item_bytes, theirs.item_bytes, strict=True)) if a != b
                )
                compare(
                    f"bytes per item of {ours.name} buffer {first}", ours.item_bytes[first], theirs.item_bytes[first]
                )
    return found


def _short(value: object, limit: int = 600) -> str:
    """The value for a message, cut where a peer's is excessively long."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
