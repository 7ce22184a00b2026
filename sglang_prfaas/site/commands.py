"""The command line and environment of every server of a site. Pure: nothing is started here."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from msgspec import Struct

from sglang_prfaas import env
from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.prefix_cache import with_links
from sglang_prfaas.config.schema import ServerConfig, ServerRole, SiteConfig
from sglang_prfaas.site.hicache import hicache_flags

ACCESS_LOG_OPTION = "--uvicorn-access-log-exclude-prefixes"
"""The agent asks for /v1/loads twice a second: without this, each time would be a line in the server's log."""


class ServerCommand(Struct, frozen=True):
    """One server to run.

    name: unique among those of a supervisor; also the name of its log.
    argv: the command. env: variables over those of the launcher.
    role: None for a plain server without disaggregation. Prefill servers are stopped first.
    host, port: where the server listens; its health is asked there.
    bootstrap_port: 0 where there is none; otherwise the server counts as ready only once it listens there too.
    needs_nccl_port: the supervisor adds `--nccl-port` with a port of its choice, see `Supervisor`.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    role: ServerRole | None
    host: str
    port: int
    bootstrap_port: int = 0
    needs_nccl_port: bool = False


def site_commands(
    config: SiteConfig, python: str = sys.executable, link_reports: str = "", kv_events: Mapping[str, str] | None = None
) -> list[ServerCommand]:
    """The commands of a site's servers, in the order of the file. python: the interpreter that has SGLang.
    link_reports: the endpoint where the agent takes the movers' figures of links, empty for none.
    kv_events: `--kv-events-config` by server, for those whose arguments have none."""
    return [_command(config, server, python, link_reports, kv_events or {}) for server in config.servers]


def plain_command(
    name: str,
    model: str,
    port: int,
    *,
    host: str = "127.0.0.1",
    served_model_name: str = "",
    args: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
) -> ServerCommand:
    """A single SGLang server without disaggregation, to compare with."""
    argv = [python, "-m", "sglang.launch_server", "--model-path", model, "--host", host, "--port", str(port)]
    if served_model_name:
        argv += ["--served-model-name", served_model_name]
    needs_nccl_port = not _places_itself(args)
    return ServerCommand(name, (*argv, *args), env or {}, None, host, port, needs_nccl_port=needs_nccl_port)


def listening_host(host: str) -> str:
    """An address to reach a server at that listens on `host`: loopback for one that listens on all."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host.strip("[]"))


def _command(
    config: SiteConfig, server: ServerConfig, python: str, link_reports: str, kv_events: Mapping[str, str]
) -> ServerCommand:
    site = config.site
    args = (*site.args, *server.args)
    argv = [python, "-m", "sglang.launch_server", "--model-path", site.model]
    argv += ["--host", server.host, "--port", str(server.port)]
    argv += ["--disaggregation-mode", server.role, "--disaggregation-transfer-backend", site.transfer_backend]
    if not sglang_args.has(args, ACCESS_LOG_OPTION):
        argv += [ACCESS_LOG_OPTION, "/v1/loads"]
    if server.name in kv_events:
        argv += ["--kv-events-config", kv_events[server.name]]
    if server.bootstrap_port:
        argv += ["--disaggregation-bootstrap-port", str(server.bootstrap_port)]
    if site.served_model_name:
        argv += ["--served-model-name", site.served_model_name]
    argv += hicache_flags(with_links(config.prefix_cache, config.links), server.role, args)
    variables = {
        **env.transport_to_env(config.transport),
        **env.link_codecs_to_env(config.links),
        env.SITE: site.name,
        env.SERVER: server.name,
        env.MOVER_PORT: str(server.mover_port),
        **({env.LINKS: env.links_to_env(config.links)} if config.links else {}),
        **({env.LINK_REPORTS: link_reports} if link_reports else {}),
        **site.env,
        **server.env,
    }
    has_bootstrap = server.role == "prefill" or sglang_args.switches_roles(args)
    return ServerCommand(
        name=server.name,
        argv=(*argv, *args),
        env=variables,
        role=server.role,
        host=server.host,
        port=server.port,
        bootstrap_port=server.bootstrap_port if has_bootstrap else 0,
        needs_nccl_port=not _places_itself(args),
    )


def _places_itself(args: tuple[str, ...]) -> bool:
    """Whether the arguments say where torch.distributed meets, so that no port must be chosen."""
    return sglang_args.has(args, "--nccl-port", "--dist-init-addr")
