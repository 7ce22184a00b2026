"""One child process: its own session, its own log, gone when the launcher is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_CHILD = str(Path(__file__).with_name("child.py"))
_TAIL_BYTES = 64 << 10


class ChildProcess:
    """A running command, leader of its own process group, whose output goes to a log file."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def spawn(cls, argv: Sequence[str], env: Mapping[str, str], log: Path) -> ChildProcess:
        """Start a command. env: its whole environment. Raises OSError where that is not possible.

        The child is killed by the kernel when the thread that called this ends, however it ends.
        """
        note(log, " ".join(argv))
        with open(log, "ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                _CHILD,
                str(os.getpid()),
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
            )
        return cls(process)

    async def wait(self) -> int:
        """Wait for the end of the command, end what is left of its group, and return the exit status (-N: signal N)."""
        code = await self._process.wait()
        self.kill()
        return code

    def terminate(self) -> None:
        """Ask the leader to end; SGLang then drains its requests and ends its children itself."""
        self.send(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nothing of the group is left

    def send(self, number: int) -> None:
        """Send a signal to the leader, if it still runs."""
        if self._process.returncode is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass  # ended, not reaped yet


def describe_exit(code: int) -> str:
    """An exit status in words: `exit status 1`, `signal SIGKILL`."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def tail(log: Path, lines: int = 40) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def last_line(log: Path, width: int = 110) -> str:
    """The last line of a log that says something, cut to a width in characters; empty where there is none."""
    for line in reversed(tail(log, 20).replace("\r", "\n").splitlines()):
        if line.strip() and not line.startswith("---"):
            return line.strip()[:width]
    return ""


def note(log: Path, text: str) -> None:
    """Add a line of our own to a log. A full disk costs the line, and nothing else."""
    with contextlib.suppress(OSError), open(log, "ab", buffering=0) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')} {text}\n".encode())


def rotate(log: Path) -> None:
    """Make room for a fresh log: the one before is kept with `.1`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
