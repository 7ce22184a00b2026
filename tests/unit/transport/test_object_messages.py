from __future__ import annotations

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import ChecksumError, PeerError, ProtocolError
from sglang_prfaas.transport.object_messages import (
    HEAD,
    MAX_BODY_BYTES,
    MAX_NAMES,
    Ask,
    Get,
    Sizes,
    body_bytes,
    names_of,
    pack,
    unpack_request,
    unpack_sizes,
)

TEXT = st.text(min_size=1, max_size=64)
GROUPS = st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=20).map(tuple)), max_size=4).map(tuple)


def sealed(body: bytes) -> tuple[bytes, bytes]:
    return HEAD.pack(len(body), xxhash.xxh3_64_intdigest(body)), body


def parts(data: bytes) -> tuple[bytes, bytes]:
    head, body = data[: HEAD.size], data[HEAD.size :]
    assert body_bytes(head) == len(body)
    return head, body


@given(GROUPS, st.sampled_from([Ask, Get]))
def test_requests_come_back(groups: tuple[tuple[str, tuple[str, ...]], ...], kind: type[Ask] | type[Get]) -> None:
    assert unpack_request(*parts(pack(kind(groups)))) == kind(groups)


@given(st.lists(st.integers(0, 1 << 30), max_size=50).map(tuple))
def test_sizes_come_back(sizes: tuple[int, ...]) -> None:
    assert unpack_sizes(*parts(pack(Sizes(sizes))), len(sizes)) == sizes
    with pytest.raises(ProtocolError, match="sizes of"):
        unpack_sizes(*parts(pack(Sizes(sizes))), len(sizes) + 1)


@given(st.binary(max_size=300))
def test_any_other_bytes_are_a_fault_of_the_peer(body: bytes) -> None:
    for unpack in (unpack_request, lambda head, body: unpack_sizes(head, body, 1)):
        try:
            unpack(*sealed(body))
        except PeerError:
            continue
        msgspec.msgpack.decode(body)  # what passed was a message after all


@given(GROUPS, st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_found(groups: tuple[tuple[str, tuple[str, ...]], ...], at: int, bit: int) -> None:
    data = bytearray(pack(Ask(groups)))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises((ProtocolError, ChecksumError)):
        unpack_request(data[: HEAD.size], data[HEAD.size :])


def test_limits() -> None:
    many = tuple(f"{number:064x}" for number in range(MAX_NAMES))
    assert unpack_request(*parts(pack(Ask((("d/kv", many),))))).groups[0][1] == many
    with pytest.raises(ProtocolError, match="16385 names"):
        unpack_request(*parts(pack(Ask((("d/kv", many), ("d/mamba", ("x",)))))))
    with pytest.raises(ProtocolError, match="refused"):
        unpack_request(*parts(pack(Ask((("n" * 129, ("x",)),)))))
    with pytest.raises(ProtocolError, match="refused"):
        unpack_request(*parts(pack(Ask((("n", ("",)),)))))
    with pytest.raises(ProtocolError, match="refused"):
        unpack_request(*parts(pack(Sizes((1,)))))
    for length in (0, MAX_BODY_BYTES + 1, (1 << 32) - 1):
        with pytest.raises(ProtocolError, match="announced"):
            body_bytes(HEAD.pack(length, 0))
    with pytest.raises(ProtocolError, match="are allowed"):
        pack(Ask((("n" * 128, ("k" * 128,) * 40_000),)))


def test_names_are_joined_as_the_store_joins_them() -> None:
    assert list(names_of((("d/kv", ("1", "2")), ("d/mamba", ("2",))))) == ["d/kv/1", "d/kv/2", "d/mamba/2"]
