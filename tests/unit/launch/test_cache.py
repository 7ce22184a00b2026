"""What `launch cache` prints of an answer."""

from __future__ import annotations

import msgspec

from sglang_prfaas.launch.cache import render
from sglang_prfaas.store.stats import StatsFile, StoreStats

FIGURES = {"told_prompt_tokens": 2000, "hit_tokens": 500, "broken_promises": 1}
ANSWER = {
    "enabled": True,
    "bytes_per_token": 2**20,
    "state_bytes": 2**21,
    "blocks": 12,
    "max_blocks": 100,
    "index_bytes": 2**20,
    "dropped_blocks": 3,
    "figures": FIGURES,
    "sites": {"home": FIGURES},
    "caches": [
        {
            "site": "home",
            "server": "p0",
            "dp_rank": 1,
            "block_tokens": 64,
            "held": {"device": 10, "host": 2, "disk": 0, "states": 4},
        },
        {"site": "home", "server": "d0", "dp_rank": 0, "block_tokens": 0, "held": None},
    ],
}


def test_a_routers_answer() -> None:
    text = render(ANSWER)
    assert "home/p0 rank 1     64      10     2     0            4            640  648.0" in text
    assert "index: 12 of 100 blocks, 1.0 MiB, 3 left out" in text
    assert "all sites: 500 of 2000 prompt tokens cached (25.0%), 500.0 MiB of KV not computed again; 1 broken" in text
    assert "home: 500 of 2000" in text


def test_an_answer_without_an_index_says_why() -> None:
    assert "prefix_index.enabled" in render({"enabled": False})


def test_what_an_agents_stores_saved_and_moved() -> None:
    mib = 2**20
    first = StoreStats(
        host_read_bytes=3 * mib, backend_read_bytes=mib, backend_written_bytes=6 * mib, queried_pages=8, usable_pages=5
    )
    second = StoreStats(
        backend_read_bytes=mib,
        fetch_questions=3,
        fetches=2,
        fetched_bytes=7 * mib,
        fetched_tokens=900,
        fetch_saved_s=1.5,
    )
    stores = [
        StatsFile(
            name=name,
            backend="local",
            pid=1,
            host_limit_bytes=0,
            backend_limit_bytes=0,
            host_used_bytes=0,
            backend_used_bytes=2 * mib,
            counters=counters,
        )
        for name, counters in (("pd-p0", first), ("pd-p1", second))
    ]
    text = render(
        ANSWER
        | {"figures": None, "sites": None, "store": msgspec.to_builtins(stores), "served": {"bytes": mib, "objects": 4}}
    )
    assert "store of pd-p0 (local): 2.0 MiB held, 4.0 MiB read, 6.0 MiB written, 5 of 8 pages asked for usable" in text
    assert "saved: 5.0 MiB of KV and states read here, 7.0 MiB fetched, not computed" in text
    assert "moved: 7.0 MiB from other sites, for 900 tokens in 2 fetches (0 failed, 0 slower than computing)" in text
    assert "sent to other sites: 1.0 MiB in 4 pages and states" in text
