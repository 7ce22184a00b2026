"""Who may talk to this rank, and proof of it: CURVE keys for ZeroMQ, mutual TLS 1.3 for data connections.

`policy` decides whether keys are needed, `key_files` reads and checks a site's keys, `peers` the list of sites that are
let in, `curve`, `tls` and `web` (HTTP) put them to use, `make` makes them, `refusals` bounds what refused peers write
into the log.
"""

from sglang_prfaas.transport.security.policy import PLAIN, Security, load_security
from sglang_prfaas.transport.security.server_keys import ServerKey, ServerKeys
from sglang_prfaas.transport.security.web import SiteTls

__all__ = ["PLAIN", "Security", "ServerKey", "ServerKeys", "SiteTls", "load_security"]
