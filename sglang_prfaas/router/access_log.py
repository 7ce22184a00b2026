"""One JSON line per request: what was decided, why, and how long it took. Lines are gathered and written together."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO

import msgspec

from sglang_prfaas.http import Request
from sglang_prfaas.router.decisions import DecisionRecord
from sglang_prfaas.scheduler import Decision

log = logging.getLogger(__name__)

_FLUSH_S = 0.2
_FLUSH_LINES = 256


class AccessRecord:
    """What is known of one request; filled in as it is served. Times in seconds of the loop's clock."""

    __slots__ = (
        "attempts",
        "bytes_out",
        "decision",
        "endpoint",
        "error",
        "first_byte_s",
        "held_s",
        "input_tokens",
        "recent",
        "request",
        "request_id",
        "room",
        "start_s",
        "status",
        "stream",
    )

    def __init__(self, request: Request, request_id: str, endpoint: str, start_s: float) -> None:
        self.request = request
        self.request_id = request_id
        self.endpoint = endpoint
        self.start_s = start_s
        self.decision: Decision | None = None
        self.recent: DecisionRecord | None = None
        self.first_byte_s: float | None = None
        self.held_s: float | None = None
        self.input_tokens = 0
        self.room = 0
        self.status = 500
        self.stream = False
        self.bytes_out = 0
        self.error = ""
        self.attempts: list[str] = []

    @property
    def route(self) -> str:
        return (self.decision.route if self.decision else None) or "none"

    @property
    def reason_class(self) -> str:
        return self.decision.reason_class if self.decision else "refused"


class AccessLog:
    """Writes records to a text stream (standard error by default) in batches.

    A stream that cannot be written, such as a file on a full disk, costs the lines and no request."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._loop = asyncio.get_running_loop()
        self._records: list[tuple[AccessRecord, float, float]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.lost_lines = 0

    def write(self, record: AccessRecord, end_s: float, wall_s: float) -> None:
        """Take a finished request; `wall_s` is the time of day of its end."""
        self._records.append((record, end_s, wall_s))
        if len(self._records) >= _FLUSH_LINES:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what was gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        records, self._records = self._records, []
        if not records:
            return
        try:
            self._stream.write("".join([_line(*item) for item in records]))
            self._stream.flush()
        except OSError as error:
            if not self.lost_lines:
                log.error("the request log cannot be written, requests go on: %s", error)
            self.lost_lines += len(records)


@lru_cache(maxsize=4)
def _second(wall_s: int) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _line(record: AccessRecord, end_s: float, wall_s: float) -> str:
    decision = record.decision
    fields: dict[str, object] = {
        "time": f"{_second(int(wall_s))}.{int(wall_s % 1 * 1000):03d}Z",
        "id": record.request_id,
        "peer": record.request.peer,
        "path": record.request.path,
        "status": record.status,
        "stream": record.stream,
        "input_tokens": record.input_tokens,
        "route": record.route,
        "reason": decision.reason if decision else "",
    }
    if decision is not None and decision.prefill is not None and decision.decode is not None:
        fields["uncached_tokens"] = decision.uncached_tokens
        fields["prefill"] = f"{decision.prefill.site}/{decision.prefill.name}"
        fields["decode"] = f"{decision.decode.site}/{decision.decode.name}"
        fields["room"] = record.room
    if decision is not None and (figures := decision.figures) is not None:
        far = decision.route == "prfaas"
        expected_s = figures.prfaas_ttft_s if far else figures.local_ttft_s
        fields["t_tokens"] = decision.t_tokens
        fields["expected_ttft_ms"] = round(expected_s * 1e3, 3)
        fields["wait_ms"] = round((figures.prfaas_wait_s if far else figures.local_wait_s) * 1e3, 3)
    if record.held_s is not None:
        fields["held_ms"] = round(record.held_s * 1e3, 3)
    if record.first_byte_s is not None:
        fields["ttft_ms"] = round((record.first_byte_s - record.start_s) * 1e3, 3)
    fields["total_ms"] = round((end_s - record.start_s) * 1e3, 3)
    fields["bytes"] = record.bytes_out
    if record.attempts:
        fields["failed_attempts"] = record.attempts
    if record.error:
        fields["error"] = record.error
    return msgspec.json.encode(fields).decode() + "\n"
