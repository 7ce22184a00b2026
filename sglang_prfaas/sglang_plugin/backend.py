"""The classes SGLang asks for by `KVClassType`, and the bootstrap directory in its form."""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.disaggregation.base.conn import BaseKVBootstrapServer
from sglang.srt.runtime_context import get_parallel

from sglang_prfaas import env
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.sglang_plugin import inner_rail
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager
from sglang_prfaas.sglang_plugin.receiver import PrfaasKVReceiver
from sglang_prfaas.sglang_plugin.sender import PrfaasKVSender
from sglang_prfaas.transport.addresses import resolve
from sglang_prfaas.transport.directory import DirectoryServer

logger = logging.getLogger(__name__)


class PrfaasKVBootstrapServer(BaseKVBootstrapServer):
    """The bootstrap directory of a prefill server. Raises LocalError if its port is taken, ConfigError if others could
    reach it without keys; either ends the server."""

    def __init__(self, host: str, port: int):
        self._server = DirectoryServer(
            resolve(host), port, remote_ranks=get_parallel().nnodes > 1, config=env.transport_from_env(os.environ)
        )
        logger.info("prfaas: bootstrap directory at %s", authority(host, port))

    def close(self) -> None:
        self._server.close()


def _classes() -> dict[str, Any]:
    sender: Any = PrfaasKVSender
    receiver: Any = PrfaasKVReceiver
    if env.transport_from_env(os.environ).inner_rail != inner_rail.NONE:
        from sglang_prfaas.sglang_plugin.inner_rail.receiver import RailedReceiver
        from sglang_prfaas.sglang_plugin.inner_rail.sender import RailedSender

        sender, receiver = RailedSender, RailedReceiver
    return {
        "manager": PrfaasKVManager,
        "sender": sender,
        "receiver": receiver,
        "bootstrap_server": PrfaasKVBootstrapServer,
    }


CLASSES = _classes()
