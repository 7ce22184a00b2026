"""Mooncake Transfer Engine over TCP: one batch of writes for a request; the addresses are known beforehand."""

from __future__ import annotations

import time

from benchmarks.transport.movers.base import Job, Mover, Offer
from benchmarks.transport.workload import RECEIVE_SEED, SEND_SEED, Memory, extents

ATTEMPTS = 3
"""It refuses some batches after a pause (kvcache-ai/Mooncake#4209); only the attempt that succeeds is timed."""
PAUSE_S = 0.2
ENVIRONMENT = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
    "MC_TCP_ADMISSION_TIMEOUT_MS": "120000",
    "MC_LOG_LEVEL": "ERROR",
}
"""With the default of 1,024 transfers it refuses the page lists here."""
LARGE_SLICES = {"MC_TCP_SLICE_SIZE": str(1 << 20)}
"""Instead of 64 KiB, for pages that are larger than a slice."""


def _engine(host: str, memory: Memory):  # type: ignore[no-untyped-def]
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
        raise RuntimeError(f"Mooncake could not be initialised on {host}")
    if engine.register_memory(memory.flat.ctypes.data, memory.flat.nbytes):
        raise RuntimeError("Mooncake could not register the memory")
    return engine


class Sender:
    layerwise = False

    def __init__(self, job: Job, memory: Memory) -> None:
        self._job = job
        self._memory = memory
        self._engine = _engine(job.place.send_host, memory)
        self._from, self._lengths = memory.places(SEND_SEED)
        self._to: list[int] = []
        self._peer = ""
        self.offer: Offer = {}

    def connect(self, offer: Offer) -> Offer:
        offsets, _ = extents(self._job.workload, RECEIVE_SEED)
        self._to = (offsets + offer["address"]).tolist()
        self._peer = offer["peer"]
        return {}

    def send(self, round_: int) -> tuple[float, float]:
        for _ in range(ATTEMPTS):
            began_s = time.monotonic()
            failed = self._serial() if self._job.workload.one_by_one else self._batch()
            if not failed:
                return began_s, time.monotonic()
            time.sleep(PAUSE_S)
        raise RuntimeError(f"Mooncake refused a request of {len(self._lengths)} items {ATTEMPTS} times")

    def _batch(self) -> int:
        status: int = self._engine.batch_transfer_sync_write(self._peer, self._from, self._to, self._lengths)
        return status

    def _serial(self) -> int:
        write, peer = self._engine.transfer_sync_write, self._peer
        return any(write(peer, *place) for place in zip(self._from, self._to, self._lengths, strict=True))

    def close(self) -> None:
        self._engine.unregister_memory(self._memory.flat.ctypes.data)


class Receiver:
    def __init__(self, job: Job, memory: Memory, offer: Offer) -> None:
        self._memory = memory
        self._engine = _engine(job.place.receive_host, memory)
        self.offer: Offer = {
            "peer": f"{job.place.receive_host}:{self._engine.get_rpc_port()}",
            "address": memory.flat.ctypes.data,
        }

    def receive(self, round_: int) -> float:
        return 0.0

    def close(self) -> None:
        self._engine.unregister_memory(self._memory.flat.ctypes.data)


MOVER = Mover(
    Sender,
    Receiver,
    modules=("mooncake.engine",),
    package="mooncake-transfer-engine-non-cuda",
    install="pip install mooncake-transfer-engine-non-cuda, and on Debian apt install libibverbs1",
    environment=ENVIRONMENT,
)
