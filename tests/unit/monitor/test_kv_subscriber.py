"""The subscriber over real sockets, with a publisher that speaks as SGLang's does."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sglang_prfaas.monitor.kv_subscriber import KvEventSource, KvEventSubscriber
from sglang_prfaas.prefix_cache.block_hash import PromptHashes
from sglang_prfaas.prefix_cache.changes import Change, Cleared, Stored
from sglang_prfaas.prefix_cache.index import GlobalIndex
from sglang_prfaas.prefix_cache.matching import Holder

DEADLINE_S = 60
HOLDER = Holder("pd", "prefill-0")
PROMPT = PromptHashes(list(range(100)), 2)


class Publisher:
    """SGLang's ZmqEventPublisher in small: PUB with sequence numbers, ROUTER for replay."""

    def __init__(self, folder: Path, incarnation: int = 0) -> None:
        self.context = zmq.Context()
        self.incarnation = incarnation
        self.pub, self.router = self.context.socket(zmq.XPUB), self.context.socket(zmq.ROUTER)
        for socket, name in ((self.pub, "pub"), (self.router, "replay")):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{folder}/{name}")
        self.batches: list[bytes] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve_replays, daemon=True)
        self._thread.start()

    def wait_for_subscriber(self) -> None:
        assert self.pub.poll(DEADLINE_S * 1000), "nobody subscribes"
        self.pub.recv()

    def publish(self, block: int, *, lost: bool = False) -> None:
        hashes = PROMPT.all[block : block + 1].astype("int64").tolist()
        event = {"type": "BlockStored", "block_hashes": hashes, "block_size": 2, "medium": "GPU", "token_ids": [1, 2]}
        self.batches.append(msgspec.msgpack.encode([float(self.incarnation), [event], None]))
        if not lost:
            number = (len(self.batches) - 1).to_bytes(8, "big")
            self.pub.send_multipart([b"kv", number, self.batches[-1]])

    def _serve_replays(self) -> None:
        while not self._stop.is_set():
            if not self.router.poll(20):
                continue
            client, _, start = self.router.recv_multipart()
            for seq, batch in list(enumerate(self.batches))[int.from_bytes(start, "big") :]:
                self.router.send_multipart([client, b"", b"kv", seq.to_bytes(8, "big"), batch])
            self.router.send_multipart([client, b"", b"", b"\xff" * 8, b""])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.pub.close()
        self.router.close()
        self.context.term()


class Rig:
    """A publisher, a subscriber and an index."""

    def __init__(self, folder: Path, replay: bool) -> None:
        self.folder = folder
        self.changes = queue.Queue[Change]()
        self.index = GlobalIndex(1000)
        self.publisher = Publisher(folder)
        replay_endpoint = f"ipc://{folder}/replay" if replay else ""
        source = KvEventSource(HOLDER, f"ipc://{folder}/pub", 2, replay_endpoint, topic="kv")
        self.subscriber = KvEventSubscriber([source], self._deliver)
        self.publisher.wait_for_subscriber()

    def _deliver(self, holder: Holder, changes: tuple[Change, ...]) -> None:
        assert holder == HOLDER
        for change in changes:
            self.changes.put(change)

    def restart(self) -> None:
        self.publisher.close()
        self.publisher = Publisher(self.folder, self.publisher.incarnation + 1)
        self.publisher.wait_for_subscriber()

    def wait_for(self, kind: type[Change]) -> None:
        """Take changes in until one of this kind has come."""
        while True:
            change = self.changes.get(timeout=DEADLINE_S)
            self.index.apply(HOLDER, [change])
            if isinstance(change, kind):
                return

    @property
    def matched_blocks(self) -> int:
        match = self.index.match(PROMPT).by_holder.get(HOLDER)
        return match.device_blocks if match else 0

    def wait_for_blocks(self, blocks: int) -> None:
        while self.matched_blocks != blocks:
            self.wait_for(Stored)

    def close(self) -> None:
        self.subscriber.close()
        self.publisher.close()


@pytest.fixture(params=[True])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    # A socket's path may have about 100 characters: pytest's own folders are too deep.
    with tempfile.TemporaryDirectory() as folder:
        yield from in_folder(Path(folder), request.param)


def in_folder(folder: Path, replay: bool) -> Iterator[Rig]:
    rig = Rig(folder, replay)
    yield rig
    rig.close()


def test_events_gap_and_restart(rig: Rig) -> None:
    for block in range(3):
        rig.publisher.publish(block)
    rig.wait_for_blocks(3)
    rig.publisher.publish(3, lost=True)
    rig.publisher.publish(4)
    rig.wait_for_blocks(5)
    assert rig.subscriber.counters()[HOLDER]["resets"] == 0
    rig.restart()
    rig.wait_for(Cleared)
    assert rig.matched_blocks == 0
    rig.publisher.publish(0)
    rig.wait_for_blocks(1)
    counters = rig.subscriber.counters()[HOLDER]
    assert (counters["resets"], counters["refused"], counters["skipped"]) == (1, 0, 0)


@pytest.mark.parametrize("rig", [False], indirect=True)
def test_without_replay_a_gap_starts_over(rig: Rig) -> None:
    rig.publisher.publish(0)
    rig.wait_for_blocks(1)
    rig.publisher.publish(1, lost=True)
    rig.publisher.publish(0)
    rig.wait_for(Cleared)
    rig.wait_for_blocks(1)


def test_garbage_does_not_end_it(rig: Rig) -> None:
    rig.publisher.pub.send_multipart([b"kv", b"short"])
    rig.publisher.publish(0)
    rig.publisher.batches.append(b"\xc1")
    rig.publisher.pub.send_multipart([b"kv", (1).to_bytes(8, "big"), b"\xc1"])
    rig.publisher.publish(1)
    rig.wait_for_blocks(2)
    assert rig.subscriber.counters()[HOLDER]["refused"] >= 1


def test_close_without_a_publisher() -> None:
    source = KvEventSource(HOLDER, "tcp://127.0.0.1:9", 2, "tcp://127.0.0.1:9")
    subscriber = KvEventSubscriber([source], lambda holder, changes: None)
    subscriber.close()
    subscriber.close()
    assert not subscriber._thread.is_alive()
