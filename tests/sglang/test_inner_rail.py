"""One decode server takes KVCache of its own site over Mooncake and of the other site over prfaas, on real SGLang."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import random
from typing import Any

import pytest

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.launch.local_deployment import Choices
from sglang_prfaas.sglang_plugin.inner_rail.packages import require
from sglang_prfaas.transport.transfer_log import TransferRecord

from .driving import DECODE, LOCAL, REMOTE, Driver, fetch, post, wait_for
from .prefill_by_prfaas import assert_equal, body

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module", autouse=True)
def _mooncake() -> None:
    """Skips where Mooncake does not load, and says what to install."""
    try:
        require("mooncake")
    except LaunchError as error:
        pytest.skip(str(error))


RAIL = Choices(
    family="kimi-linear",
    chunk_tokens=512,
    keys=True,
    env={"MOONCAKE_PROTOCOL": "tcp", "SGLANG_HOST_IP": "127.0.0.1"},
    transport={"pd": {"inner_rail": "mooncake"}},
)


def pair_of(cluster: Driver, prefill: str, prompt: list[int], room: int) -> dict[str, Any]:
    """A request as both servers get it."""
    site = cluster.cluster.sites["prfaas" if prefill == REMOTE else "pd"]
    port = site.server(prefill).command.bootstrap_port
    return {**body(prompt), "bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}


def through(cluster: Driver, prefill: str, decode: str, prompt: list[int], samples: int = 1) -> list[TransferRecord]:
    """A prompt through two servers of our choice, compared with the single server; what both noted of its transfer."""
    room = random.getrandbits(63)
    pair = pair_of(cluster, prefill, prompt, room)
    pair["sampling_params"]["n"] = samples
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        legs = [pool.submit(post, f"{cluster.url(name)}/generate", pair) for name in (prefill, decode)]
    (p_status, _, p_answer), (d_status, _, answer) = (leg.result() for leg in legs)
    assert (p_status, d_status) == (200, 200), (p_answer, answer)
    expected = post(f"{cluster.reference_url}/generate", body(prompt))[2]
    for sample in answer if samples > 1 else [answer]:
        assert_equal(sample, expected)
    return cluster.records(room, 2 * samples)


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

    def test_samples_of_one_prompt_share_a_room(self, family_cluster: Driver) -> None:
        records = through(family_cluster, LOCAL, DECODE, prompt_of("samples", 200), samples=3)
        assert {(r.status, r.rail) for r in records} == {("done", "mooncake")}, records

    def test_metrics_tell_the_rails_apart(self, family_cluster: Driver) -> None:
        _, _, text = fetch(f"{family_cluster.url(DECODE)}/metrics")
        lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("prfaas_"))
        counted = {name: float(value) for name, _, value in lines}
        for rail in ("mooncake", "prfaas"):
            assert counted[f'prfaas_transfers_total{{rail="{rail}",role="decode",status="done"}}'] >= 4
            assert counted[f'prfaas_transfer_bytes_total{{rail="{rail}",role="decode",status="done"}}'] > 0

    def test_an_abort_of_either_leg_frees_its_server(self, family_cluster: Driver) -> None:
        """The decode leg alone waits for prefill on the rail, the prefill leg alone for decode on both."""
        cluster = family_cluster
        for name, waits in ((DECODE, "transfer"), (LOCAL, "bootstrap")):
            pair = pair_of(cluster, LOCAL, prompt_of(f"aborted {name}", 300), random.getrandbits(63))
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                leg = pool.submit(post, f"{cluster.url(name)}/generate", pair)
                wait_for(f"the request to wait in {name}", lambda name=name, waits=waits: waiting(cluster, name, waits))
                wait_for(f"the end of the leg in {name}", lambda name=name, leg=leg: aborted(cluster, name, leg))
            (record,) = cluster.records(pair["bootstrap_room"], 1)
            assert record.status == "failed", record
            cluster.wait_idle(name)
        through(cluster, LOCAL, DECODE, prompt_of("after the aborts", 300))

    def test_roles_change_with_the_rail(self, family_cluster: Driver) -> None:
        """The server that was decode sends over the rail to the one that was prefill, which takes from the other site
        too; and back, where both rails have begun anew."""
        cluster = family_cluster
        for prefill, decode in ((DECODE, LOCAL), (LOCAL, DECODE)):
            cluster.switch_role(prefill, "prefill")
            cluster.switch_role(decode, "decode")
            for sender, rail in ((prefill, "mooncake"), (REMOTE, "prfaas")):
                records = through(cluster, sender, decode, prompt_of(f"{sender} to {decode}", 600))
                assert [(r.status, r.rail) for r in records] == [("done", rail)] * 2, records

    def test_a_killed_prefill_server_fails_its_requests_with_a_reason(self, family_cluster: Driver) -> None:
        cluster = family_cluster
        cluster.cluster.sites["pd"].wait_ready(LOCAL)
        pair = pair_of(cluster, LOCAL, prompt_of("killed", 8000), random.getrandbits(63))
        offset = cluster.log_size(LOCAL)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            pool.submit(_post_to_killed, f"{cluster.url(LOCAL)}/generate", pair)
            leg = pool.submit(post, f"{cluster.url(DECODE)}/generate", pair)
            wait_for("a prefill under way", lambda: cluster.prefill_batches_since(LOCAL, offset))
            cluster.cluster.sites["pd"].kill(LOCAL)
            status, _, answer = leg.result()
        assert status == 500, answer
        assert "prefill 127.0.0.1:" in str(answer), "the session's reason"
        record = next(r for r in cluster.records(pair["bootstrap_room"], 1) if r.role == "decode")
        assert (record.status, record.rail) == ("failed", "mooncake")
        cluster.wait_idle(DECODE)
        through(cluster, REMOTE, DECODE, prompt_of("after the kill", 300))


def waiting(cluster: Driver, name: str, queue: str) -> bool:
    """Whether a server has a request in a queue of disaggregation."""
    queues = cluster.loads(name)["disaggregation"]
    return any(value for key, value in queues.items() if queue in key and key.endswith("_reqs"))


def aborted(cluster: Driver, name: str, leg: concurrent.futures.Future[Any]) -> bool:
    """Abort whatever a server has; whether a request to it has ended."""
    post(f"{cluster.url(name)}/abort_request", {"abort_all": True})
    return leg.done()


def _post_to_killed(url: str, body: Any) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        post(url, body)
