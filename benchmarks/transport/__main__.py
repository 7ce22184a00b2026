"""The mover beside plain sockets on loopback: GB/s and CPU seconds per GB, arms interleaved in one run.

    python -m benchmarks.transport --json OUT [--quick] [--rounds N] [--connections 1,4] [--congestion cubic]
                                   [--movers prfaas,prfaas+keys,plain] [--workloads hybrid,dense,block,small]
                                   [--idle 256]

Two processes, one per end. A round moves one request: a prefill rank's pages and states, which lie scattered in its
memory, to other places of a decode rank's. `prfaas` is the mover, with its checksums; `prfaas+keys` the same with
CURVE and mutual TLS 1.3, `tls` in the result the cipher; `plain` sends the same items one
by one with sendall and receives them in place with recv_into, over as many connections. GB are 1e9 bytes; the time is
the receiver's, from its request to its last byte; CPU seconds are those of both processes. Every round's bytes are
compared. Exits 1 where some differ.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import ssl
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy
import xxhash
import zmq

from benchmarks.transport.ends import receiving_end, sending_end
from benchmarks.transport.workload import WORKLOADS
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport import page_pipe
from sglang_prfaas.transport.security import make

MOVERS = ("prfaas", "prfaas+keys", "plain")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--quick", action="store_true", help="a smaller request and fewer rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every arm (default 7, quick 3)")
    parser.add_argument("--connections", default="1,4", help="numbers of connections to try (default %(default)s)")
    parser.add_argument("--congestion", default="", help="TCP congestion control (default: the system's)")
    parser.add_argument("--chunk-bytes", type=int, default=TransportConfig().chunk_bytes, help="default %(default)s")
    parser.add_argument(
        "--workloads", default="hybrid,dense,block,small,small-serial", help="which of them (default %(default)s)"
    )
    parser.add_argument("--idle", type=int, default=0, help="connections opened beside those used, in 64s (default 0)")
    parser.add_argument("--movers", default=",".join(MOVERS), help="which of them (default %(default)s)")
    args = parser.parse_args()
    movers = args.movers.split(",")
    if unknown := set(movers) - set(MOVERS):
        parser.error(f"--movers: {', '.join(sorted(unknown))} unknown, there are {', '.join(MOVERS)}")
    workloads = ["quick"] if args.quick else args.workloads.split(",")
    if unknown := set(workloads) - set(WORKLOADS):
        parser.error(f"--workloads: {', '.join(sorted(unknown))} unknown, there are {', '.join(WORKLOADS)}")
    with tempfile.TemporaryDirectory() as keys:
        return compare(args, movers, workloads, Path(keys))


def compare(args: argparse.Namespace, movers: list[str], workloads: list[str], keys: Path) -> int:
    """Run all arms of all workloads, write and print the result. keys: an empty directory for keys."""
    make.make_keys(keys, {"bench": ()}, now=datetime.datetime.now(datetime.UTC))
    numbers = [int(text) for text in args.connections.split(",")]
    rounds = args.rounds or (3 if args.quick else 7)
    configs = {
        (mover, n): TransportConfig(
            connections=n,
            congestion_control=args.congestion,
            chunk_bytes=args.chunk_bytes,
            keys_dir=str(keys / "bench") if mover == "prfaas+keys" else "",
        )
        for n in numbers
        for mover in movers
    }
    rows: list[dict[str, Any]] = []
    wrong = 0
    about: dict[str, str] = {}
    for name in workloads:
        found, about, bad = run(name, configs, rounds, args.idle)
        rows += found
        wrong += bad
        report(name, found, rounds)
    result = {
        "command": " ".join([sys.executable.rpartition("/")[2], "-m", "benchmarks.transport", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "pyzmq": zmq.__version__,
            "numpy": numpy.__version__,
            "xxhash": xxhash.VERSION,
            "openssl": ssl.OPENSSL_VERSION,
            "kernel": platform.release(),
        },
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "congestion_control": about["congestion"],
        "tls": about["tls"],
        "zero_copy": page_pipe.available(),
        "chunk_bytes": args.chunk_bytes,
        "idle_connections": args.idle,
        "rounds": rounds,
        "wrong": wrong,
        "rows": rows,
    }
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(f"congestion control {about['congestion']}, TLS {about['tls'] or 'not used'}, wrong: {wrong}")
    return int(wrong > 0)


def run(
    name: str, configs: dict[tuple[str, int], TransportConfig], rounds: int, idle: int
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """All arms of a workload, interleaved. Returns their rows, what is known of the connections, and how many requests
    arrived wrong."""
    arms = list(configs)
    spawn = multiprocessing.get_context("spawn")
    send_pipe, send_end = spawn.Pipe()
    receive_pipe, receive_end = spawn.Pipe()
    sender = spawn.Process(target=sending_end, args=(name, configs, send_end), daemon=True)
    sender.start()
    addresses = send_pipe.recv()
    receiver = spawn.Process(target=receiving_end, args=(name, configs, addresses, receive_end, idle), daemon=True)
    receiver.start()
    receive_pipe.recv()
    about = send_pipe.recv()
    samples: dict[tuple[str, int], list[dict[str, float]]] = {arm: [] for arm in arms}
    workload = WORKLOADS[name]
    gigabytes = workload.total_bytes / 1e9
    wrong = 0
    for round_ in range(rounds + 1):  # the first warms up
        for index, (mover, connections) in enumerate(arms):
            command = (mover, connections, 1 + round_ * len(arms) + index)
            receive_pipe.send(command)
            send_pipe.send(command)
            received, sent = receive_pipe.recv(), send_pipe.recv()
            wrong += received["digest"] != addresses["digest"]
            if round_:
                samples[mover, connections].append(
                    {
                        "gb_per_s": gigabytes / received["wall_s"],
                        "pages_per_s": workload.layers * workload.pages / received["wall_s"],
                        "cpu_s_per_gb": (received["cpu_s"] + sent["cpu_s"]) / gigabytes,
                        "send_cpu_s_per_gb": sent["cpu_s"] / gigabytes,
                        "receive_cpu_s_per_gb": received["cpu_s"] / gigabytes,
                    }
                )
    for pipe, process in ((receive_pipe, receiver), (send_pipe, sender)):
        pipe.send(None)
        process.join(30.0)
    return [row(name, mover, n, samples[mover, n]) for mover, n in arms], about, wrong


def report(name: str, rows: list[dict[str, Any]], rounds: int) -> None:
    """Print the rows of a workload."""
    print(f"{name}: {WORKLOADS[name].total_bytes / 1e9:.3f} GB per request, {rounds} rounds")
    for r in rows:
        print(
            f"{r['mover']:>11} x{r['connections']:<2} {r['gb_per_s']:6.2f} GB/s ({r['gb_per_s_min']:.2f} to "
            f"{r['gb_per_s_max']:.2f})  {r['cpu_s_per_gb']:5.3f} CPU s/GB (send {r['send_cpu_s_per_gb']:.3f}, receive "
            f"{r['receive_cpu_s_per_gb']:.3f})  {r['pages_per_s']:7.0f} pages/s",
            flush=True,
        )


def row(workload: str, mover: str, connections: int, samples: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of an arm, and the spread of its speed."""
    speeds = [sample["gb_per_s"] for sample in samples]
    medians = {key: round(statistics.median(sample[key] for sample in samples), 4) for key in samples[0]}
    return {
        "mover": mover,
        "workload": workload,
        "link": "loopback",
        "connections": connections,
        **medians,
        "gb_per_s_min": round(min(speeds), 4),
        "gb_per_s_max": round(max(speeds), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
