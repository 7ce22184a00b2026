"""Different widths: whatever the geometry, gathering and scattering by parts is re-sharding the whole."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.transport.layout import Component, Layout, Sharding
from sglang_prfaas.transport.reshape import (
    MAX_WIDTH_RATIO,
    ItemPart,
    between,
    held,
    move,
    moves,
    peers,
    problems,
    share_of,
)

Whole = npt.NDArray[np.uint8]

widths = st.sampled_from([(p, d) for p in (1, 2, 4, 8) for d in (1, 2, 4, 8)])
units = st.sampled_from([1, 2, 4, 8, 16, 24])
shardings = st.builds(
    Sharding,
    buffers=st.just(1),
    rows=st.integers(1, 4),
    sections=st.lists(units, min_size=0, max_size=3).map(tuple),
    unit_bytes=st.integers(1, 5),
)


def shard(whole: list[Whole], width: int, rank: int) -> Whole:
    """A rank's item, as the model lays it out: of every row, its part of every section. Sections `[rows, units, n]`."""
    parts = []
    for section in whole:
        count = section.shape[1]
        if count >= width:
            parts.append(np.split(section, width, axis=1)[rank])
        else:
            parts.append(section[:, rank // (width // count)][:, None])
    rows = parts[0].shape[0]
    return np.concatenate([part.reshape(rows, -1) for part in parts], axis=1).reshape(-1)


def taken(item: Whole, part: ItemPart) -> Whole:
    rows = item.reshape(part.rows, part.row_bytes)
    return np.concatenate([rows[:, a:b] for a, b in part.parts] or [rows[:, :0]], axis=1)


def put(item: Whole, part: ItemPart, data: Whole) -> None:
    rows, at = item.reshape(part.rows, part.row_bytes), 0
    for a, b in part.parts:
        rows[:, a:b] = data[:, at : at + b - a]
        at += b - a


@given(widths, shardings, st.integers(0, 9))
def test_every_decode_rank_gets_exactly_its_shard(both: tuple[int, int], sharding: Sharding, turn: int) -> None:
    prefill, decode = both
    rng = np.random.default_rng(7)
    counts = sharding.sections or (1,)
    whole = [rng.integers(0, 255, (sharding.rows, n, sharding.unit_bytes), dtype=np.uint8) for n in counts]

    def item(width: int, rank: int) -> Whole:
        return shard(whole, width, rank) if sharding.sections else whole[0].reshape(-1)

    for rank in range(decode):
        expected = item(decode, rank)
        written = np.full(len(expected), 255, np.uint8)
        received = 0
        for sender in peers(prefill, decode, rank):
            source, target = move(sharding, len(expected), turn, (prefill, sender), (decode, rank))
            assert source.bytes == target.bytes
            assert source.rows * source.row_bytes == len(item(prefill, sender))
            put(written, target, taken(item(prefill, sender), source))
            received += target.bytes
        np.testing.assert_array_equal(written, expected)
        assert received == len(expected), "no byte comes twice"


def test_who_takes_from_whom() -> None:
    assert [list(peers(1, 2, rank)) for rank in range(2)] == [[0], [0]]
    assert [list(peers(2, 4, rank)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [list(peers(4, 2, rank)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [share_of(2, 4, rank) for rank in range(4)] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert share_of(4, 2, 1) == (0, 1)
    assert [list(held(2, 4, rank)) for rank in range(4)] == [[0], [0], [1], [1]]


def test_what_is_held_alike_is_sent_in_turn() -> None:
    senders = [[move(Sharding(1), 100, turn, (2, rank), (1, 0)).source.bytes for rank in (0, 1)] for turn in range(3)]
    assert senders == [[100, 0], [0, 100], [100, 0]]


KV = Sharding(2, 16, (4,), 32)
CONV = Sharding(1, 3, (8, 8, 16), 4)
STATE = Sharding(1, 1, (8,), 1024)


def layout(width: int, rank: int = 0, **changes: object) -> Layout:
    def sizes(*shards: Sharding) -> tuple[int, ...]:
        return tuple(
            s.rows * sum(len(held(n, width, 0)) for n in s.sections) * s.unit_bytes
            for s in shards
            for _ in range(s.buffers)
        )

    components = (
        Component("kv", sizes(KV), (KV,)),
        Component("mamba", sizes(CONV, STATE), (CONV, STATE)),
        Component("aux", (64, 8), (Sharding(2),)),
    )
    return msgspec.structs.replace(
        Layout("M", "bfloat16", 16, width, "", (3,), components, rank),
        **changes,
    )


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1)])
def test_layouts_of_different_widths_fit(prefill: int, decode: int) -> None:
    for rank in range(decode):
        for sender in peers(prefill, decode, rank):
            ours, theirs = layout(prefill, sender), layout(decode, rank)
            assert problems(ours, theirs) == []
            assert moves(ours, (prefill, sender), (decode, rank)) == moves(theirs, (prefill, sender), (decode, rank))
            session = between(ours, (prefill, sender), (decode, rank))
            assert session.components == between(theirs, (prefill, sender), (decode, rank)).components
            assert session.components[2].item_bytes == (64, 8)


def test_what_does_not_fit_is_said_with_both_widths() -> None:
    widths = "attention TP width: prefill has 2, decode has "
    assert problems(layout(2), layout(3)) == [widths + "3; one must be a multiple of the other"]
    assert problems(layout(2, 1), layout(4, 0)) == [widths + "4; rank 0 of decode takes nothing from rank 1 of prefill"]
    assert problems(layout(2), layout(4, 9)) == [widths + "4; decode says that it is rank 9"]
    assert problems(layout(2), layout(4, kv_dtype="fp8")) == [
        widths + "4",
        "KVCache dtype: prefill has bfloat16, decode has fp8",
    ]
    unknown = layout(4, components=(Component("kv", (1024, 1024)), *layout(4).components[1:]))
    bare = layout(2, components=(Component("kv", (2048, 2048)), *layout(2).components[1:]))
    assert problems(bare, unknown) == [
        widths + "4; how kv is divided among ranks is not known, so use the same width at both ends"
    ]
    assert "in another way" in problems(layout(2), unknown)[0]
    wrong = layout(4, components=(Component("kv", (512, 999), (KV,)), *layout(4).components[1:]))
    assert problems(layout(2), wrong) == [widths + "4; kv buffer 1 has items of 999 bytes at width 4, expected 512"]


@pytest.mark.parametrize("ratio", [128, 1 << 40])
def test_a_peer_cannot_ask_for_any_number_of_transfers(ratio: int) -> None:
    """As many decode ranks as it likes would be as many transfers of a request."""
    most = layout(1, components=(Component("aux", (64,), (Sharding(1),)),))
    assert problems(most, msgspec.structs.replace(most, tp_size=64)) == []
    widths = (
        f"attention TP width: prefill has {{}}, decode has {{}}; one may be at most {MAX_WIDTH_RATIO} times the other"
    )
    assert problems(most, msgspec.structs.replace(most, tp_size=ratio)) == [widths.format(1, ratio)]
    assert problems(msgspec.structs.replace(most, tp_size=ratio), most) == [widths.format(ratio, 1)]


def test_equal_widths_compare_ranks() -> None:
    assert problems(layout(2, 1), layout(2, 1)) == []
    assert problems(layout(2, 1), layout(2, 0)) == ["attention TP rank: prefill has 1, decode has 0"]
