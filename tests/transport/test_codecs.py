"""Encoded full-attention KVCache between two movers: what arrives, what was agreed, faults, and peers that lie."""

from __future__ import annotations

import random
import threading
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.device_memory import TorchBuffer
from sglang_prfaas.transport.framing import ChunkHeader, Receipt, pack_chunk
from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.memory import RankMemory
from sglang_prfaas.transport.messages import PROTOCOL_VERSION, Hello, Welcome
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import INSTANCE, TOKEN, FakeDecode, FakePrefill, read_exactly
from tests.transport.relay import FaultyRelay
from tests.transport.rig import CONFIG, PAGES, Memory, Pair, assert_moved, layout, some_slots, wait_ended, wait_until

CODECS = ("fp8", "int8", "shuffle")
LARGEST_ERROR = {"fp8": 0.04, "int8": 0.01, "shuffle": 0.0}
ELEMENTS = (640, 128)


def pages_layout(**changes: Any) -> Layout:
    """Two buffers of bfloat16 pages, states and auxiliary data as in `layout`."""
    pages = Component("kv", tuple(2 * n for n in ELEMENTS))
    return layout(components=(pages, *layout().components[1:]), kv_dtype="bfloat16", **changes)


def memory_of_values(seed: int) -> Memory:
    memory = Memory(pages_layout(), seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in memory.arrays[PAGES]:
        values = torch.randn(len(buffer), buffer.shape[1] // 2, generator=generator).to(torch.bfloat16)
        buffer[:] = values.view(torch.uint8).numpy()
    return memory


def with_codec(codec: Any, config: TransportConfig = CONFIG, **changes: Any) -> TransportConfig:
    return msgspec.structs.replace(config, codec=codec, **changes)


def pair_of(config: TransportConfig, **changes: Any) -> Pair:
    memory = memory_of_values(3)
    return Pair(
        config=config,
        of=pages_layout(),
        send_memory=memory,
        receive_memory=Memory(pages_layout(), None),
        **changes,
    )


def assert_arrived(codec: str, pair: Pair, ours: Any, theirs: Any) -> None:
    """States as they were, pages within the codec's error, and not a byte elsewhere."""
    for buffer, (sent, came) in enumerate(zip(pair.source.arrays[PAGES], pair.target.arrays[PAGES], strict=True)):
        expected = torch.from_numpy(sent[ours[PAGES]]).view(torch.bfloat16).float()
        found = torch.from_numpy(came[theirs[PAGES]]).view(torch.bfloat16).float()
        error = ((found - expected).norm() / expected.norm()).item()
        assert error <= LARGEST_ERROR[codec], (buffer, error)
        rest = np.setdiff1d(np.arange(len(came)), theirs[PAGES])
        assert not came[rest].any(), "a byte outside of what was reserved"
    for component in (1, 2):
        for sent, came in zip(pair.source.arrays[component], pair.target.arrays[component], strict=True):
            np.testing.assert_array_equal(sent[ours[component]], came[theirs[component]])


def move(pair: Pair, room: int, ours: Any, theirs: Any, *, lossless: bool = True) -> tuple[Any, Any]:
    session = pair.session()
    item = pair.receiver.expect(session, room, theirs, 0)
    transfer = pair.sender.transfer(room)
    wait_until(lambda: transfer.expected, "decode asked")
    with transfer.lock:
        transfer.start(len(ours[PAGES]))
    pair.send_all(transfer, ours)
    wait_ended(transfer, item.transfer)
    if lossless and transfer.state is State.DONE:
        wait_until(lambda: transfer.all_sent, "the sending threads have counted their last chunks")
    return transfer, item.transfer


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 20])
def test_a_hybrid_request(codec: str, chunk_bytes: int) -> None:
    with pair_of(with_codec(codec, chunk_bytes=chunk_bytes)) as pair:
        ours, theirs = some_slots(1), some_slots(2)
        sent, received = move(pair, 1, ours, theirs)
        assert (sent.state, received.state, sent.codec, received.codec) == (State.DONE, State.DONE, codec, codec)
        assert_arrived(codec, pair, ours, theirs)
        assert sent.bytes == received.bytes == pair.layout.request_bytes((20, 2, 1))
        assert sent.wire_bytes == received.wire_bytes
        kv_bytes = 20 * 2 * sum(ELEMENTS)
        on_wire = kv_bytes - (sent.bytes - sent.wire_bytes)
        assert kv_bytes / on_wire >= (1.8 if codec != "shuffle" else 1.2)


def test_pages_on_a_device_are_encoded_there() -> None:
    """The same bytes, whichever kind of buffer they come from."""
    for codec in CODECS:
        with pair_of(with_codec(codec)) as pair:
            buffers = [list(component) for component in pair.source.rank.components]
            buffers[PAGES] = [TorchBuffer(torch.from_numpy(array)) for array in pair.source.arrays[PAGES]]
            pair.source.rank.components[:] = RankMemory(buffers).components
            ours, theirs = some_slots(1), some_slots(2)
            sent, _ = move(pair, 1, ours, theirs)
            assert sent.state is State.DONE
            assert sent.wire_bytes < sent.bytes
            assert_arrived(codec, pair, ours, theirs)


def test_what_would_not_become_smaller_is_sent_as_it_is() -> None:
    noise = Memory(pages_layout(), 1)
    with Pair(config=with_codec("shuffle"), of=pages_layout(), send_memory=noise) as pair:
        ours, theirs = some_slots(1), some_slots(2)
        sent, received = move(pair, 1, ours, theirs)
        assert (received.state, received.wire_bytes) == (State.DONE, sent.bytes)
        assert_moved(noise, ours, pair.target, theirs)


@pytest.mark.parametrize(
    ("config", "decode_config", "why"),
    [
        (with_codec("fp8"), with_codec("raw", accept_codecs="none"), "decode takes none"),
        (with_codec("fp8"), with_codec("raw", accept_codecs="lossless"), "decode takes shuffle"),
        (with_codec("int8", chunk_bytes=1 << 20), with_codec("raw", chunk_bytes=4096), ""),
        (with_codec("raw"), with_codec("fp8"), ""),
    ],
)
def test_decode_has_a_say(
    config: TransportConfig, decode_config: TransportConfig, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pair_of(config, decode_config=decode_config) as pair:
        ours, theirs = some_slots(1), some_slots(2)
        sent, received = move(pair, 1, ours, theirs)
        assert received.state is State.DONE
        codec = "raw" if why or config.codec == "raw" else config.codec
        assert (sent.codec, received.codec) == (codec, codec)
        if codec == "raw":
            assert_moved(pair.source, ours, pair.target, theirs)
    warnings = [r.getMessage() for r in caplog.records if "is not encoded as" in r.getMessage()]
    assert len(warnings) == bool(why), warnings
    assert all(why in text for text in warnings)


def test_pages_longer_than_a_chunk_are_sent_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    with Pair(config=with_codec("shuffle")) as pair:
        ours, theirs = some_slots(1), some_slots(2)
        sent, _ = move(pair, 1, ours, theirs)
        assert (sent.state, sent.codec) == (State.DONE, "raw")
        assert_moved(pair.source, ours, pair.target, theirs)
    assert "a page has 5000 bytes, a chunk at most 4096" in caplog.text


@pytest.mark.parametrize("codec", CODECS)
def test_resets_and_corrupt_bytes(codec: str) -> None:
    """Chunks go again over other connections, are encoded anew, and land where they belong, once."""
    rng = random.Random(5)
    with pair_of(with_codec(codec, heartbeat_timeout_s=3.0)) as pair:
        relay = FaultyRelay(pair.sender.data_port, 5)
        relay.corrupt_rate = 0.05
        pair.sender._handshake.data_port = relay.port
        pair.session()  # one that is being opened does not survive a reset
        stop = threading.Event()

        def resets() -> None:
            while not stop.wait(rng.uniform(0.005, 0.05)):
                relay.reset_one()

        thread = threading.Thread(target=resets)
        thread.start()
        try:
            again = 0
            for room in range(100):
                if room >= 8 and again:
                    break
                for component in pair.target.arrays:
                    for buffer in component:
                        buffer[:] = 0
                ours, theirs = some_slots(room, (60, 4, 1)), some_slots(room + 100, (60, 4, 1))
                sent, received = move(pair, room, ours, theirs, lossless=False)
                assert received.state is State.DONE, received.reason
                assert_arrived(codec, pair, ours, theirs)
                assert received.bytes == pair.layout.request_bytes((60, 4, 1))
                again += sent.resent_chunks
            assert again, "the link did not harm a single chunk"
        finally:
            stop.set()
            thread.join()
            relay.close()


ONE = with_codec("raw", connections=1)


def encoded(codec: SessionCodec, transfer_id: int, items: int = 2) -> tuple[ChunkHeader, bytes]:
    """A good chunk of encoded pages of buffer 1."""
    of = codec.of(PAGES, 1)
    assert of is not None
    raw = memory_of_values(3).arrays[PAGES][1][:items]
    payload = of.encode(raw)
    assert payload is not None
    return ChunkHeader(transfer_id, PAGES, 1, 0, len(payload), items=items), payload.tobytes()


def on_wire(header: ChunkHeader, payload: bytes) -> bytes:
    return pack_chunk(header, payload)


@pytest.mark.parametrize("codec", CODECS)
def test_corrupt_late_and_duplicate_encoded_chunks(codec: str) -> None:
    with FakePrefill() as prefill, pair_of(ONE) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        hello = prefill.receive(Hello)
        assert set(hello.codecs) == set(CODECS)
        prefill.send(Welcome(TOKEN, prefill.data_port, INSTANCE, codec))
        (data,) = prefill.accept(1)
        item = pair.receiver.expect(session, 1, some_slots(1, (4, 0, 0)), 0)
        transfer = item.transfer
        good = on_wire(*encoded(SessionCodec(codec, pages_layout()), transfer.transfer_id))
        bad = good[:-1] + bytes([good[-1] ^ 1])
        data.sendall(bad)
        assert read_exactly(data, 32) == Receipt(0, again=True).pack() + Receipt(1).pack()
        assert not any(buffer.any() for buffer in pair.target.arrays[PAGES]), "a corrupt chunk was placed"
        data.sendall(good)
        assert read_exactly(data, 16) == Receipt(2).pack()
        assert (transfer.bytes, transfer.wire_bytes) == (2 * 256, len(good) - 40)
        before = pair.target.copy()
        data.sendall(good)
        assert read_exactly(data, 16) == Receipt(3).pack()
        assert (transfer.bytes, transfer.duplicate_bytes) == (2 * 256, 2 * 256)
        pair.receiver.abort(item, "the client has gone")
        data.sendall(on_wire(*encoded(SessionCodec(codec, pages_layout()), transfer.transfer_id, 4)))
        assert read_exactly(data, 16) == Receipt(4).pack()
        for ours, theirs in zip(before[PAGES], pair.target.arrays[PAGES], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("codec", "change", "why"),
    [
        ("fp8", {"items": 1 << 31}, "items of 256 bytes, at most 4096"),
        ("shuffle", {"items": 17}, "items of 256 bytes, at most 4096"),
        ("shuffle", {"items": 3}, "says that it has 512 bytes, expected 768"),
        ("int8", {"items": 3}, "expected 396 to 396"),
        ("fp8", {"offset": 3}, "stream of 1024 bytes"),
        ("fp8", {"offset": (1 << 32) - 1}, "stream of 1024 bytes"),
        ("shuffle", {"component": 1}, "has no codec in this session"),
        ("raw", {}, "has no codec in this session"),
    ],
)
def test_encoded_chunks_that_must_not_be(codec: str, change: dict[str, int], why: str) -> None:
    with FakePrefill() as prefill, pair_of(ONE) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.receive(Hello)
        prefill.send(Welcome(TOKEN, prefill.data_port, INSTANCE, codec))
        (data,) = prefill.accept(1)
        item = pair.receiver.expect(session, 1, some_slots(1, (4, 0, 0)), 0)
        name = codec if codec != "raw" else "fp8"
        header, payload = encoded(SessionCodec(name, pages_layout()), item.transfer.transfer_id)
        data.sendall(on_wire(msgspec.structs.replace(header, **change), payload))
        wait_until(lambda: session.failure, "end of the session")
        assert why in session.failure
        assert item.transfer.state is State.FAILED
        assert not any(buffer.any() for buffer in pair.target.arrays[PAGES])


@pytest.mark.parametrize(
    ("codec", "accept", "why"),
    [
        ("zip", "all", "zip: decode takes"),
        ("fp8", "lossless", "fp8: decode takes shuffle"),
        ("shuffle", "none", "shuffle: decode takes none"),
    ],
)
def test_a_codec_that_was_not_offered(codec: str, accept: Any, why: str) -> None:
    config = msgspec.structs.replace(ONE, accept_codecs=accept)
    with FakePrefill() as prefill, pair_of(config) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.receive(Hello)
        prefill.send(Welcome(TOKEN, prefill.data_port, INSTANCE, codec))
        wait_until(lambda: session.failure, "end of the session")
        assert f"it would encode KVCache as {why}" in session.failure


def test_a_decode_rank_that_says_nothing_of_codecs_gets_plain_bytes() -> None:
    """A `Hello` without its last fields, and one that offers codecs nobody knows."""
    with pair_of(with_codec("shuffle")) as pair:
        for number, codecs in enumerate([None, ["lz5", "fp9"], ["lz5", "shuffle"]]):
            with FakeDecode(pair.sender.control_port, b"D%d" % number) as decode:
                hello = Hello(PROTOCOL_VERSION, "pd", f"fake-{number}", pair.layout, 1, 4096, INSTANCE, 0)
                before = 1 + Hello.__struct_fields__.index("codecs")  # after the tag
                fields = msgspec.msgpack.decode(msgspec.msgpack.encode(hello))[:before]
                decode.send(msgspec.msgpack.encode(fields if codecs is None else [*fields, codecs]))
                expected = "shuffle" if codecs and "shuffle" in codecs else "raw"
                assert decode.receive(Welcome).codec == expected
