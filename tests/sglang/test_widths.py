"""Prefill and decode of different tensor-parallel widths on real SGLang: Kimi Linear 1:2, then 2:1 in changed roles."""

from __future__ import annotations

import pytest

from sglang_prfaas.launch.local_deployment import Choices

from .driving import DECODE, LOCAL, Driver
from .test_role_switch import through

pytestmark = pytest.mark.sglang

WIDE_DECODE = Choices(
    family="kimi-linear",
    chunk_tokens=512,
    decode_args=("--tp", "2"),
    decode_env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
)


@pytest.mark.parametrize("family_cluster", [WIDE_DECODE], indirect=True, ids=["kimi-linear"])
def test_tokens_equal_those_of_a_single_server(family_cluster: Driver) -> None:
    cluster = family_cluster
    for seed in (11, 12):
        through(cluster, LOCAL, DECODE, seed)
    cluster.switch_role(DECODE, "prefill")
    cluster.switch_role(LOCAL, "decode")
    for seed in (21, 22):
        through(cluster, DECODE, LOCAL, seed)
    done = {(r.role, r.rank): r.bytes for r in cluster.all_records() if r.status == "done" and r.pages == 700}
    assert {("prefill", 0), ("prefill", 1), ("decode", 0), ("decode", 1)} <= set(done), "all ranks took part"
