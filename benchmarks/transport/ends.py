"""The two processes of an arm: each makes one end of its mover, and takes part in the rounds it is told of."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.transport.movers import MOVERS
from benchmarks.transport.movers.base import Job
from benchmarks.transport.shared_memory import attach
from benchmarks.transport.workload import RECEIVE_SEED, Memory, digest

FAILED = "failed"
"""Key of an answer that says why there is no other."""
REASON_CHARACTERS = 300
PR_SET_PDEATHSIG = 1
"""include/uapi/linux/prctl.h"""


def sending_end(job: Job, path: str, pipe: Connection, log: str) -> None:
    """Process of a sender. Says its offer, takes the receiver's, says what it connected; then a number begins a round,
    answered with its times and this process's CPU seconds, None ends it."""

    def run() -> None:
        memory = Memory(job.workload, attach(path, job.workload.total_bytes))
        end = MOVERS[job.arm.mover].sender(job, memory)
        pipe.send(end.offer)
        pipe.send(end.connect(pipe.recv()))
        while (round_ := pipe.recv()) is not None:
            prefill_s = 0.0 if end.layerwise else job.workload.prefill_s
            time.sleep(prefill_s)
            cpu_s = time.process_time()
            began_s, ended_s = end.send(round_)
            began_s -= prefill_s
            pipe.send({"began_s": began_s, "ended_s": ended_s, "cpu_s": time.process_time() - cpu_s})
        end.close()

    _guarded(job, run, pipe, log)


def receiving_end(job: Job, path: str, pipe: Connection, log: str) -> None:
    """Process of a receiver. Takes the sender's offer and says its own; then a number begins a round, answered at once
    with None, and, after the word that the sender has ended, with its times, CPU seconds and the digest of the bytes;
    None ends it."""

    def run() -> None:
        memory = Memory(job.workload, attach(path, job.workload.total_bytes))
        end = MOVERS[job.arm.mover].receiver(job, memory, pipe.recv())
        pipe.send(end.offer)
        while (round_ := pipe.recv()) is not None:
            memory.clear()
            cpu_s = time.process_time()
            pipe.send(None)
            ended_s = end.receive(round_)
            pipe.recv()
            cpu_s = time.process_time() - cpu_s
            pipe.send({"ended_s": ended_s, "cpu_s": cpu_s, "digest": digest(memory, RECEIVE_SEED)})
        end.close()

    _guarded(job, run, pipe, log)


def _guarded(job: Job, run: Callable[[], None], pipe: Connection, log: str) -> None:
    """What movers write goes to a log; an error is the answer that the other side of the pipe waits for. The process
    ends without the destructors of libraries, which may wait for a peer that is gone. It also ends when the run does,
    however that ends, and although it may be stopped then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(MOVERS[job.arm.mover].environment | job.arm.environment)
    status = 0
    try:
        run()
    except (EOFError, BrokenPipeError):
        status = 1
    except Exception as error:  # noqa: BLE001 - the other side of the pipe says it
        traceback.print_exc()
        status = 1
        pipe.send({FAILED: f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]})
    os._exit(status)


def answer(pipe: Connection, process: Any, timeout_s: float) -> Any:
    """What an end says next. Raises RuntimeError where it failed, ended, or says nothing."""
    if not pipe.poll(timeout_s):
        raise RuntimeError(f"no answer from {process.name} within {timeout_s:g} s")
    try:
        said = pipe.recv()
    except EOFError:
        process.join(5.0)
        raise RuntimeError(f"{process.name} ended with status {process.exitcode}") from None
    if isinstance(said, dict) and FAILED in said:
        raise RuntimeError(f"{process.name}: {said[FAILED]}")
    return said
