"""Control messages."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport import messages
from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.messages import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES, encode

DECODERS = [
    messages.decode_to_prefill,
    messages.decode_to_decode,
    messages.decode_to_directory,
    messages.decode_from_directory,
]

LAYOUT = Layout("m", "float16", 16, 1, "", (0, 1), (Component("kv", (100, 200)), Component("aux", (8,))))
RANK = messages.RankInfo(0, 1, 0, "10.0.0.1", 7000)

INSTANCE = b"i" * 16

rooms = st.integers(0, (1 << 63) - 1)
tokens = st.binary(min_size=16, max_size=16)
short = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=256)
long = st.text(max_size=300)
counts = st.lists(st.integers(0, (1 << 31) - 1), max_size=64).map(tuple)
rails = st.builds(
    messages.InnerRail, st.sampled_from(("mooncake", "nixl")), short, host=short, port=st.integers(1, 65535)
)
ranks = st.builds(
    messages.RankInfo,
    *[st.integers(0, 65535)] * 3,
    host=short,
    control_port=st.integers(1, 65535),
    rail=st.none() | rails,
)
sizes = st.integers(1, 65536)
layouts = st.builds(
    Layout,
    model=short,
    kv_dtype=short,
    page_tokens=st.integers(0, 1 << 31),
    tp_size=st.integers(0, 1 << 31),
    kv_format=short,
    layer_ids=st.lists(st.integers(0, 1000), max_size=5).map(tuple),
    components=st.lists(
        st.builds(Component, short, st.lists(st.integers(0, 1 << 40), max_size=5).map(tuple)), max_size=4
    ).map(tuple),
)

ROUND_TRIPS: list[tuple[Any, Any]] = [
    (
        messages.decode_to_prefill,
        st.one_of(
            st.builds(
                messages.Hello,
                version=st.integers(0, 1 << 20),
                site=short,
                server=short,
                layout=layouts,
                connections=st.integers(1, 64),
                chunk_bytes=st.integers(4096, 64 << 20),
                instance=st.binary(min_size=16, max_size=16),
                rank=st.integers(0, 65535),
            ),
            st.builds(messages.Expect, st.integers(1, (1 << 63) - 1), rooms, counts, st.integers(0, (1 << 31) - 1)),
            st.builds(messages.Done, rooms, rooms),
            st.builds(messages.Abort, rooms, long),
            st.builds(messages.Bye, long),
            st.just(messages.Ping()),
        ),
    ),
    (
        messages.decode_to_decode,
        st.one_of(
            st.builds(messages.Welcome, tokens, st.integers(1, 65535), tokens),
            st.builds(messages.Refuse, long),
            st.builds(messages.Failed, rooms, rooms, long),
            st.builds(messages.Unknown, tokens),
            st.builds(messages.Redial, st.integers(0, 63)),
            st.just(messages.Pong()),
        ),
    ),
    (
        messages.decode_to_directory,
        st.one_of(
            st.builds(messages.Register, ranks, short, sizes, sizes, sizes, st.booleans()),
            st.builds(messages.Deregister, ranks, short),
            st.just(messages.Lookup()),
        ),
    ),
    (
        messages.decode_from_directory,
        st.one_of(
            st.just(messages.Registered()),
            st.builds(
                messages.Directory,
                st.booleans(),
                st.integers(0, 65536),
                st.integers(0, 65536),
                st.integers(0, 65536),
                st.booleans(),
                st.lists(ranks, max_size=5).map(tuple),
            ),
        ),
    ),
]


@pytest.mark.parametrize(("decode", "strategy"), ROUND_TRIPS, ids=["prefill", "decode", "directory", "rank"])
def test_round_trip(decode: Any, strategy: Any) -> None:
    @given(strategy)
    def check(message: Any) -> None:
        assert decode(encode(message)) == message

    check()


@pytest.mark.parametrize("decode", DECODERS)
def test_garbage_is_a_protocol_error_and_nothing_else(decode: Any) -> None:
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        with pytest.raises(ProtocolError):
            decode(data)

    check()


nested = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
TAGS = [
    "Hello", "Expect", "Done", "Abort", "Ping", "Welcome", "Refuse", "Failed", "Unknown", "Pong",
    "Register", "Deregister", "Lookup", "Registered", "Directory",
]  # fmt: skip


@pytest.mark.parametrize("decode", DECODERS)
def test_right_tags_with_wrong_fields(decode: Any) -> None:
    @given(st.sampled_from(TAGS), st.lists(nested, max_size=7))
    def check(tag: str, fields: list[Any]) -> None:
        data = msgspec.msgpack.encode([tag, *fields])
        try:
            message = decode(data)
        except ProtocolError:
            return
        assert decode(encode(message)) == message

    check()


@pytest.mark.parametrize("decode", DECODERS)
def test_corrupted_messages(decode: Any) -> None:
    valid = [
        encode(messages.Hello(1, "pd", "decode-0", LAYOUT, 4, 1 << 20, INSTANCE, 0)),
        encode(messages.Abort(5, "reason \u00e9")),
        encode(messages.Failed(1, 2, "reason \u00e9")),
        encode(messages.Register(RANK, "boot", 1, 2, 1, True)),
        encode(messages.Directory(True, 1, 2, 1, True, (RANK,))),
    ]

    @given(st.sampled_from(valid), st.data())
    def check(good: bytes, data: st.DataObject) -> None:
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
        try:
            decode(bytes(bad))
        except ProtocolError:
            return

    check()


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ProtocolError, match="utf-8"):
        messages.decode_to_prefill(b"\x93\xa5Abort\x01\xa2\xff\xfe")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        messages.decode_to_prefill(b"\x94\xa5Hello" + b"\x91" * 50_000)


@pytest.mark.parametrize("decode", DECODERS)
def test_oversize_is_refused_before_it_is_parsed(decode: Any) -> None:
    answers = decode in (messages.decode_to_decode, messages.decode_from_directory)
    limit = MAX_MESSAGE_BYTES if answers else MAX_REQUEST_BYTES
    with pytest.raises(ProtocolError, match=f"{limit + 1} bytes, at most {limit}"):
        decode(b"\x00" * (limit + 1))
    with pytest.raises(ProtocolError, match="refused"):
        decode(b"\x00" * limit)


def test_a_large_layout_and_a_long_reason_fit_into_a_message() -> None:
    components = tuple(Component(name, (1 << 40,) * 512) for name in ("kv", "mamba", "swa", "aux"))
    layout = Layout("m" * 256, "float16", 64, 8, "", tuple(range(512)), components)
    assert len(encode(messages.Hello(1, "s" * 256, "d" * 256, layout, 64, 1 << 20, INSTANCE, 0))) < MAX_REQUEST_BYTES
    assert len(encode(messages.Abort(1, messages.reason_text("\U0001f600" * 9999)))) < MAX_REQUEST_BYTES


def test_a_message_for_the_other_side_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Pong"):
        messages.decode_to_prefill(encode(messages.Pong()))
    with pytest.raises(ProtocolError, match="Lookup"):
        messages.decode_to_decode(encode(messages.Lookup()))


@pytest.mark.parametrize(
    ("message", "decode"),
    [
        (messages.Hello(1, "s" * 257, "d", LAYOUT, 4, 1 << 20, INSTANCE, 0), messages.decode_to_prefill),
        (messages.Hello(1, "two\nlines", "d", LAYOUT, 4, 1 << 20, INSTANCE, 0), messages.decode_to_prefill),
        (messages.Hello(1, "s", "d", LAYOUT, 65, 1 << 20, INSTANCE, 0), messages.decode_to_prefill),
        (messages.Hello(1, "s", "d", LAYOUT, 0, 1 << 20, INSTANCE, 0), messages.decode_to_prefill),
        (messages.Hello(1, "s", "d", LAYOUT, 4, 4095, INSTANCE, 0), messages.decode_to_prefill),
        (messages.Hello(1, "s", "d", LAYOUT, 4, (64 << 20) + 1, INSTANCE, 0), messages.decode_to_prefill),
        (messages.Expect(0, 1, (1,), 0), messages.decode_to_prefill),
        (messages.Expect(-1, 1, (1,), 0), messages.decode_to_prefill),
        (messages.Expect(1 << 63, 1, (1,), 0), messages.decode_to_prefill),
        (messages.Expect(1, 1, (1,) * 65, 0), messages.decode_to_prefill),
        (messages.Expect(1, 1, (1 << 31,), 0), messages.decode_to_prefill),
        (messages.Expect(1, 1, (-1,), 0), messages.decode_to_prefill),
        (messages.Expect(1, 1, (1,), 1 << 31), messages.decode_to_prefill),
        (messages.Abort(1 << 63, ""), messages.decode_to_prefill),
        (messages.Abort(1, "r" * 4097), messages.decode_to_prefill),
        (messages.Welcome(b"t" * 15, 1, INSTANCE), messages.decode_to_decode),
        (messages.Welcome(b"t" * 16, 0, INSTANCE), messages.decode_to_decode),
        (messages.Welcome(b"t" * 16, 65536, INSTANCE), messages.decode_to_decode),
        (messages.Refuse("r" * 4097), messages.decode_to_decode),
        (messages.Register(messages.RankInfo(65536, 0, 0, "", 1), "b", 1, 1, 1, True), messages.decode_to_directory),
        (messages.Register(messages.RankInfo(0, 0, 0, "", 0), "b", 1, 1, 1, True), messages.decode_to_directory),
        (messages.Register(RANK, "b", 0, 1, 1, True), messages.decode_to_directory),
        (messages.Register(RANK, "b", 1, 65537, 1, True), messages.decode_to_directory),
    ],
)
def test_bounds(message: Any, decode: Any) -> None:
    with pytest.raises(ProtocolError, match="control message refused"):
        decode(encode(message))


def test_reasons_are_made_fit_to_send() -> None:
    assert messages.reason_text("caf\u00e9") == "caf\u00e9"
    assert messages.reason_text("file \udcff") == "file ?"
    message = messages.Abort(1, messages.reason_text("x" * 9999))
    assert messages.decode_to_prefill(encode(message)) == message


@pytest.mark.parametrize(
    "raw", [["Ping", 1], ["Done", 1], ["Done", 1, 2, 3], ["Nothing"], ["Ping\x00"], {"type": "Ping"}]
)
def test_unknown_fields_and_tags(raw: Any) -> None:
    with pytest.raises(ProtocolError):
        messages.decode_to_prefill(msgspec.msgpack.encode(raw))
