"""A whole profile: every hardware's prefill, the transfers between servers, decode; one after the other."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from sglang_prfaas.errors import ConfigError, PeerError
from sglang_prfaas.profiler.assemble import Made, Outcome, assemble
from sglang_prfaas.profiler.budget import Budget
from sglang_prfaas.profiler.decode import DecodeRun, Legs, measure_decode
from sglang_prfaas.profiler.model_config import ModelFacts
from sglang_prfaas.profiler.prefill import PrefillRun, measure_prefill
from sglang_prfaas.profiler.summary import (
    Transfer,
    geometric,
    link_rate,
    noisy,
)
from sglang_prfaas.profiler.targets import Target
from sglang_prfaas.profiler.transfers import measure_together, measure_transfers, round_trip_s
from sglang_prfaas.scheduler.profiles import (
    LinkProfile,
)

SHARES = {"prefill": 45.0, "transfers": 15.0, "decode": 40.0}
"""Of the time; what one stage leaves goes to the next ones."""
_MARGIN_TOKENS = 8
_IDLE_S = 10.0


class Settings(Struct, frozen=True, kw_only=True):
    """What to measure. Empty lists: chosen from what the servers can take."""

    lengths: Sequence[int] = ()
    min_tokens: int
    max_tokens: int
    batches: Sequence[int] = ()
    max_batch: int
    contexts: Sequence[int]
    window_tokens: int
    repeats: int
    budget_s: float
    transfer_log: str
    at_once: int = 1
    """Transfers side by side, when the link is measured."""
    gpus: Mapping[str, int]
    date: str
    command: str
    version: str
    allow_busy: bool = False


class Profiler:
    """One run over the servers found. `say` gets a line for everything that was measured."""

    def __init__(
        self, targets: Sequence[Target], facts: ModelFacts, settings: Settings, say: Callable[[str], None]
    ) -> None:
        """Raises ConfigError where S_kv(l) could not be known in the end."""
        self._targets, self._facts, self._settings, self._say = targets, facts, settings, say
        self._prefill = _first_of(targets, "prefill")
        self._decode = _first_of(targets, "decode")
        self._notes: list[str] = []
        self._prefill_runs: dict[str, PrefillRun] = {}
        self._decode_runs: dict[str, DecodeRun] = {}
        self._links: list[LinkProfile] = []
        self.transfers: dict[str, list[Transfer]] = {}
        pairs = self._pairs()
        if not (pairs and settings.transfer_log) and facts.layout is None:
            raise ConfigError(
                f"S_kv(l) cannot be known: {facts.why}. Or let it be measured: --transfer-log, the file that "
                "PRFAAS_TRANSFER_LOG names on the decode servers, and a prefill and a decode server"
            )
        if pairs and not settings.transfer_log:
            self._note("no --transfer-log: bytes moved and the rate of the link were not measured")

    async def run(self) -> Outcome:
        """Measure everything. Raises PeerError where a server fails."""
        started_s = time.perf_counter()
        pairs = self._pairs() if self._settings.transfer_log else []
        jobs: list[tuple[float, Callable[[Budget], Awaitable[None]]]] = []
        stages: tuple[tuple[str, Callable[..., Awaitable[None]], list[Any]], ...] = (
            ("prefill", self._measure_prefill, list(self._prefill.values())),
            ("transfers", self._measure_transfers, pairs),
            ("decode", self._measure_decode, list(self._decode.values())),
        )
        for stage, do, items in stages:
            jobs += [(SHARES[stage] / len(items), partial(do, item)) for item in items]
        budget, left = Budget(self._settings.budget_s), sum(weight for weight, _ in jobs)
        for weight, job in jobs:
            await job(budget.share(weight, left))
            left -= weight
        return assemble(
            self._targets,
            self._facts,
            prefill={hardware: (self._prefill[hardware], run) for hardware, run in self._prefill_runs.items()},
            decode={hardware: (self._decode[hardware], run) for hardware, run in self._decode_runs.items()},
            transfers=self.transfers,
            links=self._links,
            made=Made(
                date=self._settings.date,
                command=self._settings.command,
                version=self._settings.version,
                gpus=self._settings.gpus,
                seconds=time.perf_counter() - started_s,
                notes=self._notes,
            ),
        )

    async def _measure_prefill(self, target: Target, budget: Budget) -> None:
        settings = self._settings
        longest = min(settings.max_tokens, self._longest(target))
        lengths = settings.lengths or geometric(min(settings.min_tokens, longest), longest)
        await self._idle(target)
        self._say(f"prefill of {target.hardware} on {target.name}: {_numbers(lengths)} tokens")
        run = await measure_prefill(
            target.api,
            lengths,
            mode=target.info.mode,
            vocabulary=self._facts.vocabulary,
            repeats=settings.repeats,
            budget=budget,
            say=self._say,
        )
        self._note_run("prefill", "prefill", target, run)
        self._prefill_runs[target.hardware] = run

    async def _measure_transfers(self, pair: tuple[Target, Target], budget: Budget) -> None:
        source, sink = pair
        lengths = [int(point.x) for point in self._prefill_runs[source.hardware].points]
        lengths = [tokens for tokens in lengths if tokens <= self._longest(sink)]
        if not lengths:
            self._note(f"{sink.name} takes none of the lengths that {source.name} was measured with: nothing moved")
            return
        chosen = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
        await self._idle(source, sink)
        self._say(f"transfers from {source.name} to {sink.name}: {_numbers(chosen)} tokens")
        legs, between = await self._legs(sink, source), source.site != sink.site
        found = await measure_transfers(
            legs,
            chosen,
            self._settings.transfer_log,
            vocabulary=self._facts.vocabulary,
            repeats=self._settings.repeats,
            budget=budget.share(1, 2) if between else budget,
            say=self._say,
        )
        self.transfers[f"{source.name} to {sink.name}"] = found
        if found and between:
            await self._measure_link(source, sink, legs, found, budget)

    async def _measure_link(
        self, source: Target, sink: Target, legs: Legs, alone: Sequence[Transfer], budget: Budget
    ) -> None:
        """What several transfers at once get of the link, beside what one of them got."""
        settings = self._settings
        room_tokens = min((target.info.max_tokens for target in (source, sink) if target.info.max_tokens), default=0)
        lengths = sorted({transfer.tokens for transfer in alone})
        together = [tokens for tokens in lengths if not room_tokens or tokens * settings.at_once <= room_tokens]
        rounds = []
        if settings.at_once > 1:
            rounds = await measure_together(
                legs,
                together,
                settings.transfer_log,
                at_once=settings.at_once,
                vocabulary=self._facts.vocabulary,
                repeats=settings.repeats,
                budget=budget,
                say=self._say,
            )
            if not rounds:
                self._note("no time or KVCache was left for several transfers at once: the link may carry more")
        best = link_rate(alone, rounds)
        self._links.append(
            LinkProfile(
                from_site=source.site,
                to_site=sink.site,
                gbps=best.gbps,
                rtt_ms=await round_trip_s(source.api.url) * 1e3,
                tokens=best.tokens,
                transfers=len(alone) + sum(one.at_once for one in rounds),
                at_once=best.at_once,
            )
        )

    async def _measure_decode(self, target: Target, budget: Budget) -> None:
        settings = self._settings
        most = max(1, min(settings.max_batch, target.info.max_running))
        batches = settings.batches or geometric(1, most)
        contexts = sorted({min(tokens, self._longest(target) - settings.window_tokens) for tokens in settings.contexts})
        if contexts[0] < 1:
            raise PeerError(f"{target.name}: its {target.info.max_tokens} tokens of KVCache leave no room for a stream")
        source = self._partner(target)
        if target.info.mode == "decode" and source is None:
            raise ConfigError(f"{target.name} needs a prefill server to have KVCache from: give one with --prefill")
        await self._idle(target, *([source] if source else []))
        self._say(
            f"decode of {target.hardware} on {target.name}: {_numbers(batches)} streams of {_numbers(contexts)} tokens"
        )
        run = await measure_decode(
            await self._legs(target, source),
            batches,
            contexts,
            vocabulary=self._facts.vocabulary,
            window_tokens=settings.window_tokens,
            repeats=settings.repeats,
            kv_tokens=target.info.max_tokens,
            budget=budget,
            say=self._say,
        )
        self._note_run("decode", "decode step", target, run)
        self._decode_runs[target.hardware] = run

    def _pairs(self) -> list[tuple[Target, Target]]:
        """Every hardware's prefill server with the first decode server that takes KVCache."""
        sink = next((target for target in self._decode.values() if target.info.mode == "decode"), None)
        return [(source, sink) for source in self._prefill.values() if sink and source.info.mode == "prefill"]

    def _partner(self, sink: Target) -> Target | None:
        """The prefill server that a decode server is measured with: of its own site, if there is one."""
        if sink.info.mode == "plain":
            return None
        able = [target for target in self._targets if target.role == "prefill" and target.info.mode == "prefill"]
        return min(able, key=lambda target: target.site != sink.site, default=None)

    async def _legs(self, sink: Target, source: Target | None) -> Legs:
        if source is None:
            return Legs(decode=sink.api, shared=self._settings.allow_busy)
        return Legs(
            decode=sink.api,
            shared=self._settings.allow_busy,
            prefill=source.api,
            bootstrap_host=source.bootstrap_host,
            bootstrap_port=source.bootstrap_port or await source.api.bootstrap_port(),
        )

    async def _idle(self, *targets: Target) -> None:
        for target in targets:
            if await target.api.wait_idle(_IDLE_S):
                continue
            if not self._settings.allow_busy:
                raise PeerError(
                    f"{target.name} has requests in work: take it out of service, or give --allow-busy and get their "
                    "time in the figures, too"
                )
            self._note(f"{target.name} had other requests in work")

    def _longest(self, target: Target) -> int:
        """Tokens of the longest prompt that a server may take."""
        limits = [tokens for tokens in (target.info.max_tokens, self._facts.context_tokens) if tokens]
        return max(1, min(limits, default=self._settings.max_tokens) - _MARGIN_TOKENS)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._say(f"note: {text}")

    def _note_run(self, stage: str, unit: str, target: Target, run: PrefillRun | DecodeRun) -> None:
        """Note what a run left out, and repeats that differ. Raises PeerError where nothing was measured."""
        what = f"{stage} of {target.hardware}"
        if not run.points:
            raise PeerError(f"{target.name}: no {unit} was measured: {run.stopped}")
        if run.stopped:
            self._note(f"{what}: {run.stopped}")
        if found := noisy(run.points):
            shown = ", ".join(f"{point.x:g} ({point.spread_s / point.median_s:.0%} of the median)" for point in found)
            self._note(f"{what}: repeats differ much at {shown}; is anything else running there?")


def _first_of(targets: Sequence[Target], role: str) -> dict[str, Target]:
    """The first server of each hardware that has a role."""
    found: dict[str, Target] = {}
    for target in targets:
        if target.role == role:
            found.setdefault(target.hardware, target)
    return found


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
