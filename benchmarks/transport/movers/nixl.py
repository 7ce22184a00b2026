"""NIXL with UCX over TCP: one WRITE for a request; the descriptors are made beforehand.

Agents are made as SGLang's NIXL backend makes them (disaggregation/nixl/conn.py, 0.5.23), or `polled`: as is fastest
here, with nothing but the calling thread at the sender."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np

from benchmarks.transport.movers.base import DEADLINE_S, Job, Mover, Offer
from benchmarks.transport.workload import RECEIVE_SEED, SEND_SEED, Memory, extents

PREFILL_THREADS = 8
"""Of a prefill server's agent in SGLang; a decode server's has none."""
ENVIRONMENT = {"UCX_TLS": "tcp", "NIXL_LOG_LEVEL": "ERROR"}
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 1 << 14, 1 << 18
"""include/uapi/linux/sched.h, mount.h"""


def _list_own_devices() -> None:
    """Let /sys show this process the network devices of its namespace: UCX looks for them there. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        or libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None)
    ):
        code = ctypes.get_errno()
        raise OSError(code, f"a /sys of its own for NIXL: {os.strerror(code)}")


def _agent(name: str, job: Job, memory: Memory, *, sends: bool):  # type: ignore[no-untyped-def]
    if not job.place.loopback:
        _list_own_devices()
    os.environ["UCX_NET_DEVICES"] = job.place.device
    from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

    if job.arm.polled:
        config = nixl_agent_config(enable_prog_thread=not sends, backends=["UCX"])
    else:
        config = nixl_agent_config(
            num_threads=PREFILL_THREADS if sends else 0,
            sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            backends=["UCX"],
        )
    agent = nixl_agent(name, config)
    place = (memory.flat.ctypes.data, memory.flat.nbytes, 0, "")
    return agent, agent.register_memory(agent.get_reg_descs([place], "DRAM"))


class Sender:
    layerwise = False

    def __init__(self, job: Job, memory: Memory) -> None:
        self._job = job
        self._agent, self._registered = _agent("send", job, memory, sends=True)
        addresses, lengths = memory.places(SEND_SEED)
        self._from = self._lists(np.array(addresses, np.int64), np.array(lengths, np.int64))
        self.offer: Offer = {}

    def _lists(self, addresses, lengths) -> list:  # type: ignore[no-untyped-def,type-arg]
        """Descriptor lists, one for each operation."""
        rows = np.stack([addresses, lengths, np.zeros_like(lengths)], axis=1).astype(np.uint64)
        count = len(rows) if self._job.workload.one_by_one else 1
        return [self._agent.get_xfer_descs(part, "DRAM") for part in np.array_split(rows, count)]

    def connect(self, offer: Offer) -> Offer:
        self._peer = self._agent.add_remote_agent(offer["metadata"])
        offsets, lengths = extents(self._job.workload, RECEIVE_SEED)
        self._to = self._lists(offsets + offer["address"], lengths)
        self._agent.make_connection(self._peer)
        return {}

    def send(self, round_: int) -> tuple[float, float]:
        began_s = time.monotonic()
        for source, target in zip(self._from, self._to, strict=True):
            handle = self._agent.initialize_xfer("WRITE", source, target, self._peer)
            state = self._agent.transfer(handle)
            while state == "PROC":
                if not self._job.arm.polled:
                    time.sleep(0)  # as SGLang: NIXL's threads want the processor
                state = self._agent.check_xfer_state(handle)
                if time.monotonic() - began_s > DEADLINE_S:
                    raise RuntimeError(f"NIXL: not done after {DEADLINE_S:g} s")
            if state != "DONE":
                raise RuntimeError(f"NIXL: the transfer ended in state {state}")
            self._agent.release_xfer_handle(handle)
        return began_s, time.monotonic()

    def close(self) -> None:
        self._agent.deregister_memory(self._registered)


class Receiver:
    def __init__(self, job: Job, memory: Memory, offer: Offer) -> None:
        self._agent, self._registered = _agent("receive", job, memory, sends=False)
        self.offer: Offer = {"metadata": self._agent.get_agent_metadata(), "address": memory.flat.ctypes.data}

    def receive(self, round_: int) -> float:
        return 0.0

    def close(self) -> None:
        self._agent.deregister_memory(self._registered)


MOVER = Mover(
    Sender,
    Receiver,
    modules=("nixl._api",),
    package="nixl",
    install="pip install nixl (the extra `bench` of this project)",
    environment=ENVIRONMENT,
    spins=True,
)
