"""The router in real time, over servers that take as long as the profile says, against the simulator's prediction.

    python -m benchmarks.scheduler.live --json OUT [--rate 2.6] [--seconds 900] [--speed 10]

The paper's case study, all times divided by `--speed` (and KVCache with them, so that the link's share stays). The
router is the whole of `sglang_prfaas.router` with its sockets; a prefill server computes one prompt after the other,
answers when its KVCache has crossed the link, and decode answers then. Both see the same arrivals.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sglang_prfaas.config.schema import (
    LinkConfig,
    PolicyConfig,
    RouterConfig,
    RouterSection,
    RouterSite,
    ServerRole,
    TargetConfig,
)
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.http import Client, ClientLimits, HttpServer, Request, Response
from sglang_prfaas.launch.tables import write_json
from sglang_prfaas.router.access_log import AccessLog
from sglang_prfaas.router.app import Router
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.tokens import TokenCount, TokenCounter
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import DecodeProfile, PrefillProfile, ProfileFile, save_profile
from sglang_prfaas.scheduler.throughput import Fleet
from sglang_prfaas.scheduler.ttft import exposed_transfer_s
from sglang_prfaas.simulate.scenario import Scenario, run_policy
from sglang_prfaas.simulate.workload import Arrival, poisson

MODEL, N_P = "case-study", 3
_LINK_GBPS = 100.0
_DEADLINE_S = 600.0
_TIMER_S = 0.005
"""What sockets and timers of a busy machine take does not shrink with `--speed`."""


def quicker(fleet: Fleet, speed: float) -> Fleet:
    """The fleet with all times, and KVCache, divided by `speed`."""

    def curve(of: Curve) -> Curve:
        return msgspec.structs.replace(of, y=tuple(y / speed for y in of.y))

    def prefill(of: PrefillProfile) -> PrefillProfile:
        return msgspec.structs.replace(of, time_s=curve(of.time_s))

    assert fleet.prfaas_prefill is not None
    decode: DecodeProfile = msgspec.structs.replace(fleet.pd_decode, step_s=curve(fleet.pd_decode.step_s))
    kv = KvLayout(full_bytes_per_token=fleet.kv.full_bytes_per_token / speed, state_bytes=fleet.kv.state_bytes / speed)
    return msgspec.structs.replace(
        fleet,
        kv=kv,
        pd_prefill=prefill(fleet.pd_prefill),
        pd_decode=decode,
        prfaas_prefill=prefill(fleet.prfaas_prefill),
        egress_gbps=_LINK_GBPS,
    )


class Lengths(TokenCounter):
    """The prompt is its own length, written as a number."""

    async def count(self, body: ParsedBody, low_tokens: float, high_tokens: float) -> TokenCount:
        assert body.prompt is not None
        tokens = int(msgspec.json.decode(body.prompt))
        return TokenCount(tokens, tokens, True)


class Worker:
    """A server: prefill takes the profile's time, one prompt after the other, and then the exposed transfer."""

    def __init__(self, role: ServerRole, rooms: dict[int, asyncio.Event], fleet: Fleet, far: bool) -> None:
        self._role, self._rooms, self._fleet, self._far = role, rooms, fleet, far
        self._free_at_s = 0.0
        self.server = HttpServer(self._handle)
        self.port = 0

    async def _handle(self, request: Request, response: Response) -> None:
        if request.method == "GET":
            response.send(200, b'{"data": []}')
            return
        body = msgspec.json.decode(request.body)
        done = self._rooms.setdefault(body["bootstrap_room"], asyncio.Event())
        if self._role == "decode":
            await done.wait()
        else:
            await self._prefill(float(body["prompt"]))
            done.set()
        response.send(200, b"{}")

    async def _prefill(self, tokens: float) -> None:
        loop = asyncio.get_running_loop()
        profile = self._fleet.prfaas_prefill if self._far else self._fleet.pd_prefill
        assert profile is not None
        seconds = profile.time_s.at(tokens)
        self._free_at_s = max(self._free_at_s, loop.time()) + seconds
        exposed_s = 0.0
        if self._far:
            kv = self._fleet.kv
            exposed_s = exposed_transfer_s(
                total_bytes=kv.size_bytes(tokens),
                state_bytes=kv.state_bytes,
                prefill_s=seconds,
                bytes_per_s=_LINK_GBPS * 1e9 / 8,
            )
        await asyncio.sleep(max(0.0, self._free_at_s + exposed_s - loop.time()))


@contextlib.asynccontextmanager
async def serving(fleet: Fleet, policy: dict[str, Any], directory: Path) -> AsyncIterator[tuple[Router, int]]:
    """The servers of the case study at 3/5, and a live router."""
    assert fleet.prfaas_prefill is not None
    profile = ProfileFile(
        model=MODEL, kv=fleet.kv, prefill={"far": fleet.prfaas_prefill, "near": fleet.pd_prefill}, decode={}
    )
    save_profile(profile, directory / "profile.json")
    rooms: dict[int, asyncio.Event] = {}
    sites, workers = [], []
    for site, counts in (("far", {"prefill": fleet.n_prfaas}), ("near", {"prefill": N_P, "decode": fleet.n_pd - N_P})):
        targets = []
        for role, count in counts.items():
            for index in range(count):
                kind: ServerRole = "decode" if role == "decode" else "prefill"
                worker = Worker(kind, rooms, fleet, site == "far")
                worker.port = await worker.server.start("127.0.0.1", 0)
                workers.append(worker)
                url = f"http://127.0.0.1:{worker.port}"
                targets.append(TargetConfig(name=f"{role}-{index}", role=kind, url=url, bootstrap_port=9000))
        links = [LinkConfig(to_site="near", capacity_gbps=_LINK_GBPS)] if site == "far" else []
        sites.append(
            RouterSite(name=site, role="prfaas" if site == "far" else "pd", servers=targets, hardware=site, links=links)
        )
    config = RouterConfig(
        router=RouterSection(model=MODEL, served_model_name=MODEL, port=1),
        sites=sites,
        policy=PolicyConfig(profile=str(directory / "profile.json"), **policy),
    )
    with open(os.devnull, "w") as sink:
        router = Router(config, Lengths(MODEL), AccessLog(sink))
        router.health.start()
        port = await router.server.start("127.0.0.1", 0)
        async with asyncio.timeout(60):
            while not all(target.alive for target in router.registry.targets()):
                await asyncio.sleep(0.01)
        try:
            yield router, port
        finally:
            await router.stop()
            for worker in workers:
                await worker.server.close()


async def measure(arrivals: list[Arrival], fleet: Fleet, policy: dict[str, Any]) -> dict[str, Any]:
    """Ask when the arrivals say, and take the time to each answer."""
    loop = asyncio.get_running_loop()
    client = Client(ClientLimits(first_byte_timeout_s=_DEADLINE_S))
    offloaded = 0
    late_s: list[float] = []

    async def ask(arrival: Arrival, start_s: float, url: str) -> float:
        nonlocal offloaded
        await asyncio.sleep(max(0.0, start_s + arrival.at_s - loop.time()))
        asked_s = loop.time()
        late_s.append(asked_s - start_s - arrival.at_s)
        body = b'{"model": "%s", "prompt": "%d"}' % (MODEL.encode(), arrival.input_tokens)
        answer = await client.upstream(url).fetch("POST", "/v1/completions", body=body, timeout_s=_DEADLINE_S)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.body!r}")
        offloaded += (b"x-prfaas-route", b"prfaas") in {(key.lower(), value) for key, value in answer.headers}
        return loop.time() - asked_s

    with tempfile.TemporaryDirectory() as directory:
        async with serving(fleet, policy, Path(directory)) as (_, port):
            start_s = loop.time() + 1.0
            url = f"http://127.0.0.1:{port}"
            took_s = await asyncio.gather(*(ask(arrival, start_s, url) for arrival in arrivals))
            await client.close()
    return {**_summary(list(took_s)), "offloaded_share": offloaded / len(arrivals), "late_p99_s": _q(late_s, 0.99)}


def _q(values: list[float], q: float) -> float:
    return float(np.quantile(np.array(values), q))


def _summary(took_s: list[float]) -> dict[str, float]:
    return {
        "ttft_mean_s": float(np.mean(took_s)),
        "ttft_p50_s": _q(took_s, 0.5),
        "ttft_p90_s": _q(took_s, 0.9),
        "ttft_p99_s": _q(took_s, 0.99),
    }


def compare(rate: float, seconds: float, speed: float) -> dict[str, Any]:
    """Both orders of waiting requests, in the simulator and live: TTFT of each, and the live one's difference.

    rate: requests a second, and seconds, both of the case study; speed: how much quicker everything is."""
    workload = paper.case_study_workload()
    fleet = quicker(paper.case_study_fleet(), speed)
    arrivals = poisson(
        workload.lengths,
        rate=rate * speed,
        output_tokens=round(workload.output_tokens),
        duration_s=seconds / speed,
        seed=1,
    )
    found: dict[str, Any] = {"rate": rate, "seconds": seconds, "speed": speed, "requests": len(arrivals)}
    slo_s = 7.0 / speed
    orders = {
        "off": ({"order": "off"}, 0.0),
        # As the simulator: serial servers, which no second prompt would fill.
        "ordered": (
            {
                "order": "ordered",
                "feed_tokens": 0,
                "feed_s": PolicyConfig().feed_s / speed + _TIMER_S,
                "slo_ttft_s": slo_s,
            },
            slo_s,
        ),
    }
    for name, (policy, objective_s) in orders.items():
        scenario = Scenario(
            fleet=fleet,
            slo_tokens_per_s=paper.SLO_TOKENS_PER_S * speed,
            n_p=N_P,
            t_tokens=19_400,
            ttft_slo_s=objective_s,
        )
        simulated = msgspec.structs.asdict(run_policy(scenario, "live", arrivals).summary())
        live = asyncio.run(measure(arrivals, fleet, policy))
        difference = {key: live[key] / simulated[key] - 1 for key in live if key.startswith("ttft")}
        found[name] = {"simulated": simulated, "live": live, "difference": difference}
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """What `compare` found, in seconds of the case study."""
    return [
        f"{order}: {key} {found[order]['live'][key] * found['speed']:.2f} s live, {value:+.1%} to simulated"
        for order in ("off", "ordered")
        for key, value in found[order]["difference"].items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--rate", type=float, default=2.6, help="requests a second, of the case study")
    parser.add_argument("--seconds", type=float, default=900.0, help="seconds of arrivals, of the case study")
    parser.add_argument("--speed", type=float, default=10.0, help="how much quicker everything is")
    args = parser.parse_args()

    found = compare(args.rate, args.seconds, args.speed)
    print("\n".join(lines(found)), file=sys.stderr)
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
