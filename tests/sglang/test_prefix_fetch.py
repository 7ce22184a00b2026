"""A prefix that only the other site's cache holds: fetched with keys, beside other work, where that is quicker.

Two real servers of a hybrid model, each with its own cache, stand for a prefill server of either site; the cache of one
is served to the other as its agent would. What tokens must be is computed in full, under salts of their own.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas import env
from sglang_prfaas.config.schema import CachePeerConfig, SiteConfig, TransportConfig
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, save_profile
from sglang_prfaas.site.cache_server import CacheServer
from sglang_prfaas.store.stats import StoreStats
from sglang_prfaas.transport.security import make
from tests.byte_relay import ByteRelay

from .driving import wait_for
from .store_server import OUTPUT_TOKENS, StoreServer, prompt

pytestmark = pytest.mark.sglang

LONG, SHORT = 280, 120
CURVE = Curve(x=(1, 200, 201, 400), y=(1e-6, 2e-6, 60.0, 120.0))
"""Up to 200 tokens computing takes no time, beyond them a minute."""
TAIL = prompt(3, 40)


class Gate(ByteRelay):
    """Can hold back, or cut, what comes from the far side after so many bytes."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.passed = 0
        self.stop_at = 1 << 60
        self.cut = False

    def stop_after(self, nbytes: int, *, cut: bool) -> None:
        self.reached.clear()
        self.stop_at, self.cut = self.passed + nbytes, cut
        if not cut:
            self.open.clear()

    def release(self) -> None:
        self.stop_at = 1 << 60
        self.open.set()

    def passing(self, data: bytes, *, from_far: bool) -> bool:
        if not from_far:
            return True
        self.passed += len(data)
        if self.passed > self.stop_at:
            self.reached.set()
            if self.cut:
                self.stop_at = 1 << 60
                return False
            self.open.wait()
        return True

    def __exit__(self, *details: object) -> None:
        self.release()
        super().__exit__(*details)


class Sites:
    """A server of either site, the cache of `pd` as it is served, and the way to it."""

    def __init__(self, pd: StoreServer, prfaas: StoreServer, served: CacheServer, gate: Gate) -> None:
        self.pd, self.prfaas, self.served, self.gate = pd, prfaas, served, gate

    def first_turn(self, seed: int, length: int) -> tuple[list[int], list[int]]:
        """Prefilled in the PD site, its cache written: the next turn's prompt, and that turn's tokens."""
        tokens = prompt(seed, length)
        kv = len(self.pd.component("kv"))
        first, cached, _ = self.pd.ask(tokens)
        assert cached == 0
        self.pd.wait_written(kv, length + OUTPUT_TOKENS - 1)
        turn = tokens + first + TAIL
        expected, cached, _ = self.pd.ask(turn, cache_salt=f"alone-{seed}")
        assert cached == 0
        return turn, expected

    @property
    def counters(self) -> StoreStats:
        """Of the PrfaaS server, as they were written last."""
        return self.prfaas.stats().counters

    def counted(self, what: str, reached: Callable[[StoreStats], bool]) -> StoreStats:
        """Once they say so."""

        def probe() -> StoreStats | None:
            now = self.counters
            return now if reached(now) else None

        return wait_for(f"{what} in the statistics", probe)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    base = tmp_path_factory.mktemp("fetch")
    keys = base / "keys"
    make.make_keys(keys, {"prfaas": (), "pd": ()}, now=datetime.datetime.now(datetime.UTC))
    profile = ProfileFile(
        model="tiny",
        kv=KvLayout(full_bytes_per_token=1.0),
        prefill={"cpu": PrefillProfile(time_s=CURVE, gpus=1, origin="made up, so that the choice is known")},
        decode={},
    )
    save_profile(profile, base / "profile.json")
    with ExitStack() as stack:
        pd = StoreServer("kimi-linear", base / "pd", 32 << 20)
        served = CacheServer(served_site(pd, keys))
        stack.callback(served.close)
        gate = stack.enter_context(Gate(served.port))
        prfaas = StoreServer(
            "kimi-linear",
            base / "prfaas",
            32 << 20,
            env=env.transport_to_env(TransportConfig(keys_dir=str(keys / "prfaas"))),
            peers=[CachePeerConfig(name="pd", host="127.0.0.1", port=gate.port)],
            prefill_profile=str(base / "profile.json"),
        )
        contexts = [pd.running("pd"), prfaas.running("prfaas")]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            starting = [pool.submit(context.__enter__) for context in contexts]
            concurrent.futures.wait(starting)
        for context, start in zip(contexts, starting, strict=True):
            if start.exception() is None:
                stack.push(context.__exit__)
        for start in starting:
            start.result()
        yield Sites(pd, prfaas, served, gate)


def served_site(pd: StoreServer, keys: Path) -> SiteConfig:
    """The PD site's configuration, as far as its cache is served by it, on a free port."""
    raw = {
        "site": {"name": "pd", "role": "pd", "model": str(pd.model)},
        "servers": [{"name": "p", "role": "prefill", "port": 30000}],
        "transport": {"keys_dir": str(keys / "pd")},
        "prefix_cache": {"backend": "local", "disk_dir": pd.config.disk_dir, "serve_to": ["prfaas"]},
    }
    return msgspec.convert(raw, SiteConfig)


def test_only_the_increment_is_computed_and_only_once_sent(sites: Sites) -> None:
    turn, expected = sites.first_turn(1, LONG)
    held = LONG + OUTPUT_TOKENS - 1
    before, before_served, own = sites.counters, sites.served.stats(), set(sites.prfaas.objects())
    assert sites.prfaas.ask(turn) == (expected, held, held)

    after = sites.counted("a fetch", lambda now: now.fetched_tokens > before.fetched_tokens)
    served = sites.served.stats()
    new = set(sites.prfaas.objects()) - own
    sent = sum(path.stat().st_size for name, path in sites.pd.objects().items() if name in new)
    assert (after.fetches - before.fetches, after.fetched_tokens - before.fetched_tokens) == (1, held)
    assert after.fetched_objects - before.fetched_objects == held + 1, "every token's page, and one state"
    assert after.fetched_bytes - before.fetched_bytes == served.bytes - before_served.bytes == sent
    assert after.fetch_saved_s > before.fetch_saved_s

    # From here on it is in the site's own tiers.
    sites.prfaas.flush()
    assert sites.prfaas.ask(turn[: held + 1] + prompt(9, 40))[1] == held
    assert sites.served.stats().bytes == served.bytes

    # Another tenant's prefix is neither used nor sent.
    sites.prfaas.flush()
    assert sites.prfaas.ask(turn, cache_salt="other")[:2] == (expected, 0)
    assert sites.served.stats().bytes == served.bytes


def test_the_choice_follows_the_curve(sites: Sites) -> None:
    turn, expected = sites.first_turn(2, SHORT)
    before, before_served = sites.counters, sites.served.stats()
    assert sites.prfaas.ask(turn) == (expected, 0, 0)
    after = sites.counted("a refusal", lambda now: now.fetch_refused > before.fetch_refused)
    assert (after.fetches, sites.served.stats().bytes) == (before.fetches, before_served.bytes)


def test_other_requests_are_computed_while_a_prefix_is_fetched(sites: Sites) -> None:
    turn, expected = sites.first_turn(4, LONG)
    before = sites.counters
    sites.gate.stop_after(20_000, cut=False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            waiting = pool.submit(sites.prfaas.ask, turn)
            assert sites.gate.reached.wait(60.0)
            other, cached, _ = sites.prfaas.ask(prompt(5, 60))
            assert (len(other), cached) == (OUTPUT_TOKENS, 0)
            assert not waiting.done(), "its prefix is still on the way"
        finally:
            sites.gate.release()
        assert waiting.result() == (expected, LONG + OUTPUT_TOKENS - 1, LONG + OUTPUT_TOKENS - 1)
    after = sites.counted("a fetch", lambda now: now.fetched_tokens > before.fetched_tokens)
    assert after.fetch_failed == before.fetch_failed


def test_a_fetch_cut_in_the_middle_is_computed(sites: Sites) -> None:
    turn, expected = sites.first_turn(6, LONG)
    before = sites.counters
    state_bytes = max(path.stat().st_size for path in sites.pd.component("mamba").values())
    sites.gate.stop_after(state_bytes + 20_000, cut=True)
    tokens, cached, _ = sites.prfaas.ask(turn)
    assert sites.gate.reached.is_set()
    assert (tokens, cached) == (expected, 0)
    after = sites.counted("a failed fetch", lambda now: now.fetch_failed > before.fetch_failed)
    assert (after.fetches, after.fetch_failed) == (before.fetches + 1, before.fetch_failed + 1)
    assert after.fetched_tokens == before.fetched_tokens
    assert state_bytes < after.fetched_bytes - before.fetched_bytes < state_bytes + 20_000

    # The peer rests for a second, which the other server's two turns take anyway; then it is asked again.
    turn, expected = sites.first_turn(7, LONG)
    assert sites.prfaas.ask(turn) == (expected, LONG + OUTPUT_TOKENS - 1, LONG + OUTPUT_TOKENS - 1)
