"""A live router beside the usual one, on the same servers: decisions and reasons, a queue that moves t."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.launch.demo_client import Answer, complete
from sglang_prfaas.launch.local_deployment import MODEL_NAME
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, save_profile

from .driving import Driver, another_router, get, wait_for, words

pytestmark = pytest.mark.sglang

LINK_BYTES_PER_S = 125e6
SURGE = 8


def _line(seconds_per_token: float) -> PrefillProfile:
    return PrefillProfile(time_s=Curve((0.0, 1e6), (0.0, seconds_per_token * 1e6)), gpus=1, origin="for this test")


@pytest.fixture(scope="module")
def live(cluster: Driver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the live router. By its profile, 1 s of state crosses the link, and offloading pays from 500 tokens on."""
    directory: Path = tmp_path_factory.mktemp("live")
    profile = ProfileFile(
        model=MODEL_NAME,
        kv=KvLayout(full_bytes_per_token=1000.0, state_bytes=1.0 * LINK_BYTES_PER_S),
        prefill={"slow": _line(0.0025), "quick": _line(0.0005)},
        decode={},
    )
    save_profile(profile, directory / "profile.json")
    flags = {
        "policy.profile": str(directory / "profile.json"),
        "policy.correct_profile": "false",
        "policy.feed_tokens": "0",
        "policy.exact_count_band": "1",
        "sites.pd.hardware": "slow",
        "sites.prfaas.hardware": "quick",
        "sites.prfaas.links.pd.to_site": "pd",
        "sites.prfaas.links.pd.capacity_gbps": "1",
        "sites.prfaas.reports_port": "0",  # the movers' figures of this machine's loopback would overrule these
    }
    arguments = [word for key, value in flags.items() for word in (f"--{key}", value)]
    with another_router(cluster.cluster.deployment.router_file, directory / "router.log", *arguments) as url:
        yield url


def _ask(url: str, prompt: str, route: str = "") -> Answer:
    headers = {"x-prfaas-route": route} if route else {}
    return complete(url, MODEL_NAME, prompt, 16, headers=headers)


def _threshold(url: str) -> int:
    found: int = get(f"{url}/policy")["thresholds"]["pd"]["t_tokens"]
    return found


def test_short_ones_stay_long_ones_go_and_both_say_why(cluster: Driver, live: str) -> None:
    prompts = {"local": words("live and short", 60), "prfaas": words("live and long", 300)}
    for route, prompt in prompts.items():
        answer = _ask(live, prompt)
        assert answer.routing["route"] == route
        comparison = "<= t" if route == "local" else "> t"
        assert comparison in answer.routing["reason"]
        assert "t* " in answer.routing["reason"]
        assert float(answer.routing["held-ms"]) == 0.0
        cluster.assert_equal(answer, prompt)
    policy = get(f"{live}/policy")
    assert policy["mode"] == "live"
    newest = get(f"{live}/decisions?newest=1")["decisions"][0]
    assert newest["figures"]["prfaas_ttft_s"] < newest["figures"]["local_ttft_s"]
    assert newest["ttft_s"] > 0


def test_a_queue_that_surges_moves_the_threshold_and_back(cluster: Driver, live: str) -> None:
    """Of the surge one request is in the server's work, the others wait in the router; t rises at once."""
    prompts = [words(f"surge {number}", 500) for number in range(SURGE)]
    before = _threshold(live)
    with concurrent.futures.ThreadPoolExecutor(SURGE) as pool:
        surge = [pool.submit(_ask, live, prompt, "prfaas") for prompt in prompts]
        wait_for("requests held in the router", lambda: get(f"{live}/policy")["order"]["pd"]["prfaas"]["requests"] >= 3)
        wait_for("a higher threshold", lambda: _threshold(live) > before)
        answers = [request.result() for request in surge]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.routing["route"] == "prfaas"
        cluster.assert_equal(answer, prompt)
    assert sum(float(answer.routing["held-ms"]) > 0 for answer in answers) >= 3
    wait_for("the threshold of before", lambda: _threshold(live) <= before * 1.1)
