"""How a prefill rank lets a decode rank in: `Hello` is answered with `Welcome`, and a session, or with `Refuse`."""

from __future__ import annotations

import logging
import secrets

import msgspec
import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.codec.session import RAW, CodecChoice, SessionCodec, obstacle
from sglang_prfaas.transport.handshake import refusal
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.link_tuning import LinkTuning
from sglang_prfaas.transport.memory import RankMemory
from sglang_prfaas.transport.messages import Hello, Refuse, Welcome, reason_text
from sglang_prfaas.transport.part_memory import prefill_view
from sglang_prfaas.transport.security import Security
from sglang_prfaas.transport.security.curve import KEY_PROPERTY
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.send_control import SendControl
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.send_table import SendTable

logger = logging.getLogger(__name__)


class Handshake:
    """Opens the sessions of a prefill rank with `layout` and `memory`. Belongs to the control loop."""

    def __init__(
        self,
        layout: Layout,
        memory: RankMemory,
        config: TransportConfig,
        clock: Clock,
        *,
        table: SendTable,
        control: SendControl,
        tuning: LinkTuning,
        codecs: CodecChoice,
        security: Security,
        refusals: RefusalLog,
        data_port: int,
        site: str,
    ) -> None:
        """data_port: that decode ranks are told to dial. site: of this rank, told to them."""
        self._layout = layout
        self._memory = memory
        self._config = config
        self._clock = clock
        self._table = table
        self._control = control
        self._tuning = tuning
        self._codecs = codecs
        self._security = security
        self._refusals = refusals
        self.data_port = data_port
        self._site = security.site or site
        self.instance = secrets.token_bytes(16)
        """Of this process, told to decode ranks."""

    def hello(self, identity: bytes, hello: Hello, frame: zmq.Frame) -> None:
        """A decode rank opens a session. `frame`: the message came in it."""
        site, curve_key = self._proof(frame)
        asked = hello
        tuned = self._tuning.for_asked(site or hello.site, hello.connections)
        hello = msgspec.structs.replace(hello, connections=tuned.connections)
        who = f"{hello.site}/{hello.server}"
        load = self._table.load(site)
        reason = refusal(
            self._layout,
            hello,
            sessions=load.sessions,
            connections=load.connections,
            proved_site=site,
            site_sessions=load.site_sessions,
        )
        if self._table.closing:
            reason = "the prefill server is stopping"
        if reason:
            self._refusals.warn(f"decode {who} refused: {reason}", logging.ERROR)
            self._control.reply(identity, Refuse(reason_text(reason)))
            return
        known = self._table.sessions.get(identity)
        if known is not None and known.asked == asked:
            self._control.reply(identity, self._welcome(known))  # the first one was lost
            return
        for old in self._table.replaced(identity, hello):
            restarted = old.hello.instance != hello.instance
            self._control.lose(
                old, "its process has restarted" if restarted else "the decode server opened a new session"
            )
        view = prefill_view(self._layout, self._memory, hello.layout)
        codec = self._codec(who, hello, site or hello.site, view.layout)
        session = SendSession(identity, hello, tuned, self._clock.now_s(), view, site, codec, curve_key, asked)
        self._table.add(session)
        logger.info("prfaas: decode %s connects with %d data connections", who, hello.connections)
        self._control.reply(identity, self._welcome(session))

    def _proof(self, frame: zmq.Frame) -> tuple[str, str]:
        """The site that the sender of a message has proved to be of, and its key; empty without keys."""
        if self._security.keys is None:
            return "", ""
        return str(frame.get("User-Id")), str(frame.get(KEY_PROPERTY))

    def _welcome(self, session: SendSession) -> Welcome:
        return Welcome(
            session.token,
            self.data_port,
            self.instance,
            session.codec.name,
            session.hello.connections,
            self._site,
        )

    def _codec(self, who: str, hello: Hello, site: str, layout: Layout) -> SessionCodec:
        """How full-attention KVCache goes to a decode rank: as its site is to get it, where both ends can."""
        wanted = self._codecs.of(site)
        if wanted == RAW:
            return SessionCodec()
        why = obstacle(wanted, layout, hello.codecs, min(self._config.chunk_bytes, hello.chunk_bytes))
        if why:
            logger.warning("prfaas: KVCache to decode %s is not encoded as %s: %s", who, wanted, why)
            return SessionCodec()
        logger.info("prfaas: full-attention KVCache to decode %s is encoded as %s", who, wanted)
        return SessionCodec(wanted, layout)
