"""Two datacenters on one machine: the configuration files of a PrfaaS site, a PD site and a router, and running them.

What the demo and the integration tests stand on. Tiny models, real SGLang servers, the CPU platform, loopback.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, field

from sglang_prfaas import env
from sglang_prfaas.config import load
from sglang_prfaas.config.schema import RouterConfig, SiteConfig, SiteLimits
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.site import Site, Supervisor, running
from sglang_prfaas.site.commands import ServerCommand, plain_command
from sglang_prfaas.site.free_ports import HeldPort, bind_problem
from sglang_prfaas.site.progress import Progress
from sglang_prfaas.site.threaded import LoopThread, RunningSite
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

MODEL_NAME = "tiny"
STARTUP_TIMEOUT_S = 900.0
HEARTBEAT_TIMEOUT_S = 120.0
"""Generous: on a busy machine with few cores a process may be without a processor for a while."""
_LOOK_S = 10.0
_LOOK_INTERVAL_S = 0.05

HICACHE_ARGS = ("--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct", "--hicache-ratio", "1.5")
"""What HiCache needs on the CPU platform."""


class Choices(Struct, frozen=True, kw_only=True):
    """What may differ between local deployments. args: SGLang arguments, for all servers or those of one role."""

    family: str = "kimi-linear"
    threshold_tokens: int = 512
    chunk_tokens: int = 1024
    """SGLang's --chunked-prefill-size."""
    args: Sequence[str] = ()
    prefill_args: Sequence[str] = ()
    decode_args: Sequence[str] = ()
    capacity_gbps: float = 10.0
    env: Mapping[str, str] = {}
    """Environment variables of all servers of both sites."""
    decode_env: Mapping[str, str] = {}
    """Environment variables of the decode server, over those of all servers."""
    model_changes: Mapping[str, Any] = {}
    """Keys of the model's config.json that are to be others than the family's."""
    transport: Mapping[str, Mapping[str, str | float]] = {}
    """Keys of [transport], by site."""
    keys: bool = False
    """Whether KVCache moves with CURVE and TLS, and the router reaches the other site by HTTPS."""
    mover_ports: bool = False
    """Whether the PrfaaS site's prefill server has fixed mover ports, as behind a gateway; else any that are free."""
    prefix_caches: bool = False
    """Whether each site has a prefix cache on disk, and the PrfaaS site fetches from the PD site's. The prefill servers
    then need `HICACHE_ARGS`."""
    prefill_tokens_per_s: float = 10.0
    """What the PrfaaS site takes itself to compute, for its choice to fetch."""


class LocalDeployment(Struct, frozen=True, kw_only=True):
    """Files and commands of a deployment that is not running yet."""

    choices: Choices
    directory: Path
    model: Path
    prfaas_file: Path
    pd_file: Path
    router_file: Path
    transfer_log: Path
    reference: ServerCommand
    """A plain single server to compare with."""
    router: ServerCommand

    def prfaas(self) -> SiteConfig:
        return load.load_site(self.prfaas_file)

    def pd(self) -> SiteConfig:
        return load.load_site(self.pd_file)

    def router_config(self) -> RouterConfig:
        return load.load_router(self.router_file)


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
        from sglang_prfaas.site.process import tail

        return "\n".join(f"--- {name} ({path})\n{tail(path, lines)}" for name, path in self.logs.items())


def write_deployment(directory: Path, choices: Choices) -> LocalDeployment:
    """Make the model, the three TOML files and, if asked for, keys in `directory`, on free ports. Raises LaunchError,
    OSError."""
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    family = choices.family
    model = make_tiny_model(family, directory / "model", choices.model_changes)
    log = directory / "transfers.jsonl"
    log.unlink(missing_ok=True)
    ports = _free_ports(13)
    common = [*cpu_server_args(family), "--chunked-prefill-size", str(choices.chunk_tokens), "--enable-metrics"]
    common += ["--enable-pd-role-switch", *choices.args]
    variables = {**cpu_server_env(family), env.TRANSFER_LOG: str(log), **choices.env}
    values = {
        "family": family,
        "model": _toml(str(model)),
        "args": _toml(common),
        "prefill_args": _toml(list(choices.prefill_args)),
        "decode_args": _toml(list(choices.decode_args)),
        "decode_env": "\n".join(f"{key} = {_toml(value)}" for key, value in choices.decode_env.items()),
        "env": "\n".join(f"{key} = {_toml(value)}" for key, value in variables.items()),
        "logs": _toml(str(directory / "logs")),
        "name": MODEL_NAME,
        "capacity": f"{choices.capacity_gbps:g}",
        "threshold": choices.threshold_tokens,
        "startup": f"{STARTUP_TIMEOUT_S:g}",
        "heartbeat": f"{HEARTBEAT_TIMEOUT_S:g}",
        "prfaas_tls": _toml(choices.keys),
        "prfaas_scheme": "https" if choices.keys else "http",
        "mover": f"mover_port = {_free_pair(ports)}" if choices.mover_ports else "",
        **{f"p{index}": port for index, port in enumerate(ports)},
    }
    keys = directory / "keys"
    if choices.keys:
        from sglang_prfaas.transport.security import make

        make.make_keys(keys, {"prfaas": (), "pd": ()}, now=datetime.datetime.now(datetime.UTC))
    for site in ("prfaas", "pd"):
        values[f"keys_{site}"] = _toml(str(keys / site) if choices.keys else "")
        settings = choices.transport.get(site, {})
        values[f"transport_{site}"] = "\n".join(f"{key} = {_toml(value)}" for key, value in settings.items())
    cache_rate = choices.prefill_tokens_per_s
    for site, section in (("prfaas", _PRFAAS_CACHE), ("pd", _PD_CACHE)):
        cache_dir = _toml(str(directory / f"cache-{site}"))
        values[f"cache_{site}"] = (
            section.format(**values, dir=cache_dir, rate=cache_rate) if choices.prefix_caches else ""
        )
    files = {}
    for name, template in (("prfaas", _PRFAAS), ("pd", _PD), ("router", _ROUTER)):
        files[name] = directory / f"{name}.toml"
        files[name].write_text(template.format(**values))
    reference = plain_command(
        "reference",
        str(model),
        ports[10],
        served_model_name=MODEL_NAME,
        args=(*cpu_server_args(family), "--chunked-prefill-size", str(choices.chunk_tokens)),
        env=cpu_server_env(family),
    )
    argv = (sys.executable, "-m", "sglang_prfaas.launch", "router", str(files["router"]))
    return LocalDeployment(
        choices=choices,
        directory=directory,
        model=model,
        prfaas_file=files["prfaas"],
        pd_file=files["pd"],
        router_file=files["router"],
        transfer_log=log,
        reference=reference,
        router=ServerCommand("router", argv, {}, None, "127.0.0.1", ports[11]),
    )


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
        wait_until_seen(router_url, names)
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


def wait_until_seen(router_url: str, names: Set[str]) -> None:
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


def _free_ports(count: int) -> list[int]:
    held: list[HeldPort] = []
    try:
        for _ in range(count):
            held.append(HeldPort(avoid=[port.port for port in held]))
        return [port.port for port in held]
    finally:
        for port in held:
            port.release()


def _free_pair(avoid: Sequence[int]) -> int:
    """A port that is free, as is the next one."""
    held: list[HeldPort] = []
    try:
        while True:
            held.append(HeldPort(avoid=[*avoid, *(port.port for port in held)]))
            port = held[-1].port
            if port + 1 not in avoid and not bind_problem("0.0.0.0", port + 1):
                return port
    finally:
        for one in held:
            one.release()


def _toml(value: str | float | list[str]) -> str:
    """A string, a number, or a list of strings, in TOML: JSON's form is valid TOML for all of them."""
    return msgspec.json.encode(value).decode()


_PRFAAS = """\
# The PrfaaS datacenter: prefill only, for other sites.
[site]
name = "prfaas"
role = "prfaas"
model = {model}
served_model_name = "{name}"
log_dir = {logs}
args = {args}

[site.env]
{env}

[[servers]]
name = "prfaas-prefill-0"
role = "prefill"
port = {p0}
bootstrap_port = {p1}
{mover}
args = {prefill_args}

[[links]]
to_site = "pd"
capacity_gbps = {capacity}

[agent]
port = {p2}
tls = {prfaas_tls}
reports_port = {p8}
commands_from = ["prfaas", "pd"]

[transport]
heartbeat_timeout_s = {heartbeat}
keys_dir = {keys_prfaas}
{transport_prfaas}

[limits]
startup_timeout_s = {startup}
{cache_prfaas}"""

_PD = """\
# The PD datacenter: serves requests end to end, and takes prefills from the PrfaaS site.
[site]
name = "pd"
role = "pd"
model = {model}
served_model_name = "{name}"
log_dir = {logs}
args = {args}

[site.env]
{env}

[[servers]]
name = "pd-prefill-0"
role = "prefill"
port = {p3}
bootstrap_port = {p4}
args = {prefill_args}

[[servers]]
name = "pd-decode-0"
role = "decode"
port = {p5}
bootstrap_port = {p6}
args = {decode_args}

[servers.env]
{decode_env}

[agent]
port = {p7}
reports_port = {p9}

[transport]
heartbeat_timeout_s = {heartbeat}
keys_dir = {keys_pd}
{transport_pd}

[limits]
startup_timeout_s = {startup}
min_prefill_servers = 0
{cache_pd}"""

_PRFAAS_CACHE = """
[prefix_cache]
backend = "local"
disk_dir = {dir}
disk_bytes = 268435456
prefill_tokens_per_s = {rate}

[[prefix_cache.peers]]
name = "pd"
host = "127.0.0.1"
port = {p12}
"""

_PD_CACHE = """
[prefix_cache]
backend = "local"
disk_dir = {dir}
disk_bytes = 268435456
serve_port = {p12}
serve_to = ["prfaas"]
"""

_ROUTER = """\
# The router: beside the PD datacenter; reaches each site through its agent.
[router]
model = {model}
served_model_name = "{name}"
port = {p11}

[policy]
threshold_tokens = {threshold}

[reports]
keys_dir = {keys_pd}

[[sites]]
name = "prfaas"
role = "prfaas"
agent_url = "{prfaas_scheme}://127.0.0.1:{p2}"
reports_port = {p8}

[[sites]]
name = "pd"
role = "pd"
agent_url = "http://127.0.0.1:{p7}"
reports_port = {p9}
"""
