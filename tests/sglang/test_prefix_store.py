"""A server's prefix cache that outlives it: HiCache over the store, in real servers of every family that can.

Ring cannot: see docs/prefix_cache.md.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_prfaas.store.objects import frame_head, head_bytes

from .driving import wait_for
from .store_server import OUTPUT_TOKENS, PAGE_TOKENS, StoreServer, prompt

pytestmark = pytest.mark.sglang

SHARED_TOKENS = 200
"""Of the first prompt, that another one begins with: no checkpoint is there."""

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
        stats = server.stats()
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
