"""Where SGLang's mode does not permit layers to be sent as they are written, and what the log says of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_prfaas.sglang_plugin import layerwise


class MLATokenToKVPool:
    """Of a kind that is known."""


class SomeOtherPool:
    """Of none that is."""


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler and a manager with which layers can be sent."""
    monkeypatch.setattr(layerwise, "_prefill_graph", lambda: "disabled")
    monkeypatch.setattr(layerwise, "buffers_of_layers", lambda pool, layers: {3: (0,)})
    pool = MLATokenToKVPool()
    return SimpleNamespace(
        scheduler=SimpleNamespace(
            enable_overlap=False,
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        ),
        manager=SimpleNamespace(
            config=SimpleNamespace(layerwise="auto"),
            server_args=SimpleNamespace(**dict.fromkeys(layerwise.FLAGS, False)),
            kv_args=SimpleNamespace(kv_layer_ids=[3]),
        ),
        pool=pool,
    )


def test_nothing_is_in_the_way(rank: Any) -> None:
    assert layerwise.obstacle(rank.scheduler, rank.manager, rank.pool) == ""


def off(rank: Any) -> None:
    rank.manager.config.layerwise = "off"


def overlap(rank: Any) -> None:
    rank.scheduler.enable_overlap = True


def speculation(rank: Any) -> None:
    rank.scheduler.spec_algorithm.is_none = lambda: False


def pool(rank: Any) -> None:
    rank.scheduler.token_to_kv_pool_allocator.get_kvcache = SomeOtherPool


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (off, "transport.layerwise is off"),
        (overlap, "the overlap schedule is on; --disable-overlap-schedule turns it off"),
        (speculation, "speculative decoding is on"),
        (pool, "nothing is known of the layers of a SomeOtherPool"),
    ],
)
def test_a_mode_that_is_in_the_way_is_one_line_of_the_log(
    rank: Any, caplog: pytest.LogCaptureFixture, change: Any, why: str
) -> None:
    caplog.set_level(logging.INFO)
    change(rank)
    assert layerwise.start(rank.scheduler, rank.manager) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"prfaas: KVCache is sent chunk by chunk, not layer by layer: {why}"
    ]


@pytest.mark.parametrize("flag", layerwise.FLAGS)
def test_flags_that_are_in_the_way(rank: Any, flag: str) -> None:
    setattr(rank.manager.server_args, flag, True)
    assert layerwise.obstacle(rank.scheduler, rank.manager, rank.pool) == f"--{flag.replace('_', '-')} is on"


def test_graphs_and_buffers(rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_prefill_graph", lambda: "piecewise")
    assert layerwise.obstacle(rank.scheduler, rank.manager, rank.pool) == (
        "prefill runs in CUDA graphs (piecewise); --disable-prefill-cuda-graph turns them off"
    )
    monkeypatch.setattr(layerwise, "_prefill_graph", lambda: "disabled")
    monkeypatch.setattr(layerwise, "buffers_of_layers", lambda pool, layers: {})
    assert layerwise.obstacle(rank.scheduler, rank.manager, rank.pool) == (
        "the buffers of the KVCache cannot be assigned to layers"
    )
