"""Whether a prefill rank lets a decode rank in, as a pure function."""

from __future__ import annotations

from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.messages import PROTOCOL_VERSION, Hello
from sglang_prfaas.transport.reshape import problems

MAX_SESSIONS = 1024
MAX_PEER_SESSIONS = 512
"""Of one site, as far as it is proved."""
MAX_CONNECTIONS = 4096
"""Data connections of all sessions together: each has a thread and one chunk's worth of memory."""


def refusal(
    layout: Layout, hello: Hello, *, sessions: int, connections: int, proved_site: str = "", site_sessions: int = 0
) -> str:
    """Why `hello` is refused by a prefill rank of `layout` that has so many sessions and data connections already;
    an empty string where it is not. Says both values of what differs. `proved_site`: whose key the sender has, with
    `site_sessions` of those sessions; empty without keys."""
    if hello.version != PROTOCOL_VERSION:
        return f"protocol version mismatch: prefill has {PROTOCOL_VERSION}, decode has {hello.version}"
    if proved_site and hello.site not in ("", proved_site):
        return f"it calls itself site {hello.site}, its key is of site {proved_site}"
    found = problems(layout, hello.layout)
    if found:
        return "layout mismatch: " + "; ".join(found)
    known = hello.page_tokens or hello.layout.page_tokens
    if known != layout.page_tokens:
        return f"page size in tokens: prefill has {layout.page_tokens}, decode knows it as {known} from its directory"
    if sessions >= MAX_SESSIONS:
        return f"limit reached: this prefill rank serves {sessions} decode ranks, {MAX_SESSIONS} are allowed"
    if proved_site and site_sessions >= MAX_PEER_SESSIONS:
        return f"limit reached: site {proved_site} has {site_sessions} sessions, {MAX_PEER_SESSIONS} are allowed"
    if connections + hello.connections > MAX_CONNECTIONS:
        return (
            f"limit reached: {hello.connections} more data connections asked for, this prefill rank has {connections}, "
            f"{MAX_CONNECTIONS} are allowed"
        )
    return ""
