"""One study: arms side by side over one link with one workload, in turn, each bytewise verified."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from msgspec import Struct

from benchmarks.transport import iperf3
from benchmarks.transport.ends import answer, receiving_end, sending_end
from benchmarks.transport.links import Link, Within
from benchmarks.transport.movers import MOVERS
from benchmarks.transport.movers.base import Arm, Job, Place
from benchmarks.transport.shared_memory import SharedMemory
from benchmarks.transport.workload import SEND_SEED, Memory, Workload, digest

START_TIMEOUT_S = 90.0
ROUND_TIMEOUT_S = 120.0
END_TIMEOUT_S = 15.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Sample(Struct, frozen=True):
    """One request of one arm. wall_s: with its prefill. exposed_s: after its last layer was computed. machine_cpu_s: of
    everything on the machine meanwhile, interrupts too."""

    round_: int
    nbytes: int
    wall_s: float
    exposed_s: float
    send_cpu_s: float
    receive_cpu_s: float
    machine_cpu_s: float
    correct: bool

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / 1e9 / self.wall_s


class Outcome(Struct):
    """What became of an arm: its samples, what it said of its connections, why it ended early."""

    arm: Arm
    samples: list[Sample]
    about: dict[str, Any]
    failure: str = ""


def run_study(
    link: Link,
    workload: Workload,
    arms: Sequence[Arm],
    rounds: int,
    warmups: int,
    memory: tuple[SharedMemory, SharedMemory],
    logs: Path,
) -> list[Outcome]:
    """`warmups` rounds that do not count, then `rounds`; each goes through all arms, beginning with another one every
    time. An arm that fails says why in its outcome; the others go on. memory: the senders', filled, and the receivers'.
    logs: a directory for what movers write."""
    wanted = digest(Memory(workload, memory[0].flat), SEND_SEED)
    outcomes = [Outcome(arm, [], {}) for arm in arms]
    with ExitStack() as stack:
        running: list[tuple[Outcome, Callable[[int], Sample]]] = []
        starting: list[tuple[Outcome, _Pair]] = []
        for outcome in outcomes:
            if outcome.arm.mover == "iperf3":
                running.append((outcome, _iperf3(link, workload, outcome)))
            else:
                starting.append((outcome, stack.enter_context(_pair(link, workload, outcome.arm, memory, logs))))
        for outcome, pair in starting:
            try:
                outcome.about = pair.connect()
            except (RuntimeError, OSError) as error:
                outcome.failure = str(error)
                continue
            running.append((outcome, pair.round_of(wanted)))
        for number in range(warmups + rounds):
            shift = number % max(1, len(running))
            for outcome, once in running[shift:] + running[:shift]:
                if outcome.failure:
                    continue
                try:
                    sample = once(1 + number)
                except (RuntimeError, OSError) as error:
                    outcome.failure = str(error)
                    continue
                if number >= warmups or not sample.correct:
                    outcome.samples.append(sample)
    return outcomes


def _iperf3(link: Link, workload: Workload, outcome: Outcome) -> Callable[[int], Sample]:
    def once(round_: int) -> Sample:
        before = _machine_cpu_s()
        found = iperf3.measure(link, workload.total_bytes)
        outcome.about = {"congestion": found["congestion"]}
        return Sample(
            round_,
            found["bytes"],
            found["wall_s"],
            found["wall_s"],
            found["cpu_s"],
            0.0,
            _machine_cpu_s() - before,
            correct=True,
        )

    return once


class _Pair:
    """The two processes of an arm. While others have their turn, those that spin are stopped."""

    def __init__(self, job: Job, send: tuple[BaseProcess, Connection], receive: tuple[BaseProcess, Connection]) -> None:
        self._job = job
        (self._sender, self._send_pipe), (self._receiver, self._receive_pipe) = send, receive
        self._stops = MOVERS[job.arm.mover].spins

    def connect(self) -> dict[str, Any]:
        self._receive_pipe.send(answer(self._send_pipe, self._sender, START_TIMEOUT_S))
        self._send_pipe.send(answer(self._receive_pipe, self._receiver, START_TIMEOUT_S))
        about: dict[str, Any] = answer(self._send_pipe, self._sender, START_TIMEOUT_S)
        self.signal(signal.SIGSTOP)
        return about

    def signal(self, number: signal.Signals) -> None:
        if self._stops:
            for process in (self._sender, self._receiver):
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, number)

    def round_of(self, wanted: int) -> Callable[[int], Sample]:
        def once(round_: int) -> Sample:
            self.signal(signal.SIGCONT)
            try:
                return self._once(round_, wanted)
            finally:
                self.signal(signal.SIGSTOP)

        return once

    def _once(self, round_: int, wanted: int) -> Sample:
        self._receive_pipe.send(round_)
        answer(self._receive_pipe, self._receiver, ROUND_TIMEOUT_S)
        before = _machine_cpu_s()
        self._send_pipe.send(round_)
        sent = answer(self._send_pipe, self._sender, ROUND_TIMEOUT_S)
        machine_cpu_s = _machine_cpu_s() - before
        self._receive_pipe.send("sent")
        received = answer(self._receive_pipe, self._receiver, ROUND_TIMEOUT_S)
        wall_s = (received["ended_s"] or sent["ended_s"]) - sent["began_s"]
        return Sample(
            round_,
            self._job.workload.total_bytes,
            wall_s,
            wall_s - self._job.workload.prefill_s,
            sent["cpu_s"],
            received["cpu_s"],
            machine_cpu_s,
            correct=received["digest"] == wanted,
        )

    def close(self) -> None:
        self.signal(signal.SIGCONT)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for pipe in (self._receive_pipe, self._send_pipe):
            try:
                pipe.send(None)
            except OSError:
                pass  # it has ended
            pipe.close()
        for process in (self._receiver, self._sender):
            process.join(max(0.1, deadline_s - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def _pair(
    link: Link, workload: Workload, arm: Arm, memory: tuple[SharedMemory, SharedMemory], logs: Path
) -> Iterator[_Pair]:
    place = Place(link.send_host, link.receive_host, link.device, link.name == "loopback")
    job = Job(arm, workload, place)
    ends: list[tuple[BaseProcess, Connection]] = []
    for which, target, side, shared in (
        ("sender", sending_end, link.send_side, memory[0]),
        ("receiver", receiving_end, link.receive_side, memory[1]),
    ):
        log = str(logs / f"{link.name}-{workload.name}-{arm.name}-{which}.log")
        ends.append(_started(f"{arm.name} {which}", target, side, job, shared.path, log))
    pair = _Pair(job, ends[0], ends[1])
    try:
        yield pair
    finally:
        pair.close()


def _started(
    name: str, target: Callable[..., None], side: Within, job: Job, path: str, log: str
) -> tuple[BaseProcess, Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(job, path, theirs, log), name=name, daemon=True)
    side(process.start)
    theirs.close()
    return process, ours


def _machine_cpu_s() -> float:
    """All that the processors have done, idle time apart (proc_stat(5))."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, interrupts, soft = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupts + soft) / CLOCK_TICKS
