"""The mover at full rate for a while: memory, descriptors and threads over time. Exits 1 where they grow.

    python -m benchmarks.transport.soak [--minutes 30] [--connections 4] [--reset-every-s 10] [--json OUT]

Both ends in one process, over loopback; 55 MB a request, one after another.
Every `--reset-every-s` seconds (0: never) a data connection is cut. The bytes of every 50th request are compared.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from benchmarks.transport.movers.base import DEADLINE_S, until
from benchmarks.transport.workload import RECEIVE_SEED, SEND_SEED, WORKLOADS, Memory, digest
from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer import State

HOST = "127.0.0.1"
COMPARE_EVERY = 50
GROWTH_BYTES = 16 << 20
"""Resident memory may be so much above its median of the second tenth of the run, in the last tenth."""
GROWTH_COUNT = 4
"""Descriptors and threads: a connection that is just made anew has some."""


class Sample(Struct, frozen=True):
    """What the process held at a moment."""

    at_s: float
    gb_per_s: float
    rss_bytes: int
    descriptors: int
    threads: int
    reconnects: int


def held() -> tuple[int, int, int]:
    """Resident bytes, descriptors, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()


def grown(samples: list[Sample]) -> list[str]:
    """What has grown between the second tenth and the last tenth of a run."""
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    found = []
    for name, limit in (("rss_bytes", GROWTH_BYTES), ("descriptors", GROWTH_COUNT), ("threads", GROWTH_COUNT)):
        before = statistics.median(getattr(sample, name) for sample in early)
        after = statistics.median(getattr(sample, name) for sample in late)
        if after > before + limit:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}")
    return found


def soak(minutes: float, config: TransportConfig, reset_every_s: float, sample_s: float) -> list[Sample]:
    """Move requests until the time is up. Raises RuntimeError for one that fails or arrives wrong."""
    workload = WORKLOADS["quick"]
    source, target = Memory.private(workload, 1), Memory.private(workload, None)
    ours, theirs = source.slots(SEND_SEED), target.slots(RECEIVE_SEED)
    expected = digest(source, SEND_SEED)
    sender = SendMover(workload.layout, source.rank, config, MonotonicClock(), host=HOST)
    receiver = ReceiveMover(workload.layout, target.rank, config, MonotonicClock())
    sender.start()
    receiver.start()
    rng = random.Random(1)
    samples: list[Sample] = []
    try:
        session = receiver.session(f"{HOST}:0", HOST, sender.control_port)
        until(lambda: session.up or session.failure)
        began_s = sampled_s = reset_s = time.monotonic()
        room = moved = 0
        while (now_s := time.monotonic()) - began_s < minutes * 60:
            room += 1
            item = receiver.expect(session, room, theirs, 0)
            transfer = sender.transfer(room)
            until(lambda transfer=transfer: transfer.expected or not transfer.live)
            with transfer.lock:
                transfer.start(len(ours[0]))
            for component in (0, 1):
                sender.send(transfer, component, 0, ours[component])
            sender.finish(transfer)
            if reset_every_s and now_s - reset_s > reset_every_s:
                reset_s = now_s
                connections = list(session.connections.values())
                if connections:
                    rng.choice(connections).cut()
            for end in (item.transfer, transfer):
                if not end.wait(DEADLINE_S) or end.state is not State.DONE:
                    raise RuntimeError(f"request {room}: {end.state.value}: {end.reason}")
            if room % COMPARE_EVERY == 0 and digest(target, RECEIVE_SEED) != expected:
                raise RuntimeError(f"request {room} arrived wrong")
            sender.release(transfer)
            receiver.release(item)
            moved += workload.total_bytes
            if now_s - sampled_s >= sample_s:
                samples.append(
                    Sample(now_s - began_s, moved / 1e9 / (now_s - sampled_s), *held(), session.health.reconnects)
                )
                sampled_s, moved = now_s, 0
                print(
                    "{:7.0f} s {:6.2f} GB/s  rss {:5.0f} MB  {:3d} fds  {:3d} threads".format(
                        samples[-1].at_s, samples[-1].gb_per_s, samples[-1].rss_bytes / 1e6, *held()[1:]
                    ),
                    flush=True,
                )
    finally:
        receiver.close()
        sender.close()
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--congestion", default="", help="TCP congestion control (default: the system's)")
    parser.add_argument("--reset-every-s", type=float, default=10.0)
    parser.add_argument("--json", default="", metavar="OUT")
    args = parser.parse_args()
    config = TransportConfig(connections=args.connections, congestion_control=args.congestion)
    samples = soak(args.minutes, config, args.reset_every_s, max(0.5, args.minutes * 60 / 60))
    problems = grown(samples)
    if args.json:
        report = {"command": " ".join(sys.argv), "problems": problems, "samples": samples}
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    print(f"{samples[-1].reconnects} connections made anew; {'; '.join(problems) or 'nothing has grown'}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
