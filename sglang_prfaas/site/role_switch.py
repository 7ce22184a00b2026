"""Asking a server for another role: `POST /pd_role_switch`, and what its answer means."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.http import Client, UpstreamConnectError, UpstreamError, UpstreamStaleError
from sglang_prfaas.site.role_change import Outcome

_JSON = [(b"content-type", b"application/json")]


class _Answer(Struct):
    success: bool = False
    message: str = ""
    safe_to_restore: bool = False


def outcome_of(status: int, body: bytes) -> tuple[Outcome, str]:
    """What an answer of `/pd_role_switch` means (SGLang 0.5.23, disaggregation/role_switch.py), and its message.

    `safe_to_restore`: the server is as it was. Without it, it may be half of each role, and only a restart helps."""
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except msgspec.DecodeError:
        text = body[:200].decode(errors="replace")
        return (Outcome.REFUSED if status in (401, 403, 404, 405, 422) else Outcome.UNKNOWN), f"status {status}: {text}"
    if status == 200 and answer.success:
        return Outcome.DONE, answer.message
    message = answer.message or f"status {status}"
    if "not idle" in message:
        return Outcome.BUSY, message
    return (Outcome.REFUSED if answer.safe_to_restore else Outcome.BROKEN), message


async def switch_role(client: Client, url: str, role: str, limits: SiteLimits) -> tuple[Outcome, str]:
    """Ask the server at `url` for a role; takes up to `role_switch_timeout_s`."""
    body = {"new_role": role, "decode_cuda_graph_memory_gb": limits.decode_cuda_graph_memory_gb}
    try:
        answer = await client.upstream(url).fetch(
            "POST",
            "/pd_role_switch",
            headers=_JSON,
            body=msgspec.json.encode(body),
            timeout_s=limits.role_switch_timeout_s,
        )
    except UpstreamStaleError as error:
        return Outcome.BUSY, str(
            error
        )  # the idle connection had been closed; asked twice, a server says that it has the role
    except UpstreamConnectError as error:
        return Outcome.REFUSED, str(error)
    except UpstreamError as error:
        return Outcome.UNKNOWN, str(error)
    return outcome_of(answer.status, answer.body)
