"""A datacenter's file: `[site]`, `[[servers]]`, `[limits]`, and the tables of the other modules."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from sglang_prfaas.config.schema.agent import AgentConfig
from sglang_prfaas.config.schema.base import Config, Name, OptionalPort, Port, ServerRole, SiteRole
from sglang_prfaas.config.schema.links import LinkConfig
from sglang_prfaas.config.schema.prefix_cache import PrefixCacheConfig
from sglang_prfaas.config.schema.transport import TransportConfig


class ServerConfig(Config, frozen=True):
    """One SGLang server of a site."""

    name: Annotated[Name, Meta(description="Name of the server, unique in its site.")]
    role: Annotated[ServerRole, Meta(description="What it does: prefill or decode.")]
    port: Annotated[Port, Meta(description="HTTP port of the SGLang server.")]
    host: Annotated[str, Meta(description="Address the SGLang server listens on.")] = "127.0.0.1"
    bootstrap_port: Annotated[
        OptionalPort,
        Meta(description="Port where decode ranks look up its ranks. For prefill, and for role switching."),
    ] = 0
    mover_port: Annotated[
        OptionalPort,
        Meta(description="Prefill only: first port of the KVCache mover, two a rank (control, data). 0: any free."),
    ] = 0
    args: Annotated[list[str], Meta(description="SGLang arguments of this server, after those of [site].")] = field(
        default_factory=list
    )
    env: Annotated[dict[str, str], Meta(description="Environment variables of this server, over those of [site].")] = (
        field(default_factory=dict)
    )


class SiteLimits(Config, frozen=True):
    """Limits on a site's processes."""

    startup_timeout_s: Annotated[float, Meta(gt=0, description="Seconds a server may take until it is ready.")] = 1800.0
    stop_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds a server may take to end after SIGTERM before SIGKILL.")
    ] = 30.0
    health_interval_s: Annotated[float, Meta(gt=0, description="Seconds between two health checks of a server.")] = 5.0
    health_timeout_s: Annotated[float, Meta(gt=0, description="Seconds a health check may take.")] = 25.0
    health_path: Annotated[
        str,
        Meta(
            pattern=r"^/",
            description="Path of the health check. SGLang's /health generates one token, its /ping only reads a flag.",
        ),
    ] = "/health"
    unhealthy_timeout_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Seconds of failing health checks after which a live server is restarted. 0: never.",
        ),
    ] = 300.0
    max_restarts: Annotated[
        int, Meta(ge=0, description="Restarts of one server within restart_window_s before the site gives it up.")
    ] = 5
    restart_window_s: Annotated[float, Meta(gt=0, description="Window of max_restarts, in seconds.")] = 600.0
    restart_backoff_s: Annotated[
        float, Meta(ge=0, description="Seconds before the first restart; doubles with every further one.")
    ] = 1.0
    role_switch_timeout_s: Annotated[
        float,
        Meta(gt=0, description="Seconds a server may take to be healthy in a new role before it is switched back."),
    ] = 120.0
    decode_cuda_graph_memory_gb: Annotated[
        float,
        Meta(
            ge=0, description="GPU memory in GB that must be free before a server turns to decode, for its CUDA graphs."
        ),
    ] = 0.0
    min_prefill_servers: Annotated[
        int, Meta(ge=0, description="Ready prefill servers that a drain or a change of role must leave.")
    ] = 1
    min_decode_servers: Annotated[
        int, Meta(ge=0, description="Ready decode servers that a drain or a change of role must leave.")
    ] = 1


class SiteSection(Config, frozen=True):
    """What all servers of a datacenter share."""

    name: Annotated[Name, Meta(description="Name of the site, unique in the deployment.")]
    role: Annotated[
        SiteRole, Meta(description="prfaas: prefill only, for other sites. pd: serves requests end to end.")
    ]
    model: Annotated[str, Meta(min_length=1, description="Model path, as for SGLang's --model-path.")]
    served_model_name: Annotated[str, Meta(description="Name clients use. Empty: the model path.")] = ""
    transfer_backend: Annotated[
        str, Meta(description="SGLang's --disaggregation-transfer-backend of every server.")
    ] = "prfaas"
    args: Annotated[list[str], Meta(description="SGLang arguments of every server.")] = field(default_factory=list)
    env: Annotated[dict[str, str], Meta(description="Environment variables of every server.")] = field(
        default_factory=dict
    )
    log_dir: Annotated[
        str, Meta(description="Directory of the servers' logs. Empty: .prfaas/logs/<site> below the current directory.")
    ] = ""


class SiteConfig(Config, frozen=True):
    """One datacenter: `[site]`, `[[servers]]`, `[transport]`, `[prefix_cache]`, `[[links]]`, `[agent]`, `[limits]`."""

    site: SiteSection
    servers: Annotated[list[ServerConfig], Meta(min_length=1, description="The SGLang servers.")]
    transport: TransportConfig = TransportConfig()
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    links: Annotated[list[LinkConfig], Meta(description="Links to other sites.")] = field(default_factory=list)
    agent: AgentConfig = AgentConfig()
    limits: SiteLimits = SiteLimits()
