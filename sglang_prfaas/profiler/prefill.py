"""T_prefill(l) of one server, measured over a grid of lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from sglang_prfaas.errors import PeerError
from sglang_prfaas.profiler.budget import SLACK_S, Budget
from sglang_prfaas.profiler.sglang_api import FAKE_BOOTSTRAP_HOST, Pair, RefusedError, ServerApi, unique_prompt
from sglang_prfaas.profiler.summary import summarise
from sglang_prfaas.scheduler.profiles import MeasuredPoint

CACHED_SHARE = 0.02
"""Share of a prompt that a server may have found in its cache; random tokens share a prefix of a few at most."""
CACHED_TOKENS = 16
EXTRA_REPEATS = 2
"""Further samples of a length where outliers were left out."""


class PrefillRun(Struct, kw_only=True):
    """What measuring one server gave."""

    points: list[MeasuredPoint]
    samples: dict[int, list[float]]
    """Seconds of every repeat, by length, outliers included."""
    stopped: str = ""
    """Why longer lengths were not measured; empty where all were."""


async def measure_prefill(
    server: ServerApi,
    lengths: Sequence[int],
    *,
    mode: str,
    vocabulary: int,
    repeats: int,
    budget: Budget,
    say: Callable[[str], None],
) -> PrefillRun:
    """Time single prefills, one after the other, from the shortest length on; each length has one more for warm-up.

    mode: plain, or prefill (its KVCache goes nowhere). Stops at the first length that the server refuses or that the
    budget has no time for. Raises PeerError where the server fails, or finds prompts in its cache that are new.
    """
    run = PrefillRun(points=[], samples={})

    async def one(tokens: int) -> float:
        pair = Pair(bootstrap_host=FAKE_BOOTSTRAP_HOST) if mode == "prefill" else None
        answer = await server.generate(unique_prompt(tokens, vocabulary), 1, pair, timeout_s=budget.left_s + SLACK_S)
        if answer.cached_tokens > CACHED_TOKENS + CACHED_SHARE * tokens:
            raise PeerError(f"{server.url} says that {answer.cached_tokens} of {tokens} random tokens were cached")
        return answer.seconds

    expected_s = 0.0
    for tokens in sorted(lengths):
        if not budget.fits(2 * expected_s):
            run.stopped = f"no time left for {tokens} tokens; give --budget-s more"
            break
        try:
            warm_s = await one(tokens)
        except RefusedError as error:
            run.stopped = f"{tokens} tokens are refused: {error}"
            break
        samples: list[float] = []
        point = None
        while len(samples) < repeats or (point and point.outliers and len(samples) < repeats + EXTRA_REPEATS):
            if samples and not budget.fits(max(samples)):
                break
            samples.append(await one(tokens))
            point = summarise(tokens, samples)
        assert point is not None
        run.points.append(point)
        run.samples[tokens] = samples
        expected_s = 2 * max(warm_s, point.median_s)
        say(f"{tokens} tokens: {point.median_s * 1e3:.1f} ms ({point.repeats} repeats)")
    return run
