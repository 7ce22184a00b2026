"""Time of a decode step against the batch: concurrent streams on one decode server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from sglang_prfaas.errors import PeerError
from sglang_prfaas.profiler.budget import SLACK_S, Budget
from sglang_prfaas.profiler.sglang_api import Pair, RefusedError, ServerApi, Stream, unique_prompt
from sglang_prfaas.profiler.summary import summarise
from sglang_prfaas.scheduler.profiles import MeasuredPoint

_IDLE_S = 30.0
"""How long an aborted batch may take to leave the server."""
_SHARED_IDLE_S = 5.0
"""The same where others keep the server busy; SGLang notices a closed stream within about 2 s."""


class Legs(Struct, frozen=True, kw_only=True):
    """Where a request's two legs go: decode alone for a plain server."""

    decode: ServerApi
    prefill: ServerApi | None = None
    bootstrap_host: str = ""
    bootstrap_port: int = 0
    shared: bool = False
    """Whether the decode server may have other requests in work."""

    def pair(self) -> Pair | None:
        """The fields of a new request."""
        if self.prefill is None:
            return None
        return Pair(bootstrap_host=self.bootstrap_host, bootstrap_port=self.bootstrap_port)


class BatchResult(Struct, frozen=True, kw_only=True):
    """Streams that ran side by side."""

    step_s: float
    """Median over the streams of the time between two tokens."""
    first_token_s: float
    """Until the last stream had its first token."""
    seconds: float


class Window:
    """The time in which all streams of a batch run."""

    def __init__(self, streams: Sequence[Stream], events: int) -> None:
        self.streams = streams
        self._events = events
        self._before: list[int] = []

    def over(self) -> bool:
        """Whether every stream had its events since the last one began, or they can no longer all run at once."""
        streams = self.streams
        if any(stream.error or stream.ended for stream in streams):
            return True
        if not self._before:
            if not all(stream.events for stream in streams):
                return False
            self._before = [len(stream.events) for stream in streams]
        return all(
            len(stream.events) - before >= self._events for stream, before in zip(streams, self._before, strict=True)
        )


class DecodeRun(Struct, kw_only=True):
    """What measuring one decode server gave."""

    points: list[MeasuredPoint]
    samples: dict[str, list[float]]
    """Step times of every repeat, by "context x batch"."""
    stopped: str = ""


async def measure_decode(
    legs: Legs,
    batches: Sequence[int],
    contexts: Sequence[int],
    *,
    vocabulary: int,
    window_tokens: int,
    repeats: int,
    kv_tokens: int,
    budget: Budget,
    say: Callable[[str], None],
) -> DecodeRun:
    """Step times for every context length and batch, from small to large; a batch that the server does not run at once
    ends its context. kv_tokens: KVCache slots of the server. Raises PeerError where a server fails."""
    run = DecodeRun(points=[], samples={})
    contexts = sorted(contexts)
    for index, context in enumerate(contexts):
        own = budget.share(1, len(contexts) - index)
        step_s = first_s = spent_s = 0.0
        for batch in sorted(batches):
            # What the first streams generate until the last one has its first token, if prefills come one by one.
            head_start = math.ceil(2 * first_s * batch / step_s) if step_s else 0
            limit = kv_tokens // batch - context - 1
            if limit < window_tokens:
                run.stopped = f"{batch} streams of {context} tokens do not fit into {kv_tokens} tokens of KVCache"
                break
            if not own.fits(2 * spent_s):
                run.stopped = f"no time left for a batch of {batch} at {context} tokens; give --budget-s more"
                break
            samples: list[float] = []
            stopped = ""
            for repeat in range(repeats + 1):  # the first is the warm-up
                if samples and not own.fits(spent_s):
                    break
                max_tokens = min(limit, window_tokens + 16 + head_start)
                try:
                    result = await _run_unique(legs, batch, context, vocabulary, max_tokens, window_tokens, own)
                    if result is None and max_tokens < limit:
                        result = await _run_unique(legs, batch, context, vocabulary, limit, window_tokens, own)
                except RefusedError as error:
                    stopped = f"{batch} streams of {context} tokens are refused: {error}"
                    break
                if result is None:
                    stopped = f"the server does not run {batch} streams of {context} tokens at once"
                    break
                step_s, spent_s = result.step_s, result.seconds
                first_s = max(first_s, result.first_token_s / batch) if repeat else result.first_token_s / batch
                if repeat:
                    samples.append(result.step_s)
            if stopped:
                run.stopped = stopped
                break
            point = summarise(batch, samples, context)
            run.points.append(point)
            run.samples[f"{context} x {batch}"] = samples
            say(f"{batch} streams of {context} tokens: {point.median_s * 1e3:.2f} ms a step")
    return run


async def _run_unique(
    legs: Legs, batch: int, context: int, vocabulary: int, max_tokens: int, window_tokens: int, budget: Budget
) -> BatchResult | None:
    prompts = [unique_prompt(context, vocabulary) for _ in range(batch)]
    return await run_batch(legs, prompts, max_tokens, window_tokens, timeout_s=budget.left_s + SLACK_S)


async def run_batch(
    legs: Legs, prompts: Sequence[Sequence[int]], max_tokens: int, window_tokens: int, *, timeout_s: float
) -> BatchResult | None:
    """Run prompts side by side until each stream has `window_tokens` more events since the last one began; the streams
    are then closed. None where they never all ran at once. Raises PeerError."""
    news = asyncio.Event()
    window = Window([Stream(news.set) for _ in prompts], window_tokens)
    streams = window.streams
    started_s = time.perf_counter()
    prefills: list[asyncio.Task[object]] = []
    with contextlib.ExitStack() as stack:
        for prompt, sink in zip(prompts, streams, strict=True):
            pair = legs.pair()
            if legs.prefill is not None:
                leg = legs.prefill.generate(prompt, max_tokens, pair, timeout_s=timeout_s)
                prefills.append(asyncio.create_task(leg))
                prefills[-1].add_done_callback(lambda _: news.set())
            stack.enter_context(legs.decode.stream(prompt, max_tokens, pair, sink, timeout_s=timeout_s))
        try:
            while not window.over():
                await news.wait()
                news.clear()
                for task in prefills:
                    if task.done():
                        task.result()
        finally:
            for task in prefills:
                task.cancel()
            await asyncio.gather(*prefills, return_exceptions=True)
    for stream in streams:
        if stream.error:
            raise PeerError(f"{legs.decode.url}: a stream of {len(prompts[0])} tokens failed: {stream.error}")
    if not await legs.decode.wait_idle(_SHARED_IDLE_S if legs.shared else _IDLE_S) and not legs.shared:
        raise PeerError(f"{legs.decode.url} still has requests in work {_IDLE_S:g} s after its streams were closed")
    step_s = step_time(streams)
    if step_s is None:
        return None
    return BatchResult(
        step_s=step_s,
        first_token_s=max(stream.events[0][0] for stream in streams) - started_s,
        seconds=time.perf_counter() - started_s,
    )


def step_time(streams: Sequence[Stream]) -> float | None:
    """Median over the streams of the time between tokens while all of them ran. None where they did not."""
    if not all(stream.events for stream in streams):
        return None
    begun_s = max(stream.events[0][0] for stream in streams)
    ended_s = min(stream.events[-1][0] for stream in streams)
    steps = []
    for stream in streams:
        inside = [(at_s, tokens) for at_s, tokens in stream.events if begun_s <= at_s <= ended_s]
        if len(inside) < 3 or inside[-1][1] <= inside[0][1]:
            return None
        steps.append((inside[-1][0] - inside[0][0]) / (inside[-1][1] - inside[0][1]))
    return statistics.median(steps)
