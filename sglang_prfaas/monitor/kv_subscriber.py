"""Subscribes to the KV events of many SGLang servers over ZeroMQ, and hands on what happened to their caches.

One thread, one subscription and at most one replay connection for each publisher. SGLang's publisher neither encrypts
nor authenticates: subscribe within a site only.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import zmq
from msgspec import Struct
from zmq.utils.monitor import parse_monitor_message

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor.event_stream import Action, Apply, EventStream, Reset
from sglang_prfaas.monitor.kv_events import MAX_MESSAGE_BYTES, KvEventReader
from sglang_prfaas.prefix_cache.changes import Change, Cleared
from sglang_prfaas.prefix_cache.matching import Holder

logger = logging.getLogger(__name__)

_END_SEQ = (-1).to_bytes(8, "big", signed=True)
_POLL_MS = 500
_BATCHES_A_TURN = 64
_HIGH_WATER_MARK = 100_000

Deliver = Callable[[Holder, tuple[Change, ...]], None]
"""Called in the subscriber's thread; an event loop passes on with `call_soon_threadsafe`."""


class KvEventSource(Struct, frozen=True):
    """One publisher: a server, or one data-parallel rank of it (SGLang: base port + rank).

    `block_tokens` is the `block_size` that `/server_info` names under `kv_events`; 0: that of the first block which it
    reports. `infer_states`: a hybrid model whose
    server does not report its state checkpoints.
    """

    holder: Holder
    endpoint: str
    block_tokens: int = 0
    replay_endpoint: str = ""
    topic: str = ""
    infer_states: bool = False


class KvEventSubscriber:
    """Follows the publishers given until closed. Publishers may start later, go away and come back."""

    def __init__(
        self,
        sources: Iterable[KvEventSource],
        deliver: Deliver,
        *,
        clock: Clock | None = None,
        replay_timeout_s: float = 5.0,
    ) -> None:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._waker = self._context.socket(zmq.PAIR)
        self._waker.connect("inproc://wake")
        self._poller.register(self._wake, zmq.POLLIN)
        clock = clock or MonotonicClock()
        self._followers = [
            _Follower(source, deliver, self._context, self._poller, clock, replay_timeout_s) for source in sources
        ]
        self._thread = threading.Thread(target=self._run, name="prfaas-kv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following, and wait for the thread's end. Nothing is delivered afterwards."""
        if not self._waker.closed:
            self._waker.send(b"")
            self._thread.join()
            self._waker.close(linger=0)
            self._context.term()

    def block_tokens(self, holder: Holder) -> int:
        """Tokens of a publisher's blocks, 0 while that is not known."""
        return next((f.block_tokens for f in self._followers if f.source.holder == holder), 0)

    def counters(self) -> dict[Holder, dict[str, int]]:
        """Batches taken in, gaps, resets, messages refused and events skipped of each publisher since the start."""
        return {follower.source.holder: follower.counters() for follower in self._followers}

    def _run(self) -> None:
        by_socket = {socket: follower for follower in self._followers for socket in (follower.sub, follower.monitor)}
        while True:
            ready = dict(self._poller.poll(_POLL_MS))
            if self._wake in ready:
                break
            # What became of a connection is taken in before what came over it.
            for socket in sorted(ready, key=lambda socket: socket.type != zmq.PAIR):
                if (follower := by_socket.get(socket)) is not None:
                    follower.receive(socket)
            for follower in self._followers:
                follower.receive_replay()
                follower.do(follower.stream.tick())
                follower.deliver()
        for follower in self._followers:
            follower.close()
        self._wake.close(linger=0)


class _Follower:
    """One publisher's sockets around its `EventStream`."""

    def __init__(
        self,
        source: KvEventSource,
        deliver: Deliver,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        clock: Clock,
        replay_timeout_s: float,
    ) -> None:
        self.source = source
        self._reader = KvEventReader(source.block_tokens, infer_states=source.infer_states)
        can_replay = bool(source.replay_endpoint)
        self.stream = EventStream(clock, can_replay=can_replay, replay_timeout_s=replay_timeout_s)
        self.sub = self._new_socket(context, zmq.SUB)
        self.sub.setsockopt_string(zmq.SUBSCRIBE, source.topic)
        self.monitor = self.sub.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.sub.connect(source.endpoint)
        poller.register(self.sub, zmq.POLLIN)
        poller.register(self.monitor, zmq.POLLIN)
        self._deliver = deliver
        self._context = context
        self._poller = poller
        self._replay: zmq.Socket[bytes] | None = None
        self._batches = self._refused = 0

    @property
    def block_tokens(self) -> int:
        """Tokens of its blocks, 0 while that is not known."""
        return self._reader.block_tokens

    def counters(self) -> dict[str, int]:
        return {
            "batches": self._batches,
            "gaps": self.stream.gaps,
            "resets": self.stream.resets,
            "refused": self._refused,
            "skipped": self._reader.skipped,
        }

    def receive(self, socket: zmq.Socket[bytes]) -> None:
        if socket is self.monitor:
            for frames in _waiting(socket):
                if parse_monitor_message(frames)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.do(self.stream.connected())
            return
        for frames in _waiting(socket):
            if len(frames) == 3 and len(frames[1]) == 8 and frames[1] != _END_SEQ:
                self.do(self.stream.live(int.from_bytes(frames[1], "big"), frames[2]))
            else:
                self._refuse(f"a message of {len(frames)} frames, not topic, sequence number and batch")

    def receive_replay(self) -> None:
        socket = self._replay
        if socket is None:
            return
        for frames in _waiting(socket):
            if len(frames) != 4 or len(frames[2]) != 8:
                self._refuse(f"a replay message of {len(frames)} frames")
            elif frames[2] == _END_SEQ:
                self._close_replay()
                self.do(self.stream.replay_ended())
            else:
                self.do(self.stream.replayed(int.from_bytes(frames[2], "big"), frames[3]))
            if self._replay is not socket:
                return

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Apply):
                self._apply(action)
            elif isinstance(action, Reset):
                logger.info("KV events of %s: starting over, %s", self.source.holder, action.reason)
                self._reader.take()
                self._deliver(self.source.holder, (Cleared(),))
            else:
                self._ask(action.start_seq)

    def close(self) -> None:
        self._close_replay()
        self.sub.disable_monitor()
        self.monitor.close(linger=0)
        self.sub.close(linger=0)

    def deliver(self) -> None:
        """Hand on what was read in this turn, at once."""
        changes = self._reader.take()
        if changes:
            self._deliver(self.source.holder, changes)

    def _apply(self, batch: Apply) -> None:
        try:
            self._reader.feed(batch.payload)
        except ProtocolError as error:
            self._refuse(str(error))
            return
        self._batches += 1

    def _ask(self, start_seq: int) -> None:
        self._close_replay()
        self._replay = self._new_socket(self._context, zmq.DEALER)
        self._replay.connect(self.source.replay_endpoint)
        self._poller.register(self._replay, zmq.POLLIN)
        with contextlib.suppress(zmq.Again):  # not connected yet and no room to queue: asked again after the timeout
            self._replay.send_multipart([b"", start_seq.to_bytes(8, "big")], zmq.NOBLOCK)

    def _close_replay(self) -> None:
        if self._replay is not None:
            self._poller.unregister(self._replay)
            self._replay.close(linger=0)
            self._replay = None

    def _refuse(self, reason: str) -> None:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            logger.warning("KV events of %s: %s (%d refused so far)", self.source.holder, reason, self._refused)

    def _new_socket(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.LINGER, 0)
        return socket


def _waiting(socket: zmq.Socket[bytes]) -> Iterable[list[Any]]:
    """Messages that are there already, at most some at a time, so that no publisher keeps the others waiting."""
    for _ in range(_BATCHES_A_TURN):
        try:
            yield socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
