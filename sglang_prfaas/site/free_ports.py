"""Ports before they are used: whether they are free, who has them, and picking one."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sglang_prfaas.config.ports import PortClaim
from sglang_prfaas.errors import LaunchError

_LISTEN = "0A"
_PICK_FROM = range(22000, 30000)
"""Below the range that the kernel hands out for outgoing connections (from 32768 on by default)."""


def require_free(claims: Iterable[PortClaim]) -> None:
    """Raises LaunchError that names every claimed port in use, and by whom where the system tells; and every address at
    which nothing can listen here, once."""
    problems: list[str] = []
    nowhere: dict[tuple[str, str], list[PortClaim]] = {}
    for claim in claims:
        for port in range(claim.first, claim.last + 1):
            problem = bind_problem(claim.host, port)
            if problem == "in use":
                problems.append(
                    f"port {port} ({claim.what}) is in use{user_of(port)}; "
                    f"end that process, or write another port with --{claim.key}"
                )
            elif problem:
                claims_there = nowhere.setdefault((claim.host, problem), [])
                if claim not in claims_there:
                    claims_there.append(claim)
    for (host, problem), there in nowhere.items():
        parts = ", ".join(claim.what for claim in there)
        problems.append(
            f"nothing can listen on {host} here ({problem}): wanted by {parts}. What a file describes runs on one "
            f"machine, the one where it is started; check the address, or start it there"
        )
    if problems:
        raise LaunchError("\n".join(problems))


def bind_problem(host: str, port: int) -> str:
    """Why nothing can listen on an address: `in use`, the system's message, or empty where something can."""
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        return f"{host!r} is no address of this machine ({error.strerror})"
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
    return ""


def user_of(port: int) -> str:
    """` by pid 123 (python -m ...)` for the process that listens on a port, empty where the system does not tell."""
    pid = listener_pid(port)
    if pid is None:
        return ""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return f" by pid {pid}"
    return f" by pid {pid} ({command[:100]})"


def listener_pid(port: int) -> int | None:
    """The process that listens on a TCP port, None where there is none or the system does not tell."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not inodes:
        return None
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):
            for descriptor in (entry / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(descriptor) in inodes:
                        return int(entry.name)
    return None


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[9])
    return found


class HeldPort:
    """A port kept for a child that will listen on it.

    Bound but not listening, with SO_REUSEADDR: a child that sets that option can bind it and listen, others that look
    for a free port without it pass on. This closes the gap between choosing a port and the child's use of it, which is
    many seconds for SGLang's `--nccl-port`.
    """

    def __init__(self, avoid: Iterable[int] = ()) -> None:
        """avoid: ports the configuration claims. Raises LaunchError where no port is free."""
        taken = set(avoid)
        for port in random.sample(_PICK_FROM, len(_PICK_FROM)):
            if port in taken:
                continue
            probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                probe.close()
                continue
            probe.close()
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                self._socket.bind(("0.0.0.0", port))
            except OSError:
                self._socket.close()
                continue
            self.port = port
            return
        raise LaunchError(f"no free port from {_PICK_FROM[0]} to {_PICK_FROM[-1]}; end processes that hold them")

    def release(self) -> None:
        """Give the port up; the child that listens on it keeps it."""
        self._socket.close()


def free_ports(count: int) -> list[int]:
    """Different ports that are free now, for whoever listens on them soon. Raises LaunchError."""
    held: list[HeldPort] = []
    try:
        for _ in range(count):
            held.append(HeldPort(avoid=[port.port for port in held]))
        return [port.port for port in held]
    finally:
        for port in held:
            port.release()
