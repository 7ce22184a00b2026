"""Requests served over prefill and decode: count, decide, send to both, relay decode's answer, retry what failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from math import ceil

from sglang_prfaas.config.schema import RouterConfig, TenantConfig
from sglang_prfaas.core.request import RequestView, ServerKey
from sglang_prfaas.http import HttpError, Request, Response
from sglang_prfaas.http.messages import (
    encode_headers,
    forwardable_request_headers,
    forwardable_response_headers,
    safe_header_value,
)
from sglang_prfaas.router.access_log import AccessLog, AccessRecord
from sglang_prfaas.router.attempt import Attempt
from sglang_prfaas.router.body import Endpoint, ParsedBody, new_rooms, parse_body, require_prompt
from sglang_prfaas.router.decisions import DecisionRecord, RecentDecisions
from sglang_prfaas.router.filters import DROPPED_REQUEST_HEADERS, forced_route
from sglang_prfaas.router.metrics import Metrics
from sglang_prfaas.router.models import Models
from sglang_prfaas.router.outcome import Failure
from sglang_prfaas.router.policy import Flight, RoutingPolicy
from sglang_prfaas.router.prefixes import PrefixLookup
from sglang_prfaas.router.registry import Registry, Target
from sglang_prfaas.router.tenancy import Tenants
from sglang_prfaas.router.tokens import TokenCount, TokenCounter
from sglang_prfaas.scheduler import Decision

# Reconnecting costs nothing and says nothing about a server, so it is not counted as a retry, but it must end.
_MAX_STALE = 3


class PdProxy:
    """Serves `/v1/chat/completions`, `/v1/completions` and `/generate`."""

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        counter: TokenCounter,
        models: Models,
        metrics: Metrics,
        access_log: AccessLog,
        policy: RoutingPolicy,
        prefixes: PrefixLookup,
        tenants: Tenants,
        on_routed: Callable[[Decision], None] | None = None,
    ) -> None:
        """on_routed: hears of the first decision of every request."""
        self._limits = config.limits
        self._registry = registry
        self._counter = counter
        self._models = models
        self._metrics = metrics
        self._log = access_log
        self._loop = asyncio.get_running_loop()
        self._policy = policy
        self._prefixes = prefixes
        self._tenants = tenants
        self._line = policy.line
        self._on_routed = on_routed
        self._exact_count_band = config.policy.exact_count_band
        self.decisions = RecentDecisions(config.policy.decisions_kept)

    async def handle(self, request: Request, response: Response, endpoint: Endpoint, request_id: bytes) -> None:
        """Serve one request. Raises HttpError for what is refused or cannot be served."""
        record = AccessRecord(request, request_id.decode("latin-1"), endpoint, self._loop.time())
        try:
            await self._serve(request, response, endpoint, record)
        except asyncio.CancelledError:
            record.status = 499
            self._metrics.aborts.add(("streaming" if record.first_byte_s is not None else "waiting",))
            raise
        except HttpError as exc:
            record.status = exc.status
            record.error = exc.message
            raise
        finally:
            self._account(record, response)

    async def _serve(self, request: Request, response: Response, endpoint: Endpoint, record: AccessRecord) -> None:
        """Attempts, until one is answered, the client can be told why not, or there were enough."""
        tenant = self._tenants.of(request)
        sites, forced = self._tenants.sites(tenant), forced_route(request)
        body = self._body(request, endpoint, tenant)
        adapters = await self._models.select(body)
        tokens = await self._tokens(body, record)
        header_block = _upstream_headers(request, record)
        avoid: frozenset[ServerKey] = frozenset()
        last: Failure | None = None
        retries = stale = 0
        while True:
            servers = self._models.servers(adapters)
            view = RequestView(
                l_total=tokens.longest, exact=tokens.exact, forced=forced, sites=sites, servers=servers, avoid=avoid
            )
            decision, flight = await self._route(view, body, tokens, record, first=last is None)
            if decision.prefill is None or decision.decode is None:
                raise self._unservable(decision, last, tenant, adapters if servers is not None else frozenset())
            assert isinstance(decision.prefill, Target)
            assert isinstance(decision.decode, Target)
            attempt, injected = self._attempt(decision, flight, body, tokens, response, record)
            try:
                attempt.start(request.method.encode("latin-1"), request.target, header_block, injected)
                outcome = await attempt.done
            finally:
                record.first_byte_s = attempt.committed_s
                attempt.cancel()
            failure = outcome.failure
            if failure is None:
                record.status = response.status
                record.error = outcome.broken
                if outcome.broken:
                    self._metrics.broken.add(("decode",))
                return
            last = failure
            if failure.retryable:
                self._metrics.retries.add((failure.leg, failure.cause))
                record.attempts.append(f"{failure.leg} {failure.cause}: {failure.message}")
                if failure.cause == "stale" and stale < _MAX_STALE:
                    stale += 1
                    continue
                avoid = avoid | self._blame(failure, decision.prefill, decision.decode)
                if retries < self._limits.max_retries:
                    retries += 1
                    continue
            self._give_up(response, failure, record)
            return

    @staticmethod
    def _body(request: Request, endpoint: Endpoint, tenant: TenantConfig | None) -> ParsedBody:
        """The request's body. Raises HttpError."""
        body = parse_body(endpoint, request.body)
        require_prompt(body)
        if tenant is not None and tenant.cache_salt:
            body.cache_salt = tenant.cache_salt
        return body

    async def _tokens(self, body: ParsedBody, record: AccessRecord) -> TokenCount:
        """How long the prompt is: exactly where its prefix may be cached, or t is near."""
        t, band = self._registry.observation.t_tokens, self._exact_count_band
        tokens = None
        if self._prefixes.wants(body, lambda: self._counter.estimate(body).longest):
            tokens = await self._counter.token_ids(body)
        if tokens is None:
            tokens = await self._counter.count(body, t * (1 - band), t * (1 + band))
        record.input_tokens = tokens.total
        record.stream = body.stream
        self._metrics.counts.add(("exact" if tokens.exact else "estimate",))
        return tokens

    async def _route(
        self, view: RequestView, body: ParsedBody, tokens: TokenCount, record: AccessRecord, *, first: bool
    ) -> tuple[Decision, Flight | None]:
        """Decide; a request that was not held yet also waits for its turn. `first`: no attempt was made before."""
        decision = self._policy.decide(self._loop.time(), view, body)
        record.decision = decision
        record.recent = DecisionRecord(time.time(), record.request_id, tokens.total, len(record.attempts), decision)
        self.decisions.add(record.recent)
        if self._on_routed is not None and first:
            self._on_routed(decision)
        if self._line is None or record.held_s is not None:
            return decision, self._policy.begin(self._loop.time(), decision, tokens) if decision.prefill else None
        turn = await self._line.turn(decision, view, body, tokens)
        record.held_s = record.recent.held_s = turn.held_s
        record.decision = record.recent.decision = turn.decision
        return turn.decision, turn.flight

    def _attempt(
        self,
        decision: Decision,
        flight: Flight | None,
        body: ParsedBody,
        tokens: TokenCount,
        response: Response,
        record: AccessRecord,
    ) -> tuple[Attempt, bytes]:
        """An attempt that is yet to be started, and the body that both servers get."""
        prefill, decode = decision.prefill, decision.decode
        assert isinstance(prefill, Target)
        assert isinstance(decode, Target)
        rooms = new_rooms(body)
        injected = body.with_bootstrap(prefill.bootstrap_host, prefill.bootstrap_port, rooms)
        record.room = rooms[0]
        promised = self._promised(prefill) if body.token_ids is not None else None
        if promised is not None and not record.attempts:
            self._prefixes.looked_up(body, any(s.affinity for s in self._registry.observation.sites))
        response.extra_headers = self._headers(decision, tokens, rooms[0], record)
        if promised is not None:
            response.extra_headers.append((b"x-prfaas-cached-tokens", b"%d" % promised))
        attempt = Attempt(
            response,
            prefill,
            decode,
            self._loop,
            uncached_tokens=decision.uncached_tokens,
            merge_logprobs=body.merges_logprobs,
            flight=flight,
            on_cached=None if promised is None else partial(self._told, body, prefill, promised),
        )
        return attempt, injected

    def _promised(self, prefill: Target) -> int:
        """Tokens of the request at hand that a prefill server is taken to hold."""
        site = next((site for site in self._registry.observation.sites if site.name == prefill.site), None)
        return max(site.cached_tokens, site.affinity.get(prefill.name, 0)) if site is not None else 0

    def _told(self, body: ParsedBody, prefill: Target, promised: int, cached: int) -> None:
        if body.batch is None and not body.merges_logprobs:  # for a prompt's logprobs SGLang leaves its cache aside
            self._prefixes.told(body, prefill.site, prefill.name, promised, cached)

    @staticmethod
    def _blame(failure: Failure, prefill: Target, decode: Target) -> frozenset[ServerKey]:
        """Servers to leave out of the next attempt. Unreachable ones also wait for a successful health check."""
        failed = prefill if failure.leg == "prefill" else decode
        if failure.cause in ("connect", "closed"):
            failed.suspect(failure.message)
            return frozenset((failed.key,))
        # An error that decode reports before its first token is nearly always that of a transfer: either end may be
        # at fault, so prefer a pair without both.
        return frozenset((prefill.key, decode.key)) if failure.leg == "decode" else frozenset((prefill.key,))

    @staticmethod
    def _give_up(response: Response, failure: Failure, record: AccessRecord) -> None:
        """Answer with the upstream's own error where there is one."""
        record.error = failure.message
        if failure.answer is None:
            code = "upstream_timeout" if failure.cause == "timeout" else "upstream_failed"
            raise HttpError(failure.status, failure.message, code=code)
        head, body = failure.answer
        record.status = head.status
        response.send(head.status, body, forwardable_response_headers(head.headers))

    def _unservable(
        self, decision: Decision, last: Failure | None, tenant: TenantConfig | None, adapters: frozenset[str]
    ) -> HttpError:
        message = decision.reason[0].upper() + decision.reason[1:] + "."
        if tenant is not None and tenant.sites:
            message += f" Tenant {tenant.name} may use {', '.join(tenant.sites)} only."
        if adapters:
            message += f" Only servers that have the LoRA adapter {', '.join(sorted(adapters))} may serve it."
        if last is not None:
            message += f" Before that: {last.message}."
        if decision.retry_after_s:
            self._metrics.shed.add((decision.reason_class,))
            after = b"%d" % ceil(decision.retry_after_s)
            return HttpError(429, message, code=decision.reason_class, headers=((b"retry-after", after),))
        return HttpError(503, message, code=decision.reason_class, headers=((b"retry-after", b"1"),))

    @staticmethod
    def _headers(decision: Decision, tokens: TokenCount, room: int, record: AccessRecord) -> list[tuple[bytes, bytes]]:
        assert decision.prefill is not None
        assert decision.decode is not None
        assert decision.route is not None
        headers = [
            (b"x-request-id", safe_header_value(record.request_id)),
            (b"x-prfaas-route", decision.route.encode()),
            (b"x-prfaas-reason", safe_header_value(decision.reason)),
            (b"x-prfaas-prefill", f"{decision.prefill.site}/{decision.prefill.name}".encode()),
            (b"x-prfaas-decode", f"{decision.decode.site}/{decision.decode.name}".encode()),
            (b"x-prfaas-room", b"%d" % room),
            (b"x-prfaas-input-tokens", b"%d" % tokens.total),
            (b"x-prfaas-uncached-tokens", b"%d" % decision.uncached_tokens),
        ]
        if decision.figures is not None:
            expected_s = decision.figures.prfaas_ttft_s if decision.route == "prfaas" else decision.figures.local_ttft_s
            headers.append((b"x-prfaas-expected-ttft-ms", b"%.1f" % (expected_s * 1e3)))
        if record.held_s is not None:
            headers.append((b"x-prfaas-held-ms", b"%.1f" % (record.held_s * 1e3)))
        return headers

    def _account(self, record: AccessRecord, response: Response) -> None:
        """Metrics and the log line of a request that has ended."""
        route = record.route
        metrics = self._metrics
        metrics.requests.add((record.endpoint, route, record.reason_class, str(record.status)))
        if record.held_s is not None:
            metrics.held.observe((route,), record.held_s)
        if record.first_byte_s is not None:
            metrics.ttft.observe((route,), record.first_byte_s - record.start_s)
            metrics.input_tokens.observe((route,), record.input_tokens)
        if record.recent is not None:
            record.recent.status = record.status
            if record.first_byte_s is not None:
                record.recent.ttft_s = record.first_byte_s - record.start_s
        record.bytes_out = response.bytes_written
        metrics.relayed_bytes.add((route,), record.bytes_out)
        self._log.write(record, self._loop.time(), time.time())


def _upstream_headers(request: Request, record: AccessRecord) -> bytes:
    """The client's headers that go on, with an id where it has none."""
    own = () if request.header(b"x-request-id") else ((b"x-request-id", record.request_id.encode("latin-1")),)
    return encode_headers([*forwardable_request_headers(request.headers, DROPPED_REQUEST_HEADERS), *own])
