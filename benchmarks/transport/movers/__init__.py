"""The movers that are compared. iperf3 is none of them: it has ends of its own, see `benchmarks.transport.iperf3`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.transport.movers import mooncake, nixl, plain, prfaas
from benchmarks.transport.movers.base import Mover

MOVERS: dict[str, Mover] = {
    "prfaas": prfaas.MOVER,
    "mooncake": mooncake.MOVER,
    "nixl": nixl.MOVER,
    "plain": plain.MOVER,
}


def why_absent(mover: Mover) -> str:
    """Why it cannot run here, or an empty string. Tried in a process of its own: some break on import."""
    for module in mover.modules:
        tried = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120, check=False
        )
        if tried.returncode:
            lines = tried.stderr.strip().splitlines()
            return lines[-1] if lines else f"import {module} ended with status {tried.returncode}"
    return ""
