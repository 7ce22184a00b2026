"""A link that is really throttled moves the threshold: two sites of real servers in a network namespace of their own,
whose loopback carries what prefill sends to decode at a rate that tc sets."""

from __future__ import annotations

import concurrent.futures
import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.launch.demo_client import complete
from sglang_prfaas.launch.local_deployment import MODEL_NAME, Choices, LocalDeployment, write_deployment
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, save_profile
from sglang_prfaas.site import Site, running
from tests.transport.namespaces import Namespace, obstacle

from .driving import REMOTE, another_router, get, wait_for, words

pytestmark = pytest.mark.sglang

CONFIGURED_GBPS = 1.0
THROTTLED_MBPS = 4.0
SLOW_GBPS = 0.016
"""A link that carries less puts t above HIGH_T."""
LOW_T, HIGH_T = 20_000, 50_000
MOVER_PORTS = (47_310, 47_311)
"""Control and data, in a namespace where nobody else has ports."""


def _line(seconds_per_token: float) -> PrefillProfile:
    return PrefillProfile(time_s=Curve((0.0, 1e6), (0.0, seconds_per_token * 1e6)), gpus=1, origin="for this test")


PROFILE = ProfileFile(
    model=MODEL_NAME,
    # The configured link takes 1 s for the state; offloading gains 1 s at 500 tokens.
    kv=KvLayout(full_bytes_per_token=1000.0, state_bytes=CONFIGURED_GBPS * 125e6),
    prefill={"slow": _line(0.0025), "quick": _line(0.0005)},
    decode={},
)


def set_up() -> None:
    """What leaves the mover's data port of this namespace has a class of its own; all else is not slowed down."""
    _run("ip link set lo mtu 1500")
    _run("tc qdisc add dev lo root handle 1: htb default 1")
    _run("tc class add dev lo parent 1: classid 1:1 htb rate 10gbit")
    _run(f"tc filter add dev lo parent 1: protocol ip u32 match ip sport {MOVER_PORTS[1]} 0xffff flowid 1:2")
    throttle(1000 * CONFIGURED_GBPS, "add")
    _run("tc qdisc add dev lo parent 1:2 pfifo limit 64")


def throttle(mbps: float, how: str = "change") -> None:
    """What the mover's link carries from now on."""
    _run(f"tc class {how} dev lo parent 1: classid 1:2 htb rate {mbps:g}mbit ceil {mbps:g}mbit burst 32kb")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """A network namespace where loopback can be throttled."""
    if why := obstacle():
        pytest.skip(why)
    made = Namespace()
    try:
        try:
            made.call(set_up)
        except OSError as error:
            pytest.skip(f"this kernel does not throttle loopback: {error}")
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def two_sites(directory: Path) -> Iterator[LocalDeployment]:
    """A PrfaaS and a PD site, without the single server to compare with."""
    deployment = write_deployment(directory, Choices(chunk_tokens=512, capacity_gbps=CONFIGURED_GBPS))
    prfaas = deployment.prfaas()
    servers = [msgspec.structs.replace(server, mover_port=MOVER_PORTS[0]) for server in prfaas.servers]
    with running(Site(msgspec.structs.replace(prfaas, servers=servers)), Site(deployment.pd())):
        yield deployment


@contextlib.contextmanager
def traffic(url: str) -> Iterator[None]:
    """Long requests, two at a time, through a router with a fixed threshold, which offloads all of them."""
    stop = threading.Event()

    def run(name: int) -> int:
        count = 0
        while not stop.is_set():
            answer = complete(url, MODEL_NAME, words(f"traffic {name} {count}", 300), 1)
            assert answer.status == 200, answer.error
            assert answer.routing["route"] == "prfaas"
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, name) for name in range(2)]
        try:
            yield
        finally:
            stop.set()
        assert all(done.result() > 0 for done in runs)


class Seen:
    """Looks at the live router's link and threshold, until they are as they should be."""

    def __init__(self, url: str) -> None:
        self._url = url

    def look(self) -> tuple[dict[str, Any], int]:
        """Both of the same moment."""
        policy = get(f"{self._url}/policy")
        return policy["links"][0], policy["thresholds"]["pd"]["t_tokens"]

    def until(self, what: str, slow: bool) -> tuple[float, float]:
        """Seconds until the router's link is slow or not any more, and until t has followed."""
        start_s, reported_s = time.monotonic(), 0.0

        def moved() -> bool:
            nonlocal reported_s
            link, t_tokens = self.look()
            if (link["gbps"] < SLOW_GBPS) == slow and not reported_s:
                reported_s = time.monotonic()
            if slow:
                assert t_tokens > HIGH_T or link["gbps"] >= SLOW_GBPS, (link, t_tokens)
                return t_tokens > HIGH_T
            return t_tokens < LOW_T

        wait_for(what, moved)
        return reported_s - start_s, time.monotonic() - start_s


def test_a_throttled_link_moves_the_threshold_and_back(namespace: Namespace, tmp_path: Path) -> None:
    """The threshold is a function of the report: whenever the router's link is slow, t is high in the same answer. How
    long the report takes is measured, and printed."""
    namespace.call(lambda: _in_namespace(tmp_path), timeout_s=900)


def _in_namespace(directory: Path) -> None:
    save_profile(PROFILE, directory / "profile.json")
    flags = {
        "policy.profile": str(directory / "profile.json"),
        "policy.correct_profile": "false",
        "sites.pd.hardware": "slow",
        "sites.prfaas.hardware": "quick",
        "sites.prfaas.links.pd.to_site": "pd",
        "sites.prfaas.links.pd.capacity_gbps": f"{CONFIGURED_GBPS:g}",
    }
    arguments = [word for key, value in flags.items() for word in (f"--{key}", value)]
    with two_sites(directory) as deployment:
        file = deployment.router_file
        with (
            another_router(file, directory / "fixed.log") as fixed,
            another_router(file, directory / "live.log", *arguments) as live,
            traffic(fixed),
        ):
            seen = Seen(live)
            wait_for(f"figures of the link from {REMOTE}", lambda: seen.look()[0]["measured"])
            wait_for("a low threshold", lambda: seen.look()[1] < LOW_T)
            throttle(THROTTLED_MBPS)
            reported_s, moved_s = seen.until("a high threshold", slow=True)
            print(f"throttled: in the router's view after {reported_s:.2f} s, t moved after {moved_s:.2f} s")
            throttle(1000 * CONFIGURED_GBPS)
            reported_s, moved_s = seen.until("the threshold of before", slow=False)
            print(f"free again: in the router's view after {reported_s:.2f} s, t moved after {moved_s:.2f} s")
