"""One attempt at a request: the prefill leg and the decode leg, run against each other until one decides.

Until the first body bytes of decode's answer nothing is sent to the client, so a failure of either leg can be retried.
From then on ("committed") decode's bytes go through as they come, and prefill no longer matters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sglang_prfaas.http import Exchange, Response
from sglang_prfaas.router.legs import DecodeSink, PrefillSink
from sglang_prfaas.router.outcome import Failure, Outcome
from sglang_prfaas.router.policy import Flight
from sglang_prfaas.router.registry import Target


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
        flight: Flight | None = None,
        on_cached: Callable[[int], None] | None = None,
    ) -> None:
        """`flight`: hears when prefill has answered, or will not. `on_cached`: hears how many tokens of the prompt
        prefill had cached, where its answer says so."""
        self.on_cached = on_cached
        self.response = response
        self.prefill = prefill
        self.decode = decode
        self.done: asyncio.Future[Outcome] = loop.create_future()
        self.committed_s: float | None = None
        self.merge_logprobs = merge_logprobs
        self._loop = loop
        self._tokens = uncached_tokens
        self._flight = flight
        self._holds_prefill = False
        self._holds_decode = False
        self._succeeded = False
        # Only where the legs' answers are merged: sinks refer back to the attempt.
        self._merging: tuple[PrefillSink, DecodeSink] | None = None
        self._exchanges: list[Exchange] = []

    def start(self, method: bytes, target: bytes, header_block: bytes, body: bytes) -> None:
        """Send the request to both servers."""
        self._holds_prefill = self._holds_decode = True
        for server in (self.prefill, self.decode):
            server.served += 1
        self.prefill.add_load(1, self._tokens)
        self.decode.add_load(1)
        sinks = PrefillSink(self), DecodeSink(self)
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

    def prefill_finished(self, *, answered: bool = False) -> None:
        if self._holds_prefill:
            if self._flight is not None:
                (self._flight.prefilled if answered else self._flight.ended)(self._loop.time())
            self._holds_prefill = False
            self.prefill.add_load(-1, -self._tokens)
            if self._merging is not None:
                self._merging[1].prefill_ready()

    def _decode_finished(self) -> None:
        if self._holds_decode:
            self._holds_decode = False
            self.decode.add_load(-1)

    def prefill_answer(self) -> bytes | None:
        """Prefill's whole answer, once it is there (only kept where logprobs are merged)."""
        return None if self._holds_prefill or self._merging is None else self._merging[0].body()
