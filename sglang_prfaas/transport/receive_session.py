"""A prefill rank as a decode rank sees it."""

from __future__ import annotations

import secrets
import threading
from collections import Counter

import zmq

from sglang_prfaas.clock import Deadline
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.health import Health
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.mailbox import Mailbox
from sglang_prfaas.transport.memory import Indices
from sglang_prfaas.transport.messages import Hello, Message
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.receive_lane import Placement
from sglang_prfaas.transport.security import ServerKey


class Incoming(Placement):
    """A request that is received from a session."""

    def __init__(self, transfer: IncomingTransfer, indices: tuple[Indices, ...], session: PeerSession) -> None:
        super().__init__(transfer, indices)
        self.session = session


class PeerSession:
    """One prefill rank as decode sees it: connecting, up, or failed with a reason.

    `lock` guards `up`, `failure`, `incoming`, `rooms`, `connections` and `health`; `control`, `server`, `deadline`,
    `mailbox`, `unsent`, `hello`, `instance` and `connected` belong to the control loop."""

    def __init__(
        self,
        address: str,
        host: str,
        control_port: int,
        deadline: Deadline,
        config: TransportConfig,
        now_s: float,
        view: SessionView,
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
        self.connections: dict[int, Connection] = {}
        self.lock = threading.Lock()
        self.control: zmq.Socket[bytes] | None = None
        self.server = ServerKey("", b"")
        """What the prefill rank has to prove."""
        self.deadline = deadline
        self.unsent: list[Message] = []
        """What is to be said once the control socket exists."""
        self.hello: Hello | None = None
        self.instance = b""
        """Of the process that has let us in; empty before."""
        self.codec = SessionCodec()
        """Set before the data connections are dialled."""
        self.connected = False
        """Whether the control connection stands."""
        self.was_connected = False
        self.config = config
        """As it holds for the link, once the session is let in."""
        self.health = Health(config, config.connections, now_s)
        self.mailbox = Mailbox(now_s)
        self.ended = threading.Event()
        """Set once the session has failed."""

    def enter(self, room: int | None) -> bool:
        """Note that a request needs the session; takes the lock itself. Returns False where it has failed."""
        with self.lock:
            if self.failure:
                return False
            if room is not None:
                self.rooms[room] += 1
            return True

    def leave(self, room: int) -> None:
        """A request does not need the session any more; takes the lock itself."""
        with self.lock:
            self.rooms -= Counter((room,))

    def __str__(self) -> str:
        return f"prefill {authority(self.host, self.control_port)}"
