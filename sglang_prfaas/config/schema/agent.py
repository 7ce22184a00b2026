"""`[agent]`: the process that watches a site's servers."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from sglang_prfaas.config.schema.base import Config, OptionalPort


class AgentConfig(Config, frozen=True):
    """The agent: watches the site's servers and is its HTTP gateway for routers."""

    host: Annotated[str, Meta(description="Address the agent listens on.")] = "127.0.0.1"
    port: Annotated[OptionalPort, Meta(description="HTTP port of the agent. 0: no agent endpoint.")] = 0
    tls: Annotated[
        bool,
        Meta(
            description="HTTPS at `port`, with the keys of [transport], for clients with a certificate of a site in "
            "peers.toml only: routers then have an https agent_url. Otherwise prompts and answers cross in clear."
        ),
    ] = False
    reports_port: Annotated[
        OptionalPort,
        Meta(
            description="ZeroMQ port for routers: loads, links and states up, commands down. With the keys of "
            "[transport]. 0: none, routers only ask over HTTP."
        ),
    ] = 0
    report_interval_s: Annotated[
        float, Meta(gt=0, description="Seconds between two looks at a server's load, and between two reports of loads.")
    ] = 0.5
    commands_from: Annotated[
        list[str],
        Meta(
            description="Sites whose routers may command this one (drain, role, limits), where keys are used. "
            "Empty: only routers with this site's own keys. Without keys: whoever reaches the port."
        ),
    ] = field(default_factory=list)
    kv_events: Annotated[
        bool,
        Meta(
            description="Have servers publish what their prefix caches hold, for routers that ask at reports_port. "
            "--kv-events-config in a server's args is used as it is."
        ),
    ] = True
    kv_events_max_blocks: Annotated[
        int,
        Meta(ge=1, le=1 << 30, description="Distinct blocks of all its servers that the agent keeps at most."),
    ] = 2_000_000
