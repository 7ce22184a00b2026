"""The mover of this project, with its checksums; with keys, CURVE and mutual TLS too."""

from __future__ import annotations

import ssl
import time

import msgspec

from benchmarks.transport.movers.base import DEADLINE_S, Job, Mover, Offer, until
from benchmarks.transport.movers.plain import congestion_of
from benchmarks.transport.workload import RECEIVE_SEED, SEND_SEED, Memory
from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer import State

MAX_CONNECTIONS = 64
"""Of one session."""
TLS_RECORD = "{1} {0}"


def config_of(job: Job) -> TransportConfig:
    """The defaults, but for what the arm is about."""
    secure = bool(job.arm.keys)
    return TransportConfig(
        connections=job.arm.connections,
        keys_dir=job.arm.keys,
        congestion_control=job.arm.congestion,
        security="auto" if secure or job.place.loopback else "off",
    )


class Sender:
    layerwise = True

    def __init__(self, job: Job, memory: Memory) -> None:
        self._memory = memory
        self._slots = memory.slots(SEND_SEED)
        self._mover = SendMover(
            job.workload.layout, memory.rank, config_of(job), MonotonicClock(), host=job.place.send_host
        )
        self._mover.start()
        self.offer: Offer = {"control_port": self._mover.control_port}

    def connect(self, offer: Offer) -> Offer:
        sessions = self._mover._table.sessions
        until(lambda: sessions and all(len(s.links) == s.hello.connections for s in list(sessions.values())))
        links = [link.connection.sock for session in sessions.values() for link in session.links.values()]
        ciphers = {TLS_RECORD.format(*sock.cipher()) for sock in links if isinstance(sock, ssl.SSLSocket)}
        return {"congestion": congestion_of(links[0]), "tls": ", ".join(sorted(ciphers)), "open": len(links)}

    def send(self, round_: int) -> tuple[float, float]:
        mover, slots, workload = self._mover, self._slots, self._memory.workload
        transfer = mover.transfer(round_)
        until(lambda: transfer.expected)
        began_s = time.monotonic()
        with transfer.lock:
            transfer.start(len(slots[0]))
        if workload.prefill_s:
            order = workload.order
            for computed, (component, buffer) in enumerate(order, 1):
                time.sleep(max(0.0, began_s + workload.prefill_s * computed / len(order) - time.monotonic()))
                mover.send(transfer, component, 0, slots[component], buffers=[buffer])
        elif workload.one_by_one:
            for page in range(len(slots[0])):
                mover.send(transfer, 0, page, slots[0][page : page + 1], awaited=True)
                transfer.wait_acknowledged((page + 1) * workload.page_bytes, DEADLINE_S)
        else:
            mover.send(transfer, 0, 0, slots[0])
        if not workload.prefill_s:
            mover.send(transfer, 1, 0, slots[1])
        mover.finish(transfer)
        transfer.wait(DEADLINE_S)
        ended_s = time.monotonic()
        if transfer.state is not State.DONE:
            raise RuntimeError(transfer.reason or f"not done after {DEADLINE_S:g} s")
        mover.release(transfer)
        return began_s, ended_s

    def close(self) -> None:
        self._mover.close()


class Receiver:
    def __init__(self, job: Job, memory: Memory, offer: Offer) -> None:
        self._slots = memory.slots(RECEIVE_SEED)
        config = config_of(job)
        self._mover, self._session = _connected(job, memory, config, offer, "bench")
        idle = msgspec.structs.replace(config, connections=MAX_CONNECTIONS)
        self._idle = [
            _connected(job, memory, idle, offer, f"idle-{index}")[0] for index in range(job.arm.idle // MAX_CONNECTIONS)
        ]
        self.offer: Offer = {}

    def receive(self, round_: int) -> float:
        item = self._mover.expect(self._session, round_, self._slots, 0)
        item.transfer.wait(DEADLINE_S)
        if item.transfer.state is not State.DONE:
            raise RuntimeError(item.transfer.reason or f"not done after {DEADLINE_S:g} s")
        self._mover.release(item)
        return item.transfer.last_byte_s

    def close(self) -> None:
        for mover in (self._mover, *self._idle):
            mover.close()


def _connected(job: Job, memory: Memory, config: TransportConfig, offer: Offer, server: str):  # type: ignore[no-untyped-def]
    """A decode rank with an open session. Raises RuntimeError."""
    mover = ReceiveMover(job.workload.layout, memory.rank, config, MonotonicClock(), server=server)
    mover.start()
    session = mover.session(f"{job.place.send_host}:0", job.place.send_host, offer["control_port"])
    until(lambda: session.up or session.failure)
    if session.failure:
        raise RuntimeError(session.failure)
    return mover, session


MOVER = Mover(Sender, Receiver)
