"""A publisher of KV events that speaks as SGLang's does: PUB with sequence numbers, ROUTER for replay, Unix sockets."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from sglang_prfaas.prefix_cache.block_hash import SHARED, Namespace, PromptHashes

BLOCK_TOKENS = 4


class KvPublisher:
    """One server's. `replay_endpoint` and `endpoint` are what a subscriber is given."""

    def __init__(self, folder: Path, name: str) -> None:
        self.endpoint, self.replay_endpoint = f"ipc://{folder}/{name}", f"ipc://{folder}/{name}r"
        self._context = zmq.Context()
        self._pub, self._router = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        for socket, endpoint in ((self._pub, self.endpoint), (self._router, self.replay_endpoint)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
        self._batches: list[bytes] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve_replays, daemon=True)
        self._thread.start()

    def stored(self, tokens: Sequence[int], namespace: Namespace = SHARED) -> None:
        """Tell that all whole blocks of a prompt are cached."""
        self._publish("BlockStored", tokens, namespace, block_size=BLOCK_TOKENS, token_ids=list(tokens), medium="GPU")

    def removed(self, tokens: Sequence[int]) -> None:
        """Tell that they are not any more."""
        self._publish("BlockRemoved", tokens, SHARED, medium="GPU")

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._pub.close()
        self._router.close()
        self._context.term()

    def _publish(self, kind: str, tokens: Sequence[int], namespace: Namespace, **fields: object) -> None:
        hashes = PromptHashes(list(tokens), BLOCK_TOKENS, namespace).all.astype("int64").tolist()
        event = {"type": kind, "block_hashes": hashes, **fields}
        self._batches.append(msgspec.msgpack.encode([float(id(self)), [event], None]))
        number = (len(self._batches) - 1).to_bytes(8, "big")
        self._pub.send_multipart([b"", number, self._batches[-1]])

    def _serve_replays(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            client, _, start = self._router.recv_multipart()
            for seq, batch in list(enumerate(self._batches))[int.from_bytes(start, "big") :]:
                self._router.send_multipart([client, b"", b"", seq.to_bytes(8, "big"), batch])
            self._router.send_multipart([client, b"", b"", b"\xff" * 8, b""])
