"""The files of a local deployment: a tiny model, two sites, a router, keys."""

from __future__ import annotations

import datetime
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from sglang_prfaas import env
from sglang_prfaas.config import load
from sglang_prfaas.config.keys import toml_value
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.launch.local_deployment import templates
from sglang_prfaas.site.commands import ServerCommand, plain_command
from sglang_prfaas.site.free_ports import HeldPort, bind_problem, free_ports
from sglang_prfaas.tiny_models import adapter_args, cpu_server_args, cpu_server_env, make_tiny_adapter, make_tiny_model

MODEL_NAME = "tiny"
STARTUP_TIMEOUT_S = 900.0
HEARTBEAT_TIMEOUT_S = 120.0
"""Generous: on a busy machine with few cores a process may be without a processor for a while."""

HICACHE_ARGS = ("--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct", "--hicache-ratio", "1.5")
"""What HiCache needs on the CPU platform."""

_KEYS = "keys"


class Choices(Struct, frozen=True, kw_only=True):
    """What may differ between local deployments. args: SGLang arguments, for all servers or those of one role."""

    family: str = "kimi-linear"
    threshold_tokens: int = 512
    chunk_tokens: int = 1024
    """SGLang's --chunked-prefill-size."""
    args: Sequence[str] = ()
    prefill_args: Sequence[str] = ()
    decode_args: Sequence[str] = ()
    adapters: Sequence[str] = ()
    """Names of LoRA adapters that every server has, the one to compare with too. They are made, for the families of
    `make_tiny_adapter`."""
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


def write_deployment(directory: Path, choices: Choices) -> LocalDeployment:
    """Make the model, the three TOML files and, if asked for, keys in `directory`, on free ports. Raises LaunchError,
    OSError."""
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    family = choices.family
    model = make_tiny_model(family, directory / "model", choices.model_changes)
    adapters = _make_adapters(directory / "adapters", model, choices.adapters)
    log = directory / "transfers.jsonl"
    log.unlink(missing_ok=True)
    if choices.keys:
        from sglang_prfaas.transport.security import make

        make.make_keys(directory / _KEYS, {"prfaas": (), "pd": ()}, now=datetime.datetime.now(datetime.UTC))
    ports = free_ports(13)
    values: dict[str, object] = {f"p{index}": port for index, port in enumerate(ports)}
    values["mover"] = f"mover_port = {_free_pair(ports)}" if choices.mover_ports else ""
    values |= _common_values(choices, directory, model, log, adapters)
    files = {}
    for name, template, cache in (
        ("prfaas", templates.PRFAAS, templates.PRFAAS_CACHE),
        ("pd", templates.PD, templates.PD_CACHE),
        ("router", templates.ROUTER, ""),
    ):
        files[name] = directory / f"{name}.toml"
        own = values | _own_values(choices, directory, name)
        text = template + cache if choices.prefix_caches else template
        files[name].write_text(text.format(**own))
    reference = plain_command(
        "reference",
        str(model),
        ports[10],
        served_model_name=MODEL_NAME,
        args=(*cpu_server_args(family), "--chunked-prefill-size", str(choices.chunk_tokens), *adapters),
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


def _make_adapters(directory: Path, model: Path, names: Sequence[str]) -> list[str]:
    """Make adapters, each with weights of its own; SGLang's arguments that load them."""
    if not names:
        return []
    shutil.rmtree(directory, ignore_errors=True)
    made = {name: make_tiny_adapter(directory / name, model, seed) for seed, name in enumerate(names)}
    return adapter_args(made)


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


def _common_values(
    choices: Choices, directory: Path, model: Path, log: Path, adapters: Sequence[str]
) -> dict[str, object]:
    """What the templates take, the same in all files. adapters: SGLang's arguments for them."""
    family = choices.family
    args = [*cpu_server_args(family), "--chunked-prefill-size", str(choices.chunk_tokens), "--enable-metrics"]
    args += ["--enable-pd-role-switch", *adapters, *choices.args]
    return {
        "model": toml_value(str(model)),
        "args": toml_value(args),
        "prefill_args": toml_value(list(choices.prefill_args)),
        "decode_args": toml_value(list(choices.decode_args)),
        "decode_env": _toml_lines(choices.decode_env),
        "env": _toml_lines({**cpu_server_env(family), env.TRANSFER_LOG: str(log), **choices.env}),
        "logs": toml_value(str(directory / "logs")),
        "name": MODEL_NAME,
        "capacity": f"{choices.capacity_gbps:g}",
        "threshold": choices.threshold_tokens,
        "startup": f"{STARTUP_TIMEOUT_S:g}",
        "heartbeat": f"{HEARTBEAT_TIMEOUT_S:g}",
        "prfaas_tls": toml_value(choices.keys),
        "prfaas_scheme": "https" if choices.keys else "http",
        "cache_rate": choices.prefill_tokens_per_s,
    }


def _own_values(choices: Choices, directory: Path, name: str) -> dict[str, object]:
    """What the template of one file takes: a site's, or the router's, which is beside the PD site."""
    site = "pd" if name == "router" else name
    return {
        "site": site,
        "keys": toml_value(str(directory / _KEYS / site) if choices.keys else ""),
        "transport": _toml_lines(choices.transport.get(site, {})),
        "cache_dir": toml_value(str(directory / f"cache-{site}")),
    }


def _toml_lines(table: Mapping[str, str | float]) -> str:
    return "\n".join(f"{key} = {toml_value(value)}" for key, value in table.items())
