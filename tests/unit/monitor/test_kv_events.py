"""KV-event messages, as SGLang 0.5.23 encodes them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor import kv_events
from sglang_prfaas.monitor.kv_events import KvEventReader
from sglang_prfaas.prefix_cache.changes import Change, Cleared
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier

# Encoded by SGLang: two blocks on the GPU (with a salt), one of token pairs in host memory, two removed from disk, all
# cleared; DP rank 1.
RECORDED = bytes.fromhex(
    "93cb40290000000000009488a474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739201feb1706172656e745f626c6f63"
    "6b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055aa6361"
    "6368655f73616c74a17387a474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739103b1706172656e745f626c6f636b5f"
    "68617368fea9746f6b656e5f69647392920102920203aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756daa4350555f5049"
    "4e4e454483a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657392fe07a66d656469756da44449534b81a474797065"
    "b0416c6c426c6f636b73436c656172656401"
)


def plain(changes: tuple[Change, ...]) -> list[tuple[Any, ...]]:
    return [
        ("Cleared",)
        if isinstance(change, Cleared)
        else (type(change).__name__, change.hashes.view(np.int64).tolist(), change.tier, change.part)
        for change in changes
    ]


def read(*payloads: bytes, infer_states: bool = False) -> list[tuple[Any, ...]]:
    reader = KvEventReader(2, infer_states=infer_states)
    for payload in payloads:
        reader.feed(payload)
    return plain(reader.take())


def message(*events: dict[str, Any], rank: int | None = None) -> bytes:
    return msgspec.msgpack.encode([1.5, events, rank])


def stored(*hashes: int, medium: str | None = "GPU", block_size: int = 2, **more: Any) -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": hashes, "block_size": block_size, "medium": medium, **more}


def removed(*hashes: int, medium: str | None = "GPU") -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium}


def test_as_sglang_writes_it() -> None:
    events = msgspec.msgpack.decode(RECORDED)[1]
    assert [event["type"] for event in events] == ["BlockStored", "BlockStored", "BlockRemoved", "AllBlocksCleared"]
    assert read(message(*events[:3])) == [
        ("Stored", [1, -2], Tier.DEVICE, Part.KV),
        ("Stored", [3], Tier.HOST, Part.KV),
        ("Removed", [-2, 7], Tier.DISK, Part.KV),
    ]
    assert read(RECORDED) == [("Cleared",)], "what was there before is void"


def test_neighbours_of_one_kind_are_joined_and_order_is_kept() -> None:
    payload = message(
        stored(1), stored(2, 3), removed(1), stored(1), stored(4, medium="CPU_PINNED"), stored(5, medium="GPU")
    )
    assert read(payload) == [
        ("Stored", [1, 2, 3], Tier.DEVICE, Part.KV),
        ("Removed", [1], Tier.DEVICE, Part.KV),
        ("Stored", [1, 5], Tier.DEVICE, Part.KV),
        ("Stored", [4], Tier.HOST, Part.KV),
    ]


def test_messages_are_joined_as_one() -> None:
    assert read(message(stored(1)), message(stored(2)), message(removed(1)), infer_states=True) == [
        ("Stored", [1, 2], Tier.DEVICE, Part.KV),
        ("Stored", [1, 2], Tier.DEVICE, Part.STATE),
        ("Removed", [1], Tier.DEVICE, Part.KV),
    ]


def test_a_refused_message_leaves_the_others() -> None:
    reader = KvEventReader(2)
    reader.feed(message(stored(1)))
    with pytest.raises(ProtocolError, match="none of SGLang's"):
        reader.feed(message(stored(2), removed(2**63)))
    reader.feed(message(stored(3)))
    assert plain(reader.take()) == [("Stored", [1, 3], Tier.DEVICE, Part.KV)]
    assert reader.take() == ()


def test_the_size_of_blocks_is_learnt() -> None:
    reader = KvEventReader()
    reader.feed(message(removed(1)))
    assert reader.block_tokens == 0
    reader.feed(message(stored(1, block_size=1), stored(2, block_size=64)))
    assert (reader.block_tokens, reader.skipped) == (64, 1)


def test_states_inferred_at_the_end_of_each_run() -> None:
    assert read(message(stored(1, 2), stored(3, 4, 5), removed(2)), infer_states=True) == [
        ("Stored", [1, 2, 3, 4, 5], Tier.DEVICE, Part.KV),
        ("Stored", [2, 5], Tier.DEVICE, Part.STATE),
        ("Removed", [2], Tier.DEVICE, Part.KV),
    ]


def test_states_reported_by_a_plugin() -> None:
    events = [
        {"type": "StateStored", "block_hashes": [8], "medium": "CPU_PINNED"},
        {"type": "StateRemoved", "block_hashes": [8]},
    ]
    assert read(message(*events)) == [
        ("Stored", [8], Tier.HOST, Part.STATE),
        ("Removed", [8], Tier.DEVICE, Part.STATE),
    ]


def test_what_is_of_no_use_is_skipped_and_counted() -> None:
    payload = message(stored(1, block_size=64), stored(2, medium="TAPE"), stored(), {"type": "New", "x": 1}, removed(3))
    reader = KvEventReader(2)
    reader.feed(payload)
    assert plain(reader.take()) == [("Removed", [3], Tier.DEVICE, Part.KV)]
    assert reader.skipped == 4


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode([1.0, [{"block_hashes": [1]}]]),
        message(stored(1) | {"block_hashes": "no list"}),
        message(removed(2**63)),
    ],
)
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="none of SGLang's"):
        KvEventReader(2).feed(payload)


def test_large_messages_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(ProtocolError, match="at most 10 are accepted"):
        KvEventReader(2).feed(RECORDED)


@settings(deadline=None)
@given(st.binary(max_size=80), st.integers(0, len(RECORDED)))
def test_no_bytes_raise_anything_else(noise: bytes, cut: int) -> None:
    for payload in (noise, RECORDED[:cut] + noise, RECORDED[:cut] + noise + RECORDED[cut + len(noise) :]):
        first, again = KvEventReader(2), KvEventReader(2)
        try:
            first.feed(payload)
        except ProtocolError:
            assert first.take() == ()
            continue
        again.feed(payload)
        assert plain(again.take()) == plain(first.take())
