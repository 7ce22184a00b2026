"""A router's file: `[router]`, `[[sites]]`, `[limits]`, `[reports]`, and the tables of the other modules."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from sglang_prfaas.config.schema.base import Config, Name, OptionalPort, Port, SecurityMode, ServerRole, SiteRole
from sglang_prfaas.config.schema.links import LinkConfig
from sglang_prfaas.config.schema.policy import PolicyConfig
from sglang_prfaas.config.schema.prefix_index import PrefixIndexConfig
from sglang_prfaas.config.schema.tenancy import TenancyConfig, TenantConfig


class TargetConfig(Config, frozen=True):
    """One SGLang server as the router reaches it."""

    name: Annotated[Name, Meta(description="Name of the server, unique in its site.")]
    role: Annotated[ServerRole, Meta(description="What it does: prefill or decode.")]
    url: Annotated[
        str, Meta(pattern=r"^https?://", description="Base URL of the server, or of its agent's gateway path.")
    ]
    bootstrap_host: Annotated[
        str, Meta(description="Prefill only: where decode reaches its bootstrap. Empty: the host of url.")
    ] = ""
    bootstrap_port: Annotated[OptionalPort, Meta(description="Prefill only: its bootstrap port.")] = 0
    kv_events: Annotated[
        str,
        Meta(description="ZeroMQ endpoint of its KV events, as tcp://HOST:PORT. Without keys: in one network only."),
    ] = ""
    kv_replay: Annotated[
        str, Meta(description="Endpoint where its KV events are replayed. Empty: every gap starts from nothing.")
    ] = ""
    kv_topic: Annotated[str, Meta(description="Topic of its KV events.")] = ""


class RouterSite(Config, frozen=True):
    """One site as the router sees it: either `agent_url` (the agent lists its servers) or `servers`."""

    name: Annotated[Name, Meta(description="Name of the site.")]
    role: Annotated[SiteRole, Meta(description="prfaas or pd.")]
    agent_url: Annotated[
        str, Meta(description="Base URL of the site's agent, which lists and relays to its servers. Empty: no agent.")
    ] = ""
    reports_port: Annotated[
        OptionalPort,
        Meta(
            description="The agent's reports_port, at the host of agent_url: loads and states as they change. 0: none."
        ),
    ] = 0
    servers: Annotated[list[TargetConfig], Meta(description="The site's servers, where there is no agent.")] = field(
        default_factory=list
    )
    hardware: Annotated[
        str, Meta(description="Prefill curve of policy.profile that its servers have. Empty: the only one.")
    ] = ""
    links: Annotated[
        list[LinkConfig], Meta(description="PrfaaS site: its links to PD sites, as far as no report measures them.")
    ] = field(default_factory=list)


class RouterSection(Config, frozen=True):
    """The router's own address and model."""

    model: Annotated[str, Meta(min_length=1, description="Model path: its tokenizer and chat template count tokens.")]
    host: Annotated[str, Meta(description="Address the router listens on.")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="HTTP port of the router.")] = 8000
    served_model_name: Annotated[str, Meta(description="Model name clients use. Empty: the model path.")] = ""
    trust_remote_code: Annotated[
        bool, Meta(description="Run the tokenizer code that comes with the model, as SGLang's --trust-remote-code.")
    ] = False
    allow_admin: Annotated[
        bool, Meta(description="Pass SGLang's administration endpoints (/flush_cache, ...) on to a decode server.")
    ] = False


class RouterLimits(Config, frozen=True):
    """Limits of the router."""

    max_body_bytes: Annotated[int, Meta(gt=0, description="Largest request body in bytes.")] = 64 << 20
    max_header_bytes: Annotated[int, Meta(gt=0, description="Largest request head in bytes.")] = 64 << 10
    max_connections: Annotated[int, Meta(gt=0, description="Client connections served at once.")] = 10_000
    connect_timeout_s: Annotated[float, Meta(gt=0, description="Seconds to connect to a server.")] = 5.0
    first_byte_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds until the first byte of an answer (covers queue, prefill, transfer).")
    ] = 600.0
    idle_timeout_s: Annotated[float, Meta(gt=0, description="Seconds between two bytes of an answer.")] = 300.0
    keepalive_timeout_s: Annotated[float, Meta(gt=0, description="Seconds an idle client connection is kept.")] = 75.0
    max_retries: Annotated[
        int, Meta(ge=0, description="Other servers tried when one fails before the first token.")
    ] = 2
    health_interval_s: Annotated[float, Meta(gt=0, description="Seconds between two health checks of a server.")] = 2.0
    health_timeout_s: Annotated[float, Meta(gt=0, description="Seconds a health check may take.")] = 5.0
    unhealthy_after: Annotated[int, Meta(ge=1, description="Failed checks in a row before a server is left out.")] = 2
    drain_timeout_s: Annotated[
        float, Meta(ge=0, description="Seconds that requests in work may take to end when the router is stopped.")
    ] = 30.0


class ReportsConfig(Config, frozen=True):
    """The router's connections to agents that have a reports_port."""

    security: Annotated[
        SecurityMode,
        Meta(
            description="keys: CURVE. off: no keys. auto: keys where keys_dir is given, else off, and then only agents "
            "on this machine are dialled."
        ),
    ] = "auto"
    keys_dir: Annotated[
        str,
        Meta(description="Directory with the keys of the router's site, as `launch keys` makes it. Empty: no keys."),
    ] = ""
    heartbeat_interval_s: Annotated[
        float, Meta(gt=0, description="Seconds between two signs of life of the router to an agent.")
    ] = 1.0
    stale_after_s: Annotated[
        float, Meta(gt=0, description="Age in seconds from which figures of servers and links are not used.")
    ] = 3.0


class RouterConfig(Config, frozen=True):
    """The router: `[router]`, `[policy]`, `[limits]`, `[reports]`, `[prefix_index]`, `[tenancy]`, `[[tenants]]`,
    `[[sites]]`."""

    router: RouterSection
    sites: Annotated[list[RouterSite], Meta(min_length=1, description="The sites to route to.")]
    policy: PolicyConfig = PolicyConfig()
    limits: RouterLimits = RouterLimits()
    reports: ReportsConfig = ReportsConfig()
    prefix_index: PrefixIndexConfig = PrefixIndexConfig()
    tenancy: TenancyConfig = TenancyConfig()
    tenants: Annotated[list[TenantConfig], Meta(description="Clients with rules of their own.")] = field(
        default_factory=list
    )
