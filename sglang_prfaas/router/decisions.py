"""The last decisions with the figures that they rest on, for `GET /decisions`."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.scheduler import Decision, ServerView


class DecisionRecord(Struct):
    """One decision, and what became of it."""

    wall_s: float
    request_id: str
    input_tokens: int
    attempt: int
    decision: Decision
    held_s: float | None = None
    """How long it waited in the router for a prefill server; None where requests do not."""
    ttft_s: float | None = None
    """From the complete request to its first byte; None while there is none."""
    status: int | None = None
    """Of the answer; None while the attempt runs, or where another one followed."""


class RecentDecisions:
    """A ring of the last ones."""

    def __init__(self, kept: int) -> None:
        self._records: deque[DecisionRecord] = deque(maxlen=kept)

    def add(self, record: DecisionRecord) -> None:
        self._records.append(record)

    def render(self, newest: int | None = None) -> bytes:
        """JSON: the last ones, newest first."""
        records = list(self._records)[::-1][:newest]
        return msgspec.json.encode({"decisions": [_plain(record) for record in records]})


def _plain(record: DecisionRecord) -> dict[str, Any]:
    decision = record.decision
    return {
        "time_s": record.wall_s,
        "id": record.request_id,
        "input_tokens": record.input_tokens,
        "attempt": record.attempt,
        "route": decision.route,
        "reason": decision.reason,
        "reason_class": decision.reason_class,
        "t_tokens": decision.t_tokens,
        "uncached_tokens": decision.uncached_tokens,
        "prefill": _name(decision.prefill),
        "decode": _name(decision.decode),
        "figures": decision.figures,
        "held_s": record.held_s,
        "ttft_s": record.ttft_s,
        "status": record.status,
    }


def _name(server: ServerView | None) -> str | None:
    return f"{server.site}/{server.name}" if server is not None else None
