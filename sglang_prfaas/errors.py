"""One tree of errors.

PrfaasError
├── ConfigError              a file or flag is wrong: says path, value and what to write instead
├── LaunchError              a process could not be started, or died
├── LocalError               our own fault or limit
│   ├── PoolFullError        no room for another item within the limits
│   └── DeadlineError        an operation ran past its deadline
└── PeerError                the other side's fault
    ├── ProtocolError        bytes that do not follow docs/protocol.md
    ├── ChecksumError        a chunk arrived corrupt
    └── PeerGoneError        the connection or the process behind it is gone
        ├── PeerClosedError  its system has closed or reset the connection
        └── PortRefusedError nothing listens where it did
"""

from __future__ import annotations


class PrfaasError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PrfaasError):
    """A configuration file or flag is wrong. `problems` holds one clear message each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class LaunchError(PrfaasError):
    """A process could not be started, or died; the message names its log."""


class LocalError(PrfaasError):
    """A fault or a limit on this side."""


class PoolFullError(LocalError):
    """A limit on memory, rooms or connections is reached."""


class DeadlineError(LocalError):
    """An operation ran past its deadline."""


class PeerError(PrfaasError):
    """A fault of the other side."""


class ProtocolError(PeerError):
    """The peer sent bytes that do not follow docs/protocol.md."""


class ChecksumError(PeerError):
    """A chunk's checksum does not match its bytes."""


class PeerGoneError(PeerError):
    """The peer's connection or process is gone."""


class PeerClosedError(PeerGoneError):
    """The peer's system has closed or reset a connection, rather than fallen silent."""


class PortRefusedError(PeerGoneError):
    """The peer's machine answers, and nothing listens on the port: its process has ended."""
