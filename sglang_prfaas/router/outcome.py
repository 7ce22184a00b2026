"""How one attempt at a request ended."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from sglang_prfaas.http import ResponseHead

Leg = Literal["prefill", "decode"]
Cause = Literal["connect", "stale", "closed", "timeout", "status", "error_event"]


class Failure(Struct, frozen=True):
    """Why an attempt ended before its first byte. `answer` is the upstream's own answer (head, payload), if any."""

    leg: Leg
    cause: Cause
    message: str
    status: int = 502
    answer: tuple[ResponseHead, bytes] | None = None

    @property
    def retryable(self) -> bool:
        """Faults of a server are; its verdict on the request (4xx) and a spent deadline are not."""
        return self.status >= 500 and self.cause != "timeout"


class Outcome(Struct):
    """How an attempt ended: `failure` before the first byte, or `broken` after it; neither when all is well."""

    failure: Failure | None = None
    broken: str = ""
