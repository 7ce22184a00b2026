"""One attempt at a request: the prefill leg and the decode leg, run against each other until one decides.

Until the first body bytes of decode's answer nothing is sent to the client, so a failure of either leg can be retried.
From then on ("committed") decode's bytes go through as they come, and prefill no longer matters.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from msgspec import Struct

from sglang_prfaas.http import (
    Exchange,
    Framing,
    Response,
    ResponseHead,
    UpstreamConnectError,
    UpstreamError,
    UpstreamStaleError,
    UpstreamTimeoutError,
)
from sglang_prfaas.http.chunks import LAST_CHUNK, ChunkScanner, complete_chunks_length, encode_chunk, leading_payload
from sglang_prfaas.http.relay import start_response
from sglang_prfaas.router.logprobs import StreamMerger, merge_answers
from sglang_prfaas.router.registry import Target
from sglang_prfaas.router.sse import error_event, event_failure, first_event

Leg = Literal["prefill", "decode"]
Cause = Literal["connect", "stale", "closed", "timeout", "status", "error_event"]

_MAX_ERROR_BYTES = 1 << 20
_MAX_PEEK_BYTES = 64 << 10
_MAX_HELD_BYTES = 64 << 10
_MAX_LOGPROB_BYTES = 256 << 20


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


class Attempt:
    """Two exchanges and the client's response. `done` resolves with an Outcome; `cancel` closes both upstreams."""

    def __init__(
        self,
        response: Response,
        prefill: Target,
        decode: Target,
        loop: asyncio.AbstractEventLoop,
        *,
        uncached_tokens: int,
        merge_logprobs: bool,
    ) -> None:
        self.response = response
        self.prefill = prefill
        self.decode = decode
        self.done: asyncio.Future[Outcome] = loop.create_future()
        self.committed_s: float | None = None
        self.merge_logprobs = merge_logprobs
        self._loop = loop
        self._tokens = uncached_tokens
        self._holds_prefill = False
        self._holds_decode = False
        self._succeeded = False
        # Only where the legs' answers are merged: sinks refer back to the attempt.
        self._merging: tuple[_PrefillSink, _DecodeSink] | None = None
        self._exchanges: list[Exchange] = []

    def start(self, method: bytes, target: bytes, header_block: bytes, body: bytes) -> None:
        """Send the request to both servers."""
        self._holds_prefill = self._holds_decode = True
        for server in (self.prefill, self.decode):
            server.inflight_requests += 1
            server.served += 1
        self.prefill.inflight_tokens += self._tokens
        sinks = _PrefillSink(self), _DecodeSink(self)
        if self.merge_logprobs:
            self._merging = sinks
        # Decode first: it reserves its pages while prefill's queue takes the request.
        for server, sink in ((self.decode, sinks[1]), (self.prefill, sinks[0])):
            upstream = server.upstream
            head = upstream.request_head(method, target, header_block, len(body))
            exchange = upstream.send(head, body, sink, decode=self.merge_logprobs)
            sink.exchange = exchange
            self._exchanges.append(exchange)
        self.response.set_flow(self._exchanges[0].pause, self._exchanges[0].resume)

    def cancel(self) -> None:
        """Close what is still open, and give the load figures back.

        Once decode's answer is complete there is nothing to stop: prefill's own answer may come in afterwards.
        """
        if self._succeeded:
            return
        for exchange in self._exchanges:
            exchange.cancel()
        self.prefill_finished()
        self._decode_finished()

    # --- called by the sinks ----------------------------------------------------------------------------------------

    def commit(self) -> None:
        self.committed_s = self._loop.time()

    def fail(self, failure: Failure) -> None:
        """Either leg failed before the first byte: both end."""
        if self.committed_s is None and not self.done.done():
            self.done.set_result(Outcome(failure))
            self.cancel()

    def finish(self, broken: str = "") -> None:
        """Decode's answer is complete, or broken off after its first byte."""
        if not self.done.done():
            self._decode_finished()
            self._succeeded = not broken
            self.done.set_result(Outcome(broken=broken))

    def prefill_finished(self) -> None:
        if self._holds_prefill:
            self._holds_prefill = False
            self.prefill.inflight_requests -= 1
            self.prefill.inflight_tokens -= self._tokens
            if self._merging is not None:
                self._merging[1].prefill_ready()

    def _decode_finished(self) -> None:
        if self._holds_decode:
            self._holds_decode = False
            self.decode.inflight_requests -= 1

    def prefill_answer(self) -> bytes | None:
        """Prefill's whole answer, once it is there (only kept where logprobs are merged)."""
        return None if self._holds_prefill or self._merging is None else self._merging[0].body()


class _Peek:
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


def _is_event_stream(head: ResponseHead) -> bool:
    return (head.header(b"content-type") or b"").startswith(b"text/event-stream")


class _Sink:
    """What both legs share: the head, collected bytes, and failures as causes."""

    leg: Leg

    __slots__ = ("attempt", "exchange", "head", "parts", "size")

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.exchange: Exchange | None = None
        self.head: ResponseHead | None = None
        self.parts: list[bytes] = []
        self.size = 0

    def collect(self, data: bytes, limit: int) -> None:
        self.size += len(data)
        if self.size <= limit:
            self.parts.append(data)

    def body(self) -> bytes:
        return b"".join(self.parts)

    def fail_status(self) -> None:
        """The server answered with an error: that answer goes to the client if nothing else helps."""
        assert self.head is not None
        server = self.attempt.prefill if self.leg == "prefill" else self.attempt.decode
        message = f"{self.leg} server {server.site}/{server.name} answered {self.head.status}"
        body = self.body()
        if self.head.framing is Framing.CHUNKED and not self.attempt.merge_logprobs:
            body = ChunkScanner().feed(body)[0]
        answer = (self.head, body) if self.size <= _MAX_ERROR_BYTES else None
        self.attempt.fail(Failure(self.leg, "status", message, self.head.status, answer))

    def fail_event(self, status: int, message: str) -> None:
        server = self.attempt.prefill if self.leg == "prefill" else self.attempt.decode
        text = f"{self.leg} server {server.site}/{server.name} failed: {message}"
        self.attempt.fail(Failure(self.leg, "error_event", text, status))

    def fail_transport(self, error: UpstreamError) -> None:
        cause: Cause = "closed"
        if isinstance(error, UpstreamConnectError):
            cause = "connect"
        elif isinstance(error, UpstreamStaleError):
            cause = "stale"
        elif isinstance(error, UpstreamTimeoutError):
            cause = "timeout"
        self.attempt.fail(Failure(self.leg, cause, str(error), error.status))


class _PrefillSink(_Sink):
    """Prefill's answer is only looked at for errors (and for the prompt's logprobs, where asked for)."""

    leg: Leg = "prefill"

    __slots__ = ("_peek",)

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._peek: _Peek | None = None

    def on_head(self, head: ResponseHead) -> None:
        self.head = head
        if _is_event_stream(head):
            self._peek = _Peek()

    def on_body(self, data: bytes) -> None:
        assert self.head is not None
        if self.head.status != 200:
            self.collect(data, _MAX_ERROR_BYTES)
        elif self.attempt.merge_logprobs:
            self.collect(data, _MAX_LOGPROB_BYTES)
        elif self._peek is not None and self._peek.feed(data, self.head.framing):
            failure = self._peek.failure
            self._peek = None
            if failure is not None:
                self.fail_event(*failure)

    def on_end(self) -> None:
        assert self.head is not None
        if self.head.status != 200:
            self.fail_status()
        else:
            self.attempt.prefill_finished()

    def on_failure(self, error: UpstreamError) -> None:
        self.fail_transport(error)  # nothing happens when decode answers already
        self.attempt.prefill_finished()


class _DecodeSink(_Sink):
    """Decode's answer: held until its first body bytes show that it is one, then relayed as it comes."""

    leg: Leg = "decode"

    __slots__ = ("_aligned", "_ended", "_held", "_merger", "_peek", "_relaying", "_sse")

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._relaying = False
        self._aligned = True  # what the client has ends at a chunk boundary
        self._peek: _Peek | None = None
        self._ended = False
        self._sse = False
        self._held = b""
        self._merger: StreamMerger | None = None

    def on_head(self, head: ResponseHead) -> None:
        self.head = head
        self._sse = _is_event_stream(head)
        if self._sse:
            self._peek = _Peek()

    def on_body(self, data: bytes) -> None:
        if self._relaying:
            if self._sse:
                self._relay_event_bytes(data)
            else:
                self.attempt.response.write(data)
            return
        head = self.head
        assert head is not None
        if head.status >= 500:
            self.collect(data, _MAX_ERROR_BYTES)
        elif self.attempt.merge_logprobs:
            self.collect(data, _MAX_LOGPROB_BYTES)
            if self._sse:
                self._merge_stream()
        elif not self._sse:
            self._commit(data)
        else:
            self.parts.append(data)
            peek = self._peek
            assert peek is not None
            if peek.feed(data, head.framing):
                if peek.failure is not None:
                    self.fail_event(*peek.failure)
                else:
                    self._commit(self.body())

    def on_end(self) -> None:
        assert self.head is not None
        self._ended = True
        if self._relaying and self._merger is None:
            if self._held:
                self.attempt.response.write(self._held)
            self._complete()
        elif self.head.status >= 500 and not self._relaying:
            self.fail_status()
        elif self.attempt.merge_logprobs:
            self._finish_merge()
        else:
            self._commit(self.body())
            self._complete()

    def on_failure(self, error: UpstreamError) -> None:
        if not self._relaying:
            self.fail_transport(error)
            return
        response = self.attempt.response
        if self._sse and self._close_stream(str(error)):
            response.end()
        else:
            response.abort()
        self.attempt.finish(broken=str(error))

    # --- relaying ---------------------------------------------------------------------------------------------------

    def _commit(self, data: bytes) -> None:
        assert self.head is not None
        self.attempt.commit()
        self._relaying = True
        self.parts = []
        start_response(self.attempt.response, self.head)
        if self._sse:
            self._relay_event_bytes(data)
        else:
            self.attempt.response.write(data)

    def _relay_event_bytes(self, data: bytes) -> None:
        """Relay up to chunk boundaries: a stream that breaks off in mid-chunk could not be ended with an error."""
        assert self.exchange is not None
        if self._held:
            data = self._held + data
            self._held = b""
        # Without the CRLF, a part of the next chunk's size line is there.
        aligned = self.exchange.at_chunk_boundary and data.endswith(b"\r\n")
        if aligned or not self._aligned or len(data) > _MAX_HELD_BYTES:
            self._aligned = aligned
            self.attempt.response.write(data)
        else:
            self._held = data

    def _close_stream(self, message: str) -> bool:
        """End a broken event stream with an error event; False where the bytes sent so far do not allow it."""
        assert self.exchange is not None
        assert self.head is not None
        if self.head.framing is not Framing.CHUNKED:
            return False
        response = self.attempt.response
        if self._merger is not None:
            response.write(error_event(message, "upstream_failed"))
            return True
        if self._held:
            response.write(self._held[: complete_chunks_length(self._held)])
        elif not self._aligned:
            return False
        response.write(encode_chunk(error_event(message, "upstream_failed")) + LAST_CHUNK)
        return True

    def _complete(self) -> None:
        self.attempt.response.end()
        self.attempt.finish()

    # --- prompt logprobs --------------------------------------------------------------------------------------------

    def prefill_ready(self) -> None:
        """Prefill's answer is complete: merge what waits for it."""
        if self.attempt.merge_logprobs and not self.attempt.done.done() and self.head is not None:
            if self._ended:
                self._finish_merge()
            elif self._sse and self.head.status == 200:
                self._merge_stream()

    def _merge_stream(self) -> None:
        prefill = self.attempt.prefill_answer()
        if prefill is None or not self.parts:
            return
        assert self.head is not None
        data = self.body()
        self.parts = []
        if self._merger is None:
            payload = first_event(data)
            failed = event_failure(payload) if payload is not None else None
            if failed is not None and failed[0] >= 500:
                self.parts = [data]
                self.fail_event(*failed)
                return
            self._merger = StreamMerger()
            self._merger.add_prefill(prefill)
            self.attempt.commit()
            headers = [item for item in self.head.headers if item[0] == b"content-type"]
            self.attempt.response.start(self.head.status, headers, Framing.CHUNKED)
        self.attempt.response.write(self._merger.feed(data))

    def _finish_merge(self) -> None:
        assert self.head is not None
        prefill = self.attempt.prefill_answer()
        if prefill is None:
            return  # prefill_ready will come
        response = self.attempt.response
        if self._sse and self.head.status == 200:
            self._merge_stream()
            if self.attempt.done.done():
                return
            if self._merger is not None:
                response.write(self._merger.rest())
        else:
            self.attempt.commit()
            body = merge_answers(prefill, self.body()) if self.head.status == 200 else self.body()
            headers = [item for item in self.head.headers if item[0] == b"content-type"]
            response.send(self.head.status, body, headers)
        self._complete()
