"""Errors that hide in a 200 answer: SGLang reports a failed transfer as the first event of a stream."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_prfaas.http import Framing, error_body
from sglang_prfaas.http.chunks import leading_payload

_MAX_PEEK_BYTES = 64 << 10


def error_event(message: str, code: str) -> bytes:
    """A server-sent event with an error in OpenAI's shape."""
    return b"data: " + error_body(message, "upstream_error", None, code) + b"\n\n"


def first_event(data: bytes) -> bytes | None:
    """The first complete event's payload in (possibly chunk-coded) bytes, or None while it is incomplete."""
    start = data.find(b"data:")
    if start < 0:
        return None
    end = data.find(b"\n\n", start)
    if end < 0:
        return None
    return data[start + 5 : end].strip()


def event_failure(payload: bytes) -> tuple[int, str] | None:
    """(status, message) when an event's payload reports a failure, else None.

    Chat and completions send `{"error": {"message", "code"}}` (older ones without the envelope, with
    `"object": "error"`); /generate sends `finish_reason` of type abort with a status code.
    """
    if b'"error"' not in payload and b'"abort"' not in payload:
        return None
    try:
        event: Any = msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return None
    if not isinstance(event, dict):
        return None
    error = event.get("error")
    if isinstance(error, dict):
        return _status(error.get("code")), str(error.get("message", ""))
    if event.get("object") == "error":
        return _status(event.get("code")), str(event.get("message", ""))
    meta = event.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort" and reason.get("status_code") is not None:
        return _status(reason.get("status_code")), str(reason.get("message", ""))
    return None


def _status(code: object) -> int:
    return code if isinstance(code, int) and 400 <= code < 600 else 500


class FirstEvent:
    """Looks at the first event of a stream: errors of SGLang hide in it under status 200."""

    __slots__ = ("_buffer", "failure")

    def __init__(self) -> None:
        self._buffer = b""
        self.failure: tuple[int, str] | None = None

    def feed(self, data: bytes, framing: Framing) -> bool:
        """Take body bytes; True once the first event is known, with `failure` set if it is a server's error."""
        self._buffer += data
        text = leading_payload(self._buffer, b"\n\n") if framing is Framing.CHUNKED else self._buffer
        payload = first_event(text) if text is not None else None
        if payload is None:
            return len(self._buffer) > _MAX_PEEK_BYTES
        failure = event_failure(payload)
        if failure is not None and failure[0] >= 500:
            self.failure = failure
        return True
