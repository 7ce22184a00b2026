"""A server's prefix cache that outlives it: HiCache over the store, in real servers of every family that can.

Ring cannot: see docs/prefix_cache.md.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config.schema import PrefixCacheConfig, SiteLimits
from sglang_prfaas.launch.local_deployment import STARTUP_TIMEOUT_S
from sglang_prfaas.site import Supervisor
from sglang_prfaas.site.commands import plain_command
from sglang_prfaas.site.free_ports import HeldPort
from sglang_prfaas.site.hicache import hicache_flags
from sglang_prfaas.site.threaded import LoopThread
from sglang_prfaas.store.objects import frame_head, head_bytes
from sglang_prfaas.store.stats import read_stats
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

from .driving import fetch, post, wait_for

pytestmark = pytest.mark.sglang

PAGE_TOKENS = 16
OUTPUT_TOKENS = 8
SHARED_TOKENS = 200
"""Of the first prompt, that another one begins with: no checkpoint is there."""

Answer = tuple[list[int], int, int]
"""Output tokens, cached tokens, and those of them that came from the store."""


class StoreServer:
    """One server with a prefix cache on disk, and what tests ask of it."""

    def __init__(self, family: str, directory: Path, host_bytes: int) -> None:
        self.family = family
        self.directory = directory
        self.config = PrefixCacheConfig(
            backend="local", host_bytes=host_bytes, disk_dir=str(directory / "store"), disk_bytes=256 << 20
        )
        self.page_tokens = PAGE_TOKENS if family in ("qwen3", "swa") else 1
        self.model = make_tiny_model(family, directory / "model")
        held = HeldPort()
        self.port = held.port
        held.release()

    @contextmanager
    def running(self, name: str) -> Iterator[StoreServer]:
        """Start the server, and stop it in the end. Every start takes the same directory."""
        args = (*cpu_server_args(self.family), *hicache_flags(self.config, "prefill", ()))
        args += (
            "--hicache-io-backend",
            "direct",
            "--hicache-mem-layout",
            "page_first_direct",
            "--hicache-ratio",
            "1.5",
        )
        args += ("--max-total-tokens", "4096", "--enable-cache-report", "--page-size", str(self.page_tokens))
        command = plain_command(name, str(self.model), self.port, args=args, env=cpu_server_env(self.family))
        limits = SiteLimits(startup_timeout_s=STARTUP_TIMEOUT_S)
        loop = LoopThread()
        supervisor = Supervisor([command], limits, self.directory / "logs")
        try:
            loop.run(supervisor.start())
            yield self
        finally:
            loop.run(supervisor.stop(at_once=True))
            loop.close()

    def ask(self, tokens: list[int], **options: Any) -> Answer:
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True},
            **options,
        }
        status, _, answer = post(f"http://127.0.0.1:{self.port}/generate", body)
        assert status == 200, answer
        meta = answer["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return answer["output_ids"], meta["cached_tokens"], details.get("storage", 0)

    def flush(self) -> None:
        """Empty the device's and HiCache's own host memory; the store keeps what it has."""
        wait_for(
            "flush of an idle server", lambda: fetch(f"http://127.0.0.1:{self.port}/flush_cache?timeout=10")[0] == 200
        )

    def objects(self) -> dict[str, Path]:
        """Finished objects on disk, by name."""
        found = {}
        for path in (self.directory / "store" / "objects").rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                found[data[26 : 26 + int.from_bytes(data[8:10], "little")].decode()] = path
        return found

    def component(self, name: str) -> dict[str, Path]:
        return {key: path for key, path in self.objects().items() if key.split("/")[1] == name}

    def wait_written(self, kv_before: int, tokens: int) -> None:
        """Wait until the store has the KV of so many more tokens, which comes after their state."""
        pages = tokens // self.page_tokens
        wait_for(f"{pages} more pages in the store", lambda: len(self.component("kv")) >= kv_before + pages)


def prompt(seed: int, length: int) -> list[int]:
    return [20 + (index * 7919 + seed * 104729 + index * index * seed) % 400 for index in range(length)]


FIRST = prompt(1, 280)
OTHER = prompt(2, 280)
TAIL = prompt(3, 40)


@pytest.fixture(scope="module", params=[("qwen3", "kimi-linear", "swa"), ("qwen3-next",)], ids="+".join)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreServer]]:
    """A server of each family, started together."""
    with ExitStack() as stack:
        made = [StoreServer(family, tmp_path_factory.mktemp(family), host_bytes=32 << 20) for family in request.param]
        with concurrent.futures.ThreadPoolExecutor(len(made)) as pool:
            contexts = [server.running(server.family) for server in made]
            starting = [pool.submit(context.__enter__) for context in contexts]
            concurrent.futures.wait(starting)
            for context, start in zip(contexts, starting, strict=True):
                if start.exception() is None:
                    stack.push(context.__exit__)
            yield [start.result() for start in starting]


def check_reuse(server: StoreServer) -> None:
    """A second turn takes its prefix from the store, with equal tokens; tenants, adapters and other prefixes do not."""
    hybrid = server.family not in ("qwen3", "swa")
    first, cached, _ = server.ask(FIRST)
    assert cached == 0
    turn = FIRST + first + TAIL
    fork = FIRST[:SHARED_TOKENS] + TAIL
    server.wait_written(0, len(FIRST) + OUTPUT_TOKENS - 1)
    kv = len(server.component("kv"))

    # Computed in full, under salts of their own: what the tokens must be. Another tenant's cache is of no use here.
    server.flush()
    expected, cached, _ = server.ask(turn, cache_salt="a")
    assert cached == 0
    server.flush()
    expected_fork, cached, _ = server.ask(fork, cache_salt="b")
    assert cached == 0
    # SGLang puts a LoRA adapter's id into the extra key.
    server.flush()
    separate, cached, _ = server.ask(turn, extra_key="adapter")
    assert (separate, cached) == (expected, 0)
    wait_for("pages of other tenants in the store", lambda: len(server.component("kv")) > kv)

    server.flush()
    tokens, cached, stored = server.ask(turn)
    reusable = (len(FIRST) + OUTPUT_TOKENS - 1) // server.page_tokens * server.page_tokens
    assert (cached, stored) == (reusable, reusable)
    assert tokens == expected

    # A prefix of the first prompt: pages of full attention are there, but state is only at checkpoints.
    server.flush()
    tokens, cached, stored = server.ask(fork)
    assert tokens == expected_fork
    if hybrid:
        assert cached == 0
    elif server.family == "qwen3":
        assert (cached, stored) == (SHARED_TOKENS // PAGE_TOKENS * PAGE_TOKENS,) * 2

    def counted() -> bool:
        (stats,) = read_stats(server.directory / "store" / "stats")
        counters = stats.counters
        return stats.backend == "local" and counters.usable_pages > 0 and counters.host_hits > 0

    wait_for("hits in the statistics", counted)


def test_a_second_turn_takes_its_prefix_from_the_store(servers: list[StoreServer]) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(servers)) as pool:
        failures = [
            f"{server.family}: {error!r}"
            for server, done in [(server, pool.submit(check_reuse, server)) for server in servers]
            if (error := done.exception()) is not None
        ]
    assert not failures, "\n".join(failures)


def test_after_a_restart_and_only_with_the_right_state(tmp_path: Path) -> None:
    """Kimi Linear, stopped and started again, with nothing but the disk: the tokens are those of the first run. Then
    the state of another prompt, put in the place of the right one, changes them; and a damaged file is a miss."""
    server = StoreServer("kimi-linear", tmp_path, host_bytes=0)
    with server.running("before"):
        first, _, _ = server.ask(FIRST)
        server.wait_written(0, len(FIRST) + OUTPUT_TOKENS - 1)
        right = server.component("mamba")
        kv = len(server.component("kv"))
        server.ask(OTHER)
        server.wait_written(kv, len(OTHER) + OUTPUT_TOKENS - 1)
        wrong = {name: path for name, path in server.component("mamba").items() if name not in right}
        turn = FIRST + first + TAIL
        server.flush()
        expected, cached, _ = server.ask(turn, cache_salt="a")
        assert cached == 0
    with server.running("after"):
        reusable = len(FIRST) + OUTPUT_TOKENS - 1
        assert server.ask(turn) == (expected, reusable, reusable)
        _replace_states(right, wrong)
        server.flush()
        tokens, cached, _ = server.ask(FIRST + first + prompt(4, 40))
        server.flush()
        honest, _, _ = server.ask(FIRST + first + prompt(4, 40), cache_salt="c")
        assert cached == reusable
        assert tokens != honest, "a wrong state must show, or this test shows nothing"
        for path in right.values():
            path.write_bytes(path.read_bytes()[:-1])
        server.flush()
        tokens, cached, _ = server.ask(FIRST + first + prompt(5, 40))
        server.flush()
        honest, _, _ = server.ask(FIRST + first + prompt(5, 40), cache_salt="d")
        assert (tokens, cached) == (honest, 0)


def _replace_states(right: dict[str, Path], wrong: dict[str, Path]) -> None:
    """Put other states under these names, with checksums that fit."""
    name, path = max(wrong.items())
    payload = path.read_bytes()[head_bytes(name) :]
    for other, place in right.items():
        place.write_bytes(frame_head(other, memoryview(payload)) + payload)
