"""Errors of the HTTP base.

HttpError                the client's fault or a refusal of ours: carries the status to answer with
UpstreamError            a server behind us failed
├── UpstreamConnectError     no connection: refused, unreachable, or not within connect_timeout_s
├── UpstreamStaleError       a reused connection closed before any byte of the answer: safe to send again
├── UpstreamClosedError      the connection closed in mid-answer, or before it on a fresh connection
├── UpstreamTimeoutError     no first byte, or no further byte, in time
└── UpstreamProtocolError    bytes that are not HTTP/1.1
"""

from __future__ import annotations

import msgspec

from sglang_prfaas.errors import LocalError, PeerError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    502: "upstream_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class HttpError(LocalError):
    """Answer with `status` and the OpenAI error shape.

    `code` is a short machine-readable word, `param` the request field at fault; `headers` go into the answer's head.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        error_type: str = "",
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or None
        self.param = param
        self.error_type = error_type or _TYPES.get(
            status, "invalid_request_error" if status < 500 else "internal_server_error"
        )
        self.headers = headers

    def body(self) -> bytes:
        """The JSON body, in OpenAI's shape."""
        return error_body(self.message, self.error_type, self.param, self.code)


def error_body(message: str, error_type: str, param: str | None = None, code: str | int | None = None) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}` as JSON bytes."""
    error = {"message": message, "type": error_type, "param": param, "code": code}
    return msgspec.json.encode({"error": error})


class UpstreamError(PeerError):
    """A server behind us failed. `status` is what a client gets to see."""

    status = 502
    code = "upstream_failed"


class UpstreamConnectError(UpstreamError):
    """No connection to the server."""

    code = "upstream_unreachable"


class UpstreamStaleError(UpstreamError):
    """A reused connection closed before any byte of the answer."""

    code = "upstream_closed"


class UpstreamClosedError(UpstreamError):
    """The connection closed before the answer was complete."""

    code = "upstream_closed"


class UpstreamTimeoutError(UpstreamError):
    """The server was silent for too long."""

    status = 504
    code = "upstream_timeout"


class UpstreamProtocolError(UpstreamError):
    """The server's bytes are not an HTTP/1.1 answer."""

    code = "upstream_protocol"
