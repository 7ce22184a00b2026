"""What `launch cache` prints of an answer."""

from __future__ import annotations

import pytest

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.launch.cache import ask, render

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


def test_nobody_answers() -> None:
    with pytest.raises(LaunchError, match="is it running"):
        ask("http://127.0.0.1:9")
