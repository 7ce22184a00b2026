"""A local deployment that runs: its processes, started and stopped together."""

from __future__ import annotations

import concurrent.futures
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct, field

from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.launch.local_deployment.files import STARTUP_TIMEOUT_S, LocalDeployment
from sglang_prfaas.site import Site, Supervisor, running
from sglang_prfaas.site.process import tail
from sglang_prfaas.site.progress import Progress
from sglang_prfaas.site.threaded import LoopThread, RunningSite

_LOOK_S = 10.0
_LOOK_INTERVAL_S = 0.05


class LocalCluster(Struct, kw_only=True):
    """A deployment that runs."""

    deployment: LocalDeployment
    sites: Mapping[str, RunningSite]
    router_url: str
    reference_url: str
    logs: dict[str, Path] = field(default_factory=dict)
    """Log of every process, by name."""

    def tails(self, lines: int = 40) -> str:
        """The ends of all logs, for a failure's message."""
        return "\n".join(f"--- {name} ({path})\n{tail(path, lines)}" for name, path in self.logs.items())


@contextmanager
def run_deployment(deployment: LocalDeployment, progress: Progress | None = None) -> Iterator[LocalCluster]:
    """Start both sites and the reference in parallel, then the router; stop all of them at the end.

    Raises LaunchError with the end of the log of what failed; nothing is left running then.
    """
    logs = deployment.directory / "logs"
    limits = SiteLimits(startup_timeout_s=STARTUP_TIMEOUT_S)
    reference = Supervisor([deployment.reference], limits, logs, progress=progress)
    router = Supervisor([deployment.router], limits, logs, progress=progress, environ=_router_environment())
    sites = [Site(config, progress=progress) for config in (deployment.prfaas(), deployment.pd())]
    with ExitStack() as stack:
        helper = LoopThread()
        stack.callback(helper.close)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            starting = pool.submit(helper.run, reference.start())
            stack.callback(lambda: helper.run(reference.stop(at_once=True)))
            try:
                running_sites = stack.enter_context(running(*sites))
            finally:
                concurrent.futures.wait([starting])
            starting.result()
        stack.callback(lambda: helper.run(router.stop(at_once=True)))
        helper.run(router.start())
        router_url = f"http://127.0.0.1:{deployment.router.port}"
        names = {name for running_site in running_sites.values() for name in running_site.site.servers}
        _wait_until_seen(router_url, names)
        cluster = LocalCluster(
            deployment=deployment,
            sites=running_sites,
            router_url=router_url,
            reference_url=f"http://127.0.0.1:{deployment.reference.port}",
        )
        for running_site in running_sites.values():
            for name, server in running_site.site.servers.items():
                cluster.logs[f"{running_site.name}/{name}"] = server.log
        cluster.logs["reference"] = logs / "reference.log"
        cluster.logs["router"] = logs / "router.log"
        yield cluster


def alive_servers(router_url: str) -> dict[str, str]:
    """Roles of the servers that a router takes to be alive, by name; none while it does not answer."""
    try:
        with urllib.request.urlopen(f"{router_url}/health", timeout=_LOOK_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            body = error.read()
    except OSError:
        return {}
    health = msgspec.json.decode(body, type=_Health)
    return {server.name: server.role for server in health.servers if server.alive}


def _wait_until_seen(router_url: str, names: Set[str]) -> None:
    """Wait until a router has all of `names` as alive: it is healthy already with one prefill and one decode server.
    Raises LaunchError."""
    deadline_s = time.monotonic() + STARTUP_TIMEOUT_S
    while missing := names - alive_servers(router_url).keys():
        if time.monotonic() > deadline_s:
            raise LaunchError(f"The router {router_url} did not see {', '.join(sorted(missing))}. Look into its log.")
        time.sleep(_LOOK_INTERVAL_S)


class _Server(Struct):
    name: str
    role: str
    alive: bool


class _Health(Struct):
    servers: list[_Server]


def _router_environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
