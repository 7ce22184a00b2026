"""Prefill and decode of different tensor-parallel widths on real SGLang, 1:2, then 2:1 in changed roles: Kimi Linear
over prfaas from the other site and, where Mooncake loads, over the inner rail; sliding windows, with other page sizes.
"""

from __future__ import annotations

import pytest

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.launch.local_deployment import Choices
from sglang_prfaas.sglang_plugin.inner_rail.packages import require

from .driving import DECODE, LOCAL, REMOTE, Driver
from .test_role_switch import through

pytestmark = pytest.mark.sglang

TWO_RANKS = ("--tp", "2")
BOUND = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def rail() -> str:
    """Of the PD site: Mooncake, or none where it does not load."""
    try:
        require("mooncake")
    except LaunchError:
        return "none"
    return "mooncake"


WIDE_DECODE = Choices(
    family="kimi-linear",
    chunk_tokens=512,
    env={"MOONCAKE_PROTOCOL": "tcp", "SGLANG_HOST_IP": "127.0.0.1"},
    transport={"pd": {"inner_rail": rail()}},
    decode_args=TWO_RANKS,
    decode_env=BOUND,
)
WIDE_DECODE_LARGE_PAGES = Choices(
    family="swa",
    chunk_tokens=512,
    prefill_args=("--page-size", "16"),
    decode_args=(*TWO_RANKS, "--page-size", "64"),
    decode_env=BOUND,
)


@pytest.mark.parametrize("family_cluster", [WIDE_DECODE], indirect=True, ids=["kimi-linear"])
def test_tokens_equal_those_of_a_single_server(family_cluster: Driver) -> None:
    cluster = family_cluster
    for seed in (11, 12):
        through(cluster, REMOTE, DECODE, seed)
        through(cluster, LOCAL, DECODE, seed + 100)
    cluster.switch_role(DECODE, "prefill")
    cluster.switch_role(LOCAL, "decode")
    for seed in (21, 22):
        through(cluster, DECODE, LOCAL, seed)
    done = {(r.rail, r.role, r.rank, r.server) for r in cluster.all_records() if r.status == "done" and r.pages == 700}
    inner = rail() if rail() != "none" else "prfaas"
    expected = {("prfaas", "prefill", 0, REMOTE), ("prfaas", "decode", 0, DECODE), ("prfaas", "decode", 1, DECODE)}
    for wide, narrow in (("decode", "prefill"), ("prefill", "decode")):
        expected |= {(inner, wide, 0, DECODE), (inner, wide, 1, DECODE), (inner, narrow, 0, LOCAL)}
    assert done == expected, "all ranks took part, each over its way"


@pytest.mark.parametrize("family_cluster", [WIDE_DECODE_LARGE_PAGES], indirect=True, ids=["swa"])
def test_sliding_windows_and_other_page_sizes(family_cluster: Driver) -> None:
    """Full-attention and window pages of 16 tokens to two ranks with pages of 64, and back in changed roles."""
    cluster = family_cluster
    for seed, length in ((11, 700), (12, 640), (13, 90), (14, 5)):
        through(cluster, LOCAL, DECODE, seed, length=length)
    cluster.switch_role(DECODE, "prefill")
    cluster.switch_role(LOCAL, "decode")
    for seed, length in ((21, 700), (22, 640), (23, 90), (24, 5)):
        first = through(cluster, DECODE, LOCAL, seed, length=length)
        through(cluster, DECODE, LOCAL, seed, more=first, length=length)  # decode has its beginning cached
    pages = {(r.server, r.role, r.rank, r.pages) for r in cluster.all_records() if r.status == "done"}
    for role in ("prefill", "decode"):
        assert {(LOCAL, role, 0, 44), (DECODE, role, 0, 11), (DECODE, role, 1, 11)} <= pages
