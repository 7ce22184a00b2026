"""iperf3 on the same links: what the kernel moves without page lists, framing or checks."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from typing import Any

import msgspec

from benchmarks.transport.links import Link

INSTALL = "apt install iperf3"
STREAMS = 4
TIMEOUT_S = 120
LISTENING = "Server listening"


def why_absent() -> str:
    return "" if shutil.which("iperf3") else "no iperf3 on PATH"


def version() -> str:
    said = subprocess.run(["iperf3", "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    found = re.search(r"iperf (\S+)", said)
    return found.group(1) if found else said.splitlines()[0]


def measure(link: Link, nbytes: int) -> dict[str, Any]:
    """Move so many bytes over four streams. Returns `wall_s` (until the receiver has them), `cpu_s` and `bytes` of both
    processes. Raises RuntimeError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    server = link.receive_side(
        lambda: subprocess.Popen(
            ["iperf3", "-s", "-1", "--forceflush", "-B", link.receive_host], stdout=subprocess.PIPE, text=True
        )
    )
    try:
        for line in server.stdout:
            if LISTENING in line:
                break
        command = ["iperf3", "-c", link.receive_host, "-J", "-P", str(STREAMS), "-n", str(nbytes)]
        done = link.send_side(
            lambda: subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        )
        server.communicate(timeout=TIMEOUT_S)
    finally:
        server.kill()
        server.wait()
    found = msgspec.json.decode(done.stdout or b"{}")
    if done.returncode or "error" in found:
        raise RuntimeError(f"iperf3: {found.get('error') or done.stderr.strip() or f'status {done.returncode}'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    received = found["end"]["sum_received"]
    return {
        "wall_s": received["bytes"] * 8 / received["bits_per_second"],
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "bytes": received["bytes"],
        "congestion": found["end"].get("sender_tcp_congestion", ""),
    }
