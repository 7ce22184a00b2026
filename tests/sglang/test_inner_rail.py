"""One decode server takes KVCache of its own site over Mooncake and of the other site over prfaas, on real SGLang."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import math
import random
from typing import Any

import pytest

from sglang_prfaas.launch.local_deployment import Choices
from sglang_prfaas.transport.transfer_log import TransferRecord

from .driving import DECODE, LOCAL, REMOTE, Driver, fetch, post, wait_for
from .prefill_by_prfaas import assert_equal, body

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(
        importlib.util.find_spec("mooncake") is None,
        reason="mooncake is not installed: pip install 'sglang-prfaas[mooncake]'",
    ),
]

RAIL = Choices(
    family="kimi-linear",
    chunk_tokens=512,
    keys=True,
    env={"MOONCAKE_PROTOCOL": "tcp", "SGLANG_HOST_IP": "127.0.0.1"},
    transport={"pd": {"inner_rail": "mooncake"}},
)


def through(cluster: Driver, prefill: str, decode: str, prompt: list[int], **options: Any) -> list[TransferRecord]:
    """A prompt through two servers of our choice, compared with the single server; what both noted of its transfer."""
    room = random.getrandbits(63)
    site = cluster.cluster.sites["prfaas" if prefill == REMOTE else "pd"]
    pair = {
        **body(prompt),
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": site.server(prefill).command.bootstrap_port,
        "bootstrap_room": room,
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        legs = [pool.submit(post, f"{cluster.url(name)}/generate", pair) for name in (prefill, decode)]
    (p_status, _, p_answer), (d_status, _, answer) = (leg.result() for leg in legs)
    assert (p_status, d_status) == (200, 200), (p_answer, answer)
    assert_equal(answer, post(f"{cluster.reference_url}/generate", body(prompt))[2])
    return cluster.records(room)


def prompt_of(seed: str, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(10, 500) for _ in range(length)]


@pytest.mark.parametrize("family_cluster", [RAIL], indirect=True, ids=["kimi-linear"])
class TestInnerRail:
    def test_each_prefill_comes_over_the_rail_of_its_site(self, family_cluster: Driver) -> None:
        for length in (3, 65, 700, 1300):
            prompt = prompt_of(f"rails {length}", length)
            for prefill, rail in ((LOCAL, "mooncake"), (REMOTE, "prfaas")):
                records = through(family_cluster, prefill, DECODE, prompt)
                assert [(r.status, r.rail) for r in records] == [("done", rail)] * 2, records
                assert all(r.bytes for r in records)
