"""One thread that owns ZeroMQ sockets: they are not thread-safe, so everything that touches one runs in here."""

from __future__ import annotations

import itertools
import logging
import math
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_prfaas.clock import Clock
from sglang_prfaas.transport.addresses import dialable, endpoint
from sglang_prfaas.transport.client_gate import ClientGate, Told
from sglang_prfaas.transport.messages import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from sglang_prfaas.transport.security import PLAIN, Security, ServerKey, curve
from sglang_prfaas.transport.security.curve import Loss
from sglang_prfaas.transport.security.peers import Watch
from sglang_prfaas.transport.security.refusals import RefusalLog

__all__ = ["ZmqLoop", "dialable", "endpoint"]

logger = logging.getLogger(__name__)
_monitor_numbers = itertools.count(1)

MAX_REQUESTS_HELD = 256
"""Messages of one peer that wait at a ROUTER before the peer has to."""
MAX_MESSAGES_QUEUED = 8192
"""Messages that wait for one peer, or at a DEALER; twice the requests that a decode rank may have open."""
MESSAGES_PER_TURN = 256
"""Messages taken from one socket before the others, the calls and the ticks get their turn."""
WATCH_S = 0.25
"""Between two looks at the clients of bound sockets, and at the list of sites."""
HANDSHAKE_MS = 10_000
"""For ZeroMQ's handshake with a client."""


class ZmqLoop:
    """Polls sockets, runs calls handed over by other threads, and ticks. An error in a callback is logged, no more.

    With keys in `security`, sockets speak CURVE, and this loop is the ZAP handler of its context that lets clients in.
    messages_per_s: of one client of a bound socket, see `clients`.

    `stop()` joins the thread and closes what it owns, whether or not it was ever started.
    """

    def __init__(self, name: str, clock: Clock, security: Security = PLAIN, messages_per_s: float = math.inf) -> None:
        self.context = zmq.Context()
        self._clock = clock
        self._security = security
        self._refusals = RefusalLog(logger, clock)
        self._poller = zmq.Poller()
        self._handlers: dict[Any, Callable[[list[zmq.Frame]], None]] = {}
        self._monitors: dict[Any, zmq.Socket[bytes]] = {}
        self._messages_per_s = messages_per_s
        self._gates: dict[Any, ClientGate] = {}
        """Of bound sockets."""
        self._watch = security.watch()
        self._list_changed: list[Callable[[Watch], None]] = []
        self._calls: deque[Callable[[], object]] = deque()
        self._ticks: list[list[Any]] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller.register(self._wake_read.fileno(), zmq.POLLIN)
        self._stopping = threading.Event()
        self._linger_ms = 0
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        if security.keys is not None:
            self._let_in_by(security.keys.peers.site_of_curve_key)
        self.every(WATCH_S, self._look_at_clients)

    def start(self) -> None:
        self._thread.start()

    def socket(self, kind: int, host: str, server: ServerKey | None = None) -> zmq.Socket[bytes]:
        """A new socket that never lingers; IPv6 where the host is an IPv6 address. A ROUTER is to be bound, others dial
        the server whose key is `server`: this site's where none is given.

        What a peer may have us hold is bounded: a ROUTER, which anyone can reach, takes small messages and few of them.
        """
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IPV6, int(":" in host))
        serves = kind == zmq.ROUTER
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES if serves else MAX_MESSAGE_BYTES)
        sock.setsockopt(zmq.RCVHWM, MAX_REQUESTS_HELD if serves else MAX_MESSAGES_QUEUED)
        sock.setsockopt(zmq.SNDHWM, MAX_MESSAGES_QUEUED)
        sock.setsockopt(zmq.RECONNECT_IVL, 100)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if serves:
            self._security.serve(sock)
            sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
            gate = self._gates[sock] = ClientGate(self._clock, self._security, self._refusals, self._messages_per_s)
            events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | curve.HANDSHAKE_FAILED
            self._monitor(sock, events, gate.seen)
        else:
            self._security.dial(sock, server or self._security.own_server_key)
        return sock

    def add(self, sock: zmq.Socket[bytes], handler: Callable[[list[zmq.Frame]], None]) -> None:
        """Deliver every multipart message of `sock` to `handler`. Before `start`, or from within the loop."""
        gate = self._gates.get(sock)
        self._handlers[sock] = gate.guard(handler) if gate is not None else handler
        self._poller.register(sock, zmq.POLLIN)

    def on_cut(self, sock: zmq.Socket[bytes], told: Told) -> None:
        """Call `told` with a client of a bound socket that is about to be cut; it returns whether it has logged it."""
        self._gates[sock].told = told

    def on_list_change(self, function: Callable[[Watch], None]) -> None:
        """Call `function` when the list of sites has changed, after the clients that are not on it were doomed."""
        self._list_changed.append(function)

    def on_loss(
        self,
        sock: zmq.Socket[bytes],
        lost: Callable[[Loss], None],
        server: ServerKey | None = None,
        *,
        found: Callable[[], None] | None = None,
    ) -> None:
        """Call `lost` when a connection that `sock` dialled breaks, after what came over it was delivered, or when its
        handshake fails; `found` when one stands. `server` as for `socket`. ZeroMQ dials again by itself until the
        socket is removed."""
        site = (server or self._security.own_server_key).site

        def seen(event: int, value: int) -> None:
            if sock not in self._handlers:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if found is not None:
                    found()
                return
            loss = curve.loss(event, value, site)
            if loss is not None:
                self._drain(sock)
                lost(loss)

        events = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | curve.HANDSHAKE_FAILED
        self._monitor(sock, events, seen)

    def on_client_loss(self, sock: zmq.Socket[bytes], lost: Callable[[int], None]) -> None:
        """Call `lost` when a client of a bound socket disconnects, with the descriptor its messages came from
        (`zmq.SRCFD`); some of them may not have been delivered yet. Before `start`."""
        self._gates[sock].lost = lost

    def connected(self, sock: zmq.Socket[bytes], descriptor: int) -> bool:
        """Whether a client's connection to a bound socket stands. From within the loop."""
        self._drain(self._monitors[sock])
        return descriptor in self._gates[sock].connected

    def _look_at_clients(self) -> None:
        changed = self._watch.changed()
        for gate in list(self._gates.values()):
            if changed:
                gate.list_changed(self._watch)
            gate.tick()
        for function in self._list_changed if changed else ():
            self._contain(partial(function, self._watch))

    def _monitor(self, sock: zmq.Socket[bytes], events: int, seen: Callable[[int, int], None]) -> None:
        """Deliver events of `sock`, with their values. Unbounded, lest ZeroMQ waits for a loop that has stopped."""
        address = f"inproc://monitor-{next(_monitor_numbers)}"
        sock.monitor(address, events)
        monitor = self.context.socket(zmq.PAIR)
        monitor.setsockopt(zmq.RCVHWM, 0)
        monitor.connect(address)
        self._monitors[sock] = monitor

        def parse(frames: list[zmq.Frame]) -> None:
            message = parse_monitor_message([frame.bytes for frame in frames])
            seen(message["event"], message["value"])

        self.add(monitor, parse)

    def _let_in_by(self, site_of: Callable[[str], str]) -> None:
        """Be the ZAP handler of this context (RFC 27)."""
        handler = self.context.socket(zmq.ROUTER)
        handler.bind(curve.ZAP_ENDPOINT)

        def asked(frames: list[zmq.Frame]) -> None:
            answer = curve.zap_answer([frame.bytes for frame in frames], site_of, self._refusals.warn)
            if answer is not None:
                handler.send_multipart(answer, zmq.NOBLOCK)

        self.add(handler, asked)

    def remove(self, sock: zmq.Socket[bytes]) -> None:
        """Stop polling `sock` and close it, with the linger it was given. From within the loop. Idempotent."""
        self._gates.pop(sock, None)
        monitor = self._monitors.pop(sock, None)
        if monitor is not None:
            sock.disable_monitor()
            self.remove(monitor)
        if self._handlers.pop(sock, None) is not None:
            self._poller.unregister(sock)
        sock.close()

    def every(self, interval_s: float, tick: Callable[[], None]) -> None:
        """Call `tick` about every `interval_s` seconds. Before `start`."""
        self._ticks.append([interval_s, self._clock.now_s() + interval_s, tick])

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` in the loop, soon. From any thread; after `stop` it is dropped."""
        with self._lock:
            if self._ended:
                return
            self._calls.append(function)
            try:
                self._wake_write.send(b"\0")
            except BlockingIOError:
                pass  # full of wake-ups already

    def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until everything handed to `call` so far has run; at once where the loop does not run."""
        if not self._thread.is_alive():
            return
        reached = threading.Event()
        self.call(reached.set)
        reached.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0, linger_ms: int = 0) -> None:
        """End the thread; messages under way get `linger_ms` to leave. Idempotent; not from within the loop."""
        self._linger_ms = max(self._linger_ms, linger_ms)
        self._stopping.set()
        self.call(lambda: None)
        if self._thread.ident is None:
            self._end()
        else:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._step()
        finally:
            self._end()

    def _end(self) -> None:
        self._run_calls()
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._calls.clear()
            self._wake_read.close()
            self._wake_write.close()
        for sock in list(self._monitors):
            sock.disable_monitor()
        for sock in list(self._handlers):
            sock.close(linger=self._linger_ms)
        self.context.destroy(linger=0)

    def _step(self) -> None:
        now = self._clock.now_s()
        due = min((tick[1] for tick in self._ticks), default=now + 1.0)
        events = dict(self._poller.poll(timeout=math.ceil(max(0.0, min(1.0, due - now)) * 1000)))
        if self._wake_read.fileno() in events:
            try:
                while self._wake_read.recv(4096):
                    pass
            except BlockingIOError:
                pass
        for sock in list(self._handlers):
            if sock in events:
                self._drain(sock)
        self._run_calls()
        now = self._clock.now_s()
        for tick in self._ticks:
            if now >= tick[1]:
                tick[1] = now + tick[0]
                self._contain(tick[2])

    def _drain(self, sock: zmq.Socket[bytes]) -> None:
        """Deliver what has arrived, up to one turn's worth."""
        for _ in range(MESSAGES_PER_TURN):
            handler = self._handlers.get(sock)
            if handler is None:
                return
            try:
                frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._contain(partial(handler, frames))

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            self._contain(self._calls.popleft())

    @staticmethod
    def _contain(function: Callable[[], object]) -> None:
        try:
            function()
        except Exception:
            logger.exception("prfaas: error in a control callback; going on")
