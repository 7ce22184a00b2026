"""Prefixes fetched from another site's cache, over loopback: bytes per second and what a question takes.

    python -m benchmarks.prefix_fetch --json OUT [--rounds N] [--megabytes N]

`--megabytes` in objects of 64 KiB and of 1 MiB, on disk, served and fetched in one process: read, checksum, send,
receive, checksum. Without keys and with mutual TLS in turn, over the connections of the configuration's default. A
question has 2,048 names, as a prompt of 128K tokens in pages of 64. Exits 1 where bytes are wrong.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from sglang_prfaas.clock import Deadline, MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.objects import head_bytes, is_intact
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.transport.object_client import ObjectClient
from sglang_prfaas.transport.object_server import ObjectServer
from sglang_prfaas.transport.security import load_security, make

QUESTION_NAMES = 2048
DEADLINE_S = 600.0


class Row(msgspec.Struct, kw_only=True):
    """One case, over all rounds."""

    keys: bool
    object_bytes: int
    gigabytes_per_s: list[float] = []
    cpu_s_per_gigabyte: list[float] = []
    question_ms: list[float] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--megabytes", type=int, default=256, help="fetched each time (default %(default)s)")
    args = parser.parse_args()
    rows = [Row(keys=keys, object_bytes=size) for size in (64 << 10, 1 << 20) for keys in (False, True)]
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        make.make_keys(base / "keys", {"pd": (), "prfaas": ()}, now=datetime.datetime.now(datetime.UTC))
        store = DiskStore(base / "store", 4 << 30, Counters())
        for _ in range(args.rounds):
            for row in rows:
                measure(row, store, base / "keys", args.megabytes << 20)
        store.close()
    for row in rows:
        print(
            f"{'mutual TLS' if row.keys else 'no keys':10}  objects of {row.object_bytes >> 10:5} KiB  "
            f"{statistics.median(row.gigabytes_per_s):.2f} GB/s  "
            f"{statistics.median(row.cpu_s_per_gigabyte):.2f} CPU s per GB, both ends  "
            f"question {statistics.median(row.question_ms):.1f} ms"
        )
    print(f"medians of {args.rounds} interleaved rounds; load average {os.getloadavg()[0]:.1f}")
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")
    return 0


def measure(row: Row, store: DiskStore, keys: Path, total_bytes: int) -> None:
    namespace = f"n/{row.object_bytes}"
    names = tuple(f"{number:064x}" for number in range(total_bytes // row.object_bytes))
    payload = memoryview(random.Random(row.object_bytes).randbytes(row.object_bytes))
    for key in names:
        store.write(f"{namespace}/{key}", payload)
    groups = ((namespace, names),)

    def config(site: str) -> TransportConfig:
        return TransportConfig(keys_dir=str(keys / site) if row.keys else "")

    def take(name: str, frame: bytearray) -> None:
        head, view = head_bytes(name), memoryview(frame)
        if not is_intact(name, view[:head], view[head:]):
            sys.exit(f"{name} came corrupt")

    server = ObjectServer("127.0.0.1", 0, store, config("pd"), ("prfaas",))
    client = ObjectClient("pd", "127.0.0.1", server.port, config("prfaas"), load_security(config("prfaas")))
    deadline = Deadline(MonotonicClock(), DEADLINE_S)
    try:
        sizes = client.ask(groups, deadline)
        question = ((namespace, (names * QUESTION_NAMES)[:QUESTION_NAMES]),)
        began_s = time.perf_counter()
        client.ask(question, deadline)
        row.question_ms.append((time.perf_counter() - began_s) * 1e3)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        if not client.get(groups, sizes, take, deadline):
            sys.exit("an object is missing")
        gigabytes = sum(sizes) / 1e9
        row.gigabytes_per_s.append(gigabytes / (time.perf_counter() - began_s))
        row.cpu_s_per_gigabyte.append((time.process_time() - cpu_s) / gigabytes)
    finally:
        client.close()
        server.close()


if __name__ == "__main__":
    sys.exit(main())
