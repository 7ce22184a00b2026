"""Commands of operators over HTTP: `POST /control/<server>/<drain|undrain|role|limits>`, with a JSON object or none.

    {"deadline_s": 300}                        for drain and role: how long requests under way may take
    {"role": "decode"}                         for role
    {"max_requests": 8}                        for limits; 0: any number

Only from this machine, and at a pd site only: the agent of a PrfaaS site is reached over a WAN. `launch control` takes
the authenticated way instead.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable
from typing import Literal

import msgspec
from msgspec import Struct

from sglang_prfaas.http import HttpError, Request
from sglang_prfaas.monitor.reports import Action, Answer, Command, Drain, SetLimits, SwitchRole, Undrain

PREFIX = "/control/"
DEADLINE_S = 300.0

Reply = Callable[[Answer], None]


class _Body(Struct, forbid_unknown_fields=True):
    deadline_s: float = DEADLINE_S
    role: Literal["prefill", "decode"] | None = None
    max_requests: int | None = None


def command_of(request: Request, site_role: str) -> Command:
    """The command that a request stands for. Raises HttpError."""
    if site_role == "prfaas" or not _from_here(request.peer):
        raise HttpError(
            403,
            "Commands are taken from this machine only, and not by a PrfaaS site's HTTP port; use `launch control`.",
            code="not_allowed",
        )
    if request.method != "POST":
        raise HttpError(405, f"{request.path} answers POST only.", code="method_not_allowed")
    server, _, name = request.path.removeprefix(PREFIX).partition("/")
    try:
        body = msgspec.json.decode(request.body or b"{}", type=_Body)
    except msgspec.DecodeError as error:
        raise HttpError(400, f"The body is not understood: {error}") from None
    action: Action
    if name == "drain":
        action = Drain(server)
    elif name == "undrain":
        action = Undrain(server)
    elif name == "role" and body.role is not None:
        action = SwitchRole(server, body.role)
    elif name == "limits" and body.max_requests is not None:
        action = SetLimits(server, body.max_requests)
    elif name in ("role", "limits"):
        raise HttpError(400, f"{name} needs {'role' if name == 'role' else 'max_requests'} in a JSON object.")
    else:
        raise HttpError(404, f"No such command: {name}; there are drain, undrain, role and limits.", code="not_found")
    return Command(id=secrets.token_hex(8), deadline_s=body.deadline_s, action=action)


def _from_here(peer: str) -> bool:
    """Whether a peer (`address:port`, `[address]:port`) is on this machine."""
    try:
        address = ipaddress.ip_address(peer.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
