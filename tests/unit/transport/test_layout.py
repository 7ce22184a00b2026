"""What must be equal on both ends."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sglang_prfaas.transport.handshake import MAX_CONNECTIONS, MAX_SESSIONS, refusal
from sglang_prfaas.transport.layout import Component, Layout, differences
from sglang_prfaas.transport.messages import PROTOCOL_VERSION, Hello

LAYOUT = Layout(
    model="Kimi-0123",
    kv_dtype="float16",
    page_tokens=64,
    tp_size=2,
    kv_format="page_first",
    layer_ids=(3, 7),
    components=(Component("kv", (100, 200)), Component("mamba", (4096,)), Component("aux", (8,))),
)


def test_equal_layouts_do_not_differ() -> None:
    assert differences(LAYOUT, msgspec.structs.replace(LAYOUT)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Kimi-4567"}, "model: prefill has Kimi-0123, decode has Kimi-4567"),
        ({"kv_dtype": "fp8_e4m3"}, "KVCache dtype: prefill has float16, decode has fp8_e4m3"),
        ({"page_tokens": 16}, "page size in tokens: prefill has 64, decode has 16"),
        ({"tp_size": 4}, "attention TP width: prefill has 2, decode has 4"),
        ({"tp_rank": 1}, "attention TP rank: prefill has 0, decode has 1"),
        ({"kv_format": ""}, "KVCache byte layout: prefill has page_first, decode has default"),
        ({"layer_ids": (3,)}, "full-attention layers: prefill has [3, 7], decode has [3]"),
        (
            {"components": LAYOUT.components[:2]},
            "components: prefill has ['kv', 'mamba', 'aux'], decode has ['kv', 'mamba']",
        ),
        (
            {"components": (Component("kv", (100,)), *LAYOUT.components[1:])},
            "buffers of kv: prefill has 2, decode has 1",
        ),
        (
            {"components": (Component("kv", (100, 201)), *LAYOUT.components[1:])},
            "bytes per item of kv buffer 1: prefill has 200, decode has 201",
        ),
    ],
)
def test_each_difference_holds_both_values(change: dict[str, Any], message: str) -> None:
    assert differences(LAYOUT, msgspec.structs.replace(LAYOUT, **change)) == [message]


def test_every_field_is_compared() -> None:
    changed = {"model", "kv_dtype", "page_tokens", "tp_size", "kv_format", "layer_ids", "components", "tp_rank"}
    assert {field.name for field in msgspec.structs.fields(Layout)} == changed


def test_all_differences_are_told_at_once() -> None:
    other = msgspec.structs.replace(LAYOUT, model="x", page_tokens=1, tp_size=9)
    assert len(differences(LAYOUT, other)) == 3


def test_an_excessive_value_of_a_peer_is_cut() -> None:
    (message,) = differences(LAYOUT, msgspec.structs.replace(LAYOUT, layer_ids=tuple(range(100_000))))
    assert len(message) < 1000
    assert "characters)" in message


def test_request_bytes() -> None:
    assert LAYOUT.request_bytes((5, 2, 1)) == 5 * 300 + 2 * 4096 + 8
    with pytest.raises(ValueError, match="shorter"):
        LAYOUT.request_bytes((5,))


def hello(**changes: Any) -> Hello:
    given = Hello(PROTOCOL_VERSION, "pd", "decode-0", LAYOUT, 4, 1 << 20, b"i" * 16, 0)
    return msgspec.structs.replace(given, **changes)


def test_who_is_refused() -> None:
    assert refusal(LAYOUT, hello(), sessions=0, connections=0) == ""
    other = refusal(LAYOUT, hello(version=99), sessions=0, connections=0)
    assert other == f"protocol version mismatch: prefill has {PROTOCOL_VERSION}, decode has 99"
    pages = msgspec.structs.replace(LAYOUT, page_tokens=16)
    assert refusal(LAYOUT, hello(page_tokens=16), sessions=0, connections=0) == (
        "page size in tokens: prefill has 64, decode knows it as 16 from its directory"
    )
    assert "page size in tokens: prefill has 64, decode has 16" in refusal(
        LAYOUT, hello(layout=pages), sessions=0, connections=0
    )
    mismatch = refusal(LAYOUT, hello(layout=msgspec.structs.replace(LAYOUT, tp_size=8)), sessions=0, connections=0)
    assert mismatch.startswith("layout mismatch: attention TP width: prefill has 2, decode has 8; how kv is divided")
    assert refusal(LAYOUT, hello(), sessions=MAX_SESSIONS, connections=0).startswith("limit reached")
    assert refusal(LAYOUT, hello(), sessions=1, connections=MAX_CONNECTIONS - 4) == ""
    assert refusal(LAYOUT, hello(), sessions=1, connections=MAX_CONNECTIONS - 3).startswith("limit reached: 4 more")
