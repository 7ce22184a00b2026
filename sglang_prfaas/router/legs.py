"""The two legs of an attempt as sinks of their exchanges: prefill's answer is watched, decode's is relayed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sglang_prfaas.http import (
    Exchange,
    Framing,
    ResponseHead,
    UpstreamConnectError,
    UpstreamError,
    UpstreamStaleError,
    UpstreamTimeoutError,
)
from sglang_prfaas.http.chunks import LAST_CHUNK, ChunkScanner, complete_chunks_length, encode_chunk
from sglang_prfaas.http.relay import start_response
from sglang_prfaas.router.logprobs import StreamMerger, merge_answers
from sglang_prfaas.router.outcome import Cause, Failure, Leg
from sglang_prfaas.router.sse import FirstEvent, error_event, event_failure, first_event

_MAX_ERROR_BYTES = 1 << 20
_MAX_HELD_BYTES = 64 << 10
_MAX_LOGPROB_BYTES = 256 << 20
_TAIL_BYTES = 8 << 10
_CACHED = re.compile(rb'"cached_tokens": ?(\d{1,9})')
"""In `meta_info` of /generate, and in `usage.prompt_tokens_details` with SGLang's --enable-cache-report."""

if TYPE_CHECKING:
    from sglang_prfaas.router.attempt import Attempt


def _is_event_stream(head: ResponseHead) -> bool:
    return (head.header(b"content-type") or b"").startswith(b"text/event-stream")


class LegSink:
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


class PrefillSink(LegSink):
    """Prefill's answer is only looked at for errors (and for the prompt's logprobs, where asked for)."""

    leg: Leg = "prefill"

    __slots__ = ("_peek", "_tail")

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._peek: FirstEvent | None = None
        self._tail = b""  # of its answer, where the cached tokens are looked for

    def on_head(self, head: ResponseHead) -> None:
        self.head = head
        if _is_event_stream(head):
            self._peek = FirstEvent()

    def on_body(self, data: bytes) -> None:
        assert self.head is not None
        if self.head.status != 200:
            self.collect(data, _MAX_ERROR_BYTES)
            return
        if self.attempt.on_cached is not None:
            self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self.attempt.merge_logprobs:
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
        elif self.attempt.on_cached is not None and (told := _CACHED.findall(self._tail)):
            self.attempt.on_cached(int(told[-1]))
        self.attempt.prefill_finished(answered=self.head.status == 200)

    def on_failure(self, error: UpstreamError) -> None:
        self.fail_transport(error)  # nothing happens when decode answers already
        self.attempt.prefill_finished()


class DecodeSink(LegSink):
    """Decode's answer: held until its first body bytes show that it is one, then relayed as it comes."""

    leg: Leg = "decode"

    __slots__ = ("_aligned", "_ended", "_held", "_merger", "_peek", "_relaying", "_sse")

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._relaying = False
        self._aligned = True  # what the client has ends at a chunk boundary
        self._peek: FirstEvent | None = None
        self._ended = False
        self._sse = False
        self._held = b""
        self._merger: StreamMerger | None = None

    def on_head(self, head: ResponseHead) -> None:
        self.head = head
        self._sse = _is_event_stream(head)
        if self._sse:
            self._peek = FirstEvent()

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
