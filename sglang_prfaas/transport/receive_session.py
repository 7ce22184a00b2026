"""A prefill rank as a decode rank sees it, and a request that is received from it."""

from __future__ import annotations

import secrets
import threading
from collections import Counter

import zmq

from sglang_prfaas.clock import Deadline
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.memory import Indices
from sglang_prfaas.transport.messages import Message
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.security import ServerKey
from sglang_prfaas.transport.session import IncomingTransfer


class Incoming:
    """A request's transfer and where its items belong."""

    def __init__(self, transfer: IncomingTransfer, indices: tuple[Indices, ...], session: PeerSession) -> None:
        self.transfer = transfer
        self.indices = indices
        self.session = session


class PeerSession:
    """One prefill rank as decode sees it: connecting, up, or failed with a reason.

    `lock` guards `up`, `failure`, `incoming`, `rooms` and `connections`; `control`, `server`, `deadline`,
    `unsent`, `dialled` and `seen_s` belong to the control loop."""

    def __init__(
        self, address: str, host: str, control_port: int, deadline: Deadline, now_s: float, view: SessionView
    ) -> None:
        self.address = address
        self.view = view
        self.host = host
        self.control_port = control_port
        self.identity = b"D" + secrets.token_bytes(15)  # ZeroMQ keeps identities that begin with a zero byte for itself
        self.up = False
        self.failure = ""
        self.incoming: dict[int, Incoming] = {}
        self.rooms: Counter[int] = Counter()
        """Requests that wait for this session or use it."""
        self.connections: list[Connection] = []
        self.lock = threading.Lock()
        self.control: zmq.Socket[bytes] | None = None
        self.server = ServerKey("", b"")
        """What the prefill rank has to prove."""
        self.deadline = deadline
        self.unsent: list[Message] = []
        """What is to be said once the control socket exists."""
        self.dialled = False
        self.seen_s = now_s

    def __str__(self) -> str:
        return f"prefill {self.host}:{self.control_port}"
