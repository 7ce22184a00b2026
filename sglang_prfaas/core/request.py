"""A request as scheduling sees it: lengths and wishes, no text."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Route = Literal["local", "prfaas"]

# (site, server) of a server that failed for this request
ServerKey = tuple[str, str]


class RequestView(Struct, frozen=True, kw_only=True):
    """What a scheduling decision needs to know of one request. Lengths in tokens.

    A batch counts by its longest prompt: one prefill server takes all of it, and the threshold is about one prompt.
    """

    l_total: int
    exact: bool = True  # False: l_total is an estimate
    forced: Route | None = None  # the client named the route
    sites: frozenset[str] | None = None  # the only ones it may go to, None for all
    servers: frozenset[ServerKey] | None = None  # the only ones it may go to, None for all
    avoid: frozenset[ServerKey] = frozenset()  # servers that failed for this request before its first token
