"""CPU cost and added latency of routers in PD mode, ours beside its peers, in one interleaved run.

    python -m benchmarks.router --json OUT [--peers-python PYTHON] [--requests N] [--rounds N]

`PYTHON` is an interpreter that has sglang-router and smg; without it only ours is measured. All traffic is loopback.
CPU seconds are those of the router's processes; the fake workers and the load run in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.router import contenders as routers
from benchmarks.router.load import run_load
from sglang_prfaas.site.free_ports import free_ports

_CLIENTS = 32


def measure(contender: routers.Contender, requests: int, *, stream: bool) -> dict[str, float]:
    """One round of 32 clients."""
    cpu_s = contender.cpu_s()
    wall_s, _ = run_load(contender.port, requests=requests, clients=_CLIENTS, stream=stream)
    used_s = contender.cpu_s() - cpu_s
    return {"cpu_s_per_1000": used_s / requests * 1000, "requests_per_s": requests / wall_s}


def first_byte_ms(port: int, requests: int) -> float:
    """Median milliseconds to the first body byte, one client, while prefill's own answer takes 10 ms."""
    _, seconds = run_load(port, requests=requests, clients=1, stream=True, slow_prefill=True)
    return statistics.median(seconds) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--peers-python", default="", help="interpreter with sglang-router and smg")
    parser.add_argument("--requests", type=int, default=4000, help="requests per round, not streamed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the median counts")
    args = parser.parse_args()

    results: dict[str, Any] = {}
    started: list[routers.Contender] = []
    prefill_port, decode_port, own_port, live_port, *peer_ports = free_ports(9)
    workers = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.router.workers", str(prefill_port), str(decode_port)], stdout=subprocess.PIPE
    )
    with tempfile.TemporaryDirectory() as temporary:
        try:
            assert workers.stdout is not None
            workers.stdout.readline()
            started.append(routers.start_ours(Path(temporary), prefill_port, decode_port, own_port))
            started.append(routers.start_ours(Path(temporary), prefill_port, decode_port, live_port, live=True))
            if args.peers_python:
                started += routers.start_peers(
                    args.peers_python, Path(temporary), prefill_port, decode_port, peer_ports
                )
            for contender in started:  # warm up: connections, caches
                run_load(contender.port, requests=500, clients=_CLIENTS, stream=False)
                run_load(contender.port, requests=100, clients=_CLIENTS, stream=True)
                results[contender.name] = {"version": contender.version, "plain": [], "stream": [], "first_byte_ms": []}
            direct_ms: list[float] = []
            for _ in range(args.rounds):
                for contender in started:
                    found = results[contender.name]
                    found["plain"].append(measure(contender, args.requests, stream=False))
                    found["stream"].append(measure(contender, args.requests // 4, stream=True))
                    found["first_byte_ms"].append(first_byte_ms(contender.port, 50))
                direct_ms.append(first_byte_ms(decode_port, 50))
        finally:
            for contender in started:
                routers.stop(contender.process)
            routers.stop(workers)

    rows = {name: summary(found) for name, found in results.items()}
    report = {
        "command": " ".join(["python -m benchmarks.router", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "clients": _CLIENTS,
        "requests": args.requests,
        "rounds": args.rounds,
        "direct_first_byte_ms": statistics.median(direct_ms),
        "median": rows,
        "rounds_by_router": results,
    }
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    print("| router | CPU s / 1,000, not streamed | CPU s / 1,000, 64 events | first byte, ms |\n|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} {results[name]['version']} | {row['plain_cpu_s']:.3f} | {row['stream_cpu_s']:.3f} "
            f"| {row['first_byte_ms']:.2f} |"
        )
    print(f"| direct, no router | | | {report['direct_first_byte_ms']:.2f} |")
    return 0


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Medians over the rounds."""
    return {
        "plain_cpu_s": statistics.median(r["cpu_s_per_1000"] for r in found["plain"]),
        "plain_requests_per_s": statistics.median(r["requests_per_s"] for r in found["plain"]),
        "stream_cpu_s": statistics.median(r["cpu_s_per_1000"] for r in found["stream"]),
        "stream_requests_per_s": statistics.median(r["requests_per_s"] for r in found["stream"]),
        "first_byte_ms": statistics.median(found["first_byte_ms"]),
    }


if __name__ == "__main__":
    sys.exit(main())
