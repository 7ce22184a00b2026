"""The mover beside Mooncake, NIXL, plain sockets and iperf3 over TCP, in one interleaved run.

    python -m benchmarks.transport --json OUT [--quick] [--markdown OUT] [--rounds N] [--connections N]
                                   [--congestion cubic] [--links loopback,veth-1gbit,rtt-50ms]
                                   [--workloads block,dense,hybrid,hybrid-layers,small,small-serial]
                                   [--movers prfaas,mooncake,nixl,plain,iperf3,prfaas+tls,prfaas+256,
                                             mooncake+1mib,nixl+polled,prfaas+2,prfaas+bbr]

Prints a line for each arm and, at the end, which bars are reached. What cannot run here (a mover that is not installed,
a link without the rights for it) is named with its reason and left out. docs/benchmarks/transport.md says what is
measured, and is written by --markdown. Exits 1 where bytes differ or a mover failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import socket
import ssl
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

import sglang_prfaas
from benchmarks.transport import figures, iperf3, plan, report
from benchmarks.transport.compare import run_study
from benchmarks.transport.links import LINKS, opened, why_not
from benchmarks.transport.movers import MOVERS, why_absent
from benchmarks.transport.shared_memory import SharedMemory
from benchmarks.transport.workload import SEND_SEED, WORKLOADS, fill
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.link_tuning import set_congestion_control
from sglang_prfaas.transport.security import make
from sglang_prfaas.transport.vector import why_not_native

ALL_WORKLOADS = ("block", "dense", "hybrid", "hybrid-layers", "small", "small-serial")
SMALL_WORKLOADS = ("quick", "quick-layers")
"""Only where they are asked for."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--markdown", metavar="OUT", help="file for the results as a page of the documentation")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer arms on slow links")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every study (default: as planned)")
    parser.add_argument("--connections", type=int, default=TransportConfig().connections, help="default %(default)s")
    parser.add_argument("--congestion", default="cubic", help="TCP congestion control (default %(default)s)")
    for name, choices in (("links", LINKS), ("workloads", (*ALL_WORKLOADS, *SMALL_WORKLOADS)), ("movers", plan.ARMS)):
        everything = [choice for choice in choices if choice not in SMALL_WORKLOADS]
        parser.add_argument(
            f"--{name}",
            default=everything,
            type=lambda text, choices=choices: _some(text, choices),
            help=f"which of them (default {','.join(everything)})",
        )
    args = parser.parse_args()
    studies = list(plan.QUICK if args.quick else plan.FULL)
    studies += [plan.Study("loopback", name, 3, 1, plan.ARMS) for name in SMALL_WORKLOADS if name in args.workloads]
    studies = plan.chosen(studies, args.links, args.workloads, args.movers, args.rounds)
    if not studies:
        parser.error("nothing is left to measure; name more links, workloads or movers")
    with tempfile.TemporaryDirectory() as directory:
        return measure(args, studies, Path(directory))


def measure(args: argparse.Namespace, studies: Sequence[plan.Study], directory: Path) -> int:
    """Run the studies, write and print the result. directory: an empty one, for keys and logs."""
    make.make_keys(directory / "keys", {"bench": ()}, now=datetime.datetime.now(datetime.UTC))
    movers = {name.partition("+")[0] for study in studies for name in study.movers}
    absent = _absent(movers, {study.link for study in studies}) + _without_bbr(studies)
    for item in absent:
        print(f"{item['what']} is not measured: {item['reason']} {item['install']}", flush=True)
    missing = {item["what"] for item in absent}
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.transport", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": _versions(movers - missing),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "absent": absent,
        "not_native": why_not_native,
        "rows": [],
        "failed": [],
    }
    nbytes = max(WORKLOADS[study.workload].total_bytes for study in studies)
    memory = SharedMemory("senders", nbytes), SharedMemory("receivers", nbytes)
    fill(memory[0].flat, SEND_SEED)
    for name in dict.fromkeys(study.link for study in studies if study.link not in missing):
        with opened(name, args.congestion) as link:
            for study in (study for study in studies if study.link == name):
                names = [name for name in study.movers if not {name, name.partition("+")[0]} & missing]
                arms = [plan.arm_of(name, args.connections, str(directory / "keys" / "bench")) for name in names]
                workload = WORKLOADS[study.workload]
                outcomes = run_study(link, workload, arms, study.rounds, study.warmups, memory, directory)
                rows = figures.rows_of(link, workload, outcomes)
                print(report.heading(link.name, workload.name, workload.total_bytes, study.rounds))
                print("\n".join(report.line_of(row) for row in rows), flush=True)
                result["rows"] += rows
                result["failed"] += figures.failures(link.name, workload.name, outcomes)
    for shared in memory:
        shared.close()
    result["bars"] = figures.judged(result["rows"])
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if args.markdown:
        Path(args.markdown).write_text(report.markdown(result), encoding="utf-8")
    print("\n".join([*report.bar_lines(result["bars"]), *(f"FAILED: {failure}" for failure in result["failed"])]))
    return int(bool(result["failed"]))


def _absent(movers: set[str], links: set[str]) -> list[dict[str, str]]:
    """What cannot be measured here, why, and how to install it."""
    found = []
    for name in sorted(movers):
        reason = iperf3.why_absent() if name == "iperf3" else why_absent(MOVERS[name])
        install = iperf3.INSTALL if name == "iperf3" else MOVERS[name].install
        if reason:
            found.append({"what": name, "reason": reason, "install": install})
    for name in sorted(links):
        if reason := why_not(name):
            found.append({"what": name, "reason": reason, "install": ""})
    return found


def _without_bbr(studies: Sequence[plan.Study]) -> list[dict[str, str]]:
    if not any(plan.BBR in study.movers for study in studies):
        return []
    with socket.socket() as sock:
        try:
            set_congestion_control(sock, "bbr")
        except ConfigError as error:
            return [{"what": plan.BBR, "reason": str(error), "install": "modprobe tcp_bbr"}]
    return []


def _versions(movers: set[str]) -> dict[str, str]:
    versions = {
        "sglang-prfaas": sglang_prfaas.__version__,
        "python": platform.python_version(),
        "kernel": platform.release().partition("-")[0],
        "openssl": ssl.OPENSSL_VERSION,
    }
    for name in ("pyzmq", "numpy", "xxhash"):
        versions[name] = importlib.metadata.version(name)
    for name, mover in MOVERS.items():
        if mover.package and name in movers:
            versions[mover.package] = importlib.metadata.version(mover.package)
    if "iperf3" in movers:
        versions["iperf3"] = iperf3.version()
    return versions


def _some(text: str, choices: Sequence[str]) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(choices):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} unknown, there are {', '.join(choices)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
