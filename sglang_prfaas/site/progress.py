"""Progress lines for people: which server is in which state, since when, and what its log says last."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.process import describe_exit, last_line

if TYPE_CHECKING:
    from sglang_prfaas.site.server import Server


class Progress:
    """Writes a line for every change, and one for every waiting server each `interval_s` seconds."""

    def __init__(
        self, label: str = "", write: Callable[[str], None] | None = None, *, interval_s: float = 10.0
    ) -> None:
        """label: name of the site. write: takes a line (None: stderr)."""
        self._label = f"[{label}] " if label else ""
        self._write = write or _to_stderr
        self.interval_s = interval_s

    def say(self, text: str) -> None:
        """One line of the site itself."""
        self._write(f"{self._label}{text}")

    def changed(self, server: Server) -> None:
        """A server entered a state."""
        text = f"{server.name}: {server.state}"
        if server.state is State.STARTING:
            text += f", log {server.log}"
        elif server.state is State.READY:
            text += f" after {server.age_s:.1f} s, pid {server.pid}"
        elif server.reason:
            text += f" ({server.reason})"
        if server.state in (State.RESTARTING, State.FAILED) and server.exit_code is not None:
            text += f", {describe_exit(server.exit_code)}"
        self.say(text)

    def waiting(self, servers: Iterable[Server]) -> None:
        """Servers that are not ready yet."""
        for server in servers:
            line = last_line(server.log)
            self.say(f"{server.name}: {server.state} for {server.age_s:.0f} s" + (f": {line}" if line else ""))


def silent(line: str) -> None:
    """A `write` that says nothing."""


def _to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # a file on a full disk: nobody can be told, and servers run on
        sys.stderr.write(line + "\n")  # one write: lines of several threads do not mix
        sys.stderr.flush()
