"""Configuration as frozen structs. Every default of the project stands in this file, units in the key names.

One TOML file per datacenter (`SiteConfig`) and one for the router (`RouterConfig`). Rules that span fields are in
`checks.py`, reading and overriding in `load.py`. The `description` of a field is its `--help` text and its JSON Schema
description.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Port = Annotated[int, Meta(ge=1, le=65535)]

SiteRole = Literal["prfaas", "pd"]
ServerRole = Literal["prefill", "decode"]
LayerwiseMode = Literal["auto", "off"]
SecurityMode = Literal["auto", "keys", "off"]
PolicyMode = Literal["auto", "fixed", "live"]
OrderMode = Literal["auto", "ordered", "off"]
CodecName = Literal["raw", "fp8", "int8", "shuffle"]
PrefixCacheBackend = Literal["off", "local", "mooncake"]
CheckpointMode = Literal["auto", "on", "off"]
InnerRailKind = Literal["none", "mooncake"]


class _Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: frozen, keyword-only, unknown keys refused with their path."""


# --- one datacenter -------------------------------------------------------------------------------------------------


class ServerConfig(_Config, frozen=True):
    """One SGLang server of a site."""

    name: Annotated[Name, Meta(description="Name of the server, unique in its site.")]
    role: Annotated[ServerRole, Meta(description="What it does: prefill or decode.")]
    port: Annotated[Port, Meta(description="HTTP port of the SGLang server.")]
    host: Annotated[str, Meta(description="Address the SGLang server listens on.")] = "127.0.0.1"
    bootstrap_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Port where decode ranks look up its ranks. For prefill, and for role switching.",
        ),
    ] = 0
    mover_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Prefill only: first port of the KVCache mover, two a rank (control, data). 0: any free.",
        ),
    ] = 0
    args: Annotated[list[str], Meta(description="SGLang arguments of this server, after those of [site].")] = field(
        default_factory=list
    )
    env: Annotated[dict[str, str], Meta(description="Environment variables of this server, over those of [site].")] = (
        field(default_factory=dict)
    )


class TransportConfig(_Config, frozen=True):
    """The KVCache mover of a site's servers."""

    bind_host: Annotated[
        str, Meta(description="Address the mover listens on. Empty: SGLang's --host. :: listens on IPv6 and IPv4.")
    ] = ""
    advertise_host: Annotated[
        str, Meta(description="Address other sites reach the mover at. Empty: the server's own host.")
    ] = ""
    security: Annotated[
        SecurityMode,
        Meta(
            description="keys: CURVE and mutual TLS. off: neither. auto: keys where keys_dir is given, else off, and "
            "then the mover and the bootstrap listen on loopback only."
        ),
    ] = "auto"
    keys_dir: Annotated[
        str, Meta(description="Directory with this site's keys, as `launch keys` makes it. Empty: no keys.")
    ] = ""
    connections: Annotated[
        int, Meta(ge=1, le=64, description="TCP connections between one prefill rank and one decode rank.")
    ] = 4
    chunk_bytes: Annotated[
        int,
        Meta(
            ge=4096,
            le=64 << 20,
            description="Largest payload of one chunk on the wire, in bytes; less where that takes the link more "
            "than 50 ms.",
        ),
    ] = 2 << 20
    handshake_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds to reach a prefill server and agree on the layout.")
    ] = 30.0
    transfer_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds without progress after which a request's transfer fails.")
    ] = 120.0
    waiting_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds a prefill or decode leg waits for its other leg before it fails.")
    ] = 300.0
    heartbeat_interval_s: Annotated[
        float, Meta(gt=0, description="Seconds between heartbeats on a control connection.")
    ] = 1.0
    heartbeat_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds of silence over standing connections after which they are made anew, and of a data "
            "connection that does not move.",
        ),
    ] = 5.0
    reconnect_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds for which lost connections are dialled again before the transfers over them fail.",
        ),
    ] = 10.0
    closed_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds after a decode server has closed all its data connections, and said nothing since, "
            "until its process counts as ended.",
        ),
    ] = 0.5
    control_messages_per_s: Annotated[
        float,
        Meta(
            ge=10,
            description="Control messages that one peer may send in a second, counted as one and another for each KiB; "
            "four seconds' worth at one go. Its connection is closed beyond it.",
        ),
    ] = 10_000.0
    congestion_control: Annotated[
        str, Meta(description="TCP congestion control of data connections (cubic, bbr, ...). Empty: the system's.")
    ] = ""
    codec: Annotated[
        CodecName,
        Meta(
            description="How prefill servers encode full-attention KVCache for decode servers. raw: not. fp8, int8: a "
            "byte an element, lossy. shuffle: compressed without loss. Raw where the peer does not take it."
        ),
    ] = "raw"
    accept_codecs: Annotated[
        Literal["all", "lossless", "none"],
        Meta(description="Which encodings of KVCache decode servers take."),
    ] = "all"
    socket_buffer_bytes: Annotated[
        int, Meta(ge=0, description="Socket send and receive buffer in bytes. 0: the kernel's autotuning.")
    ] = 0
    zero_copy: Annotated[
        bool,
        Meta(
            description="Send host memory without a copy, without TLS and to other hosts (on one host a copy is "
            "cheaper): the kernel reads a page until the peer has acknowledged it, even where its request was aborted "
            "meanwhile; the checksum then tells."
        ),
    ] = True
    rate_limit_mbps: Annotated[
        float,
        Meta(
            ge=0, description="Most that one prefill rank sends, all its connections together, in Mbit/s. 0: no limit."
        ),
    ] = 0.0
    pacing_mbps: Annotated[
        float,
        Meta(
            ge=0,
            description="Mbit/s at which the kernel paces what one prefill rank sends to one decode rank "
            "(SO_MAX_PACING_RATE), evenly over its connections. 0: no pacing but congestion control's own.",
        ),
    ] = 0.0
    layerwise: Annotated[
        LayerwiseMode,
        Meta(
            description="auto: the KV of a layer is sent while the next ones are computed, where SGLang's mode permits "
            "it. off: after each prefill chunk."
        ),
    ] = "auto"
    inner_rail: Annotated[
        InnerRailKind,
        Meta(
            description="How KVCache goes from a prefill to a decode server of this site. none: as between sites. "
            "mooncake: over SGLang's Mooncake backend (RDMA, or what MOONCAKE_PROTOCOL says), which knows no keys."
        ),
    ] = "none"
    link_sample_interval_s: Annotated[
        float, Meta(ge=0.01, le=1, description="Seconds between two looks at the connections of a link (TCP_INFO).")
    ] = 0.1
    max_link_inflight_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="KVCache of one prefill rank that may be on its way to one site, in bytes; further requests "
            "wait before they are computed. 0: what the link carries in 10 s.",
        ),
    ] = 0
    admission_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds a request waits for room on its link before it fails.")
    ] = 60.0


class CachePeerConfig(_Config, frozen=True):
    """A site whose prefix cache may be asked for prefixes that are not here."""

    name: Annotated[Name, Meta(description="Name of the site.")]
    host: Annotated[str, Meta(min_length=1, description="Address of its prefix_cache.serve_port.")]
    port: Annotated[Port, Meta(description="Its prefix_cache.serve_port.")]
    capacity_gbps: Annotated[
        float,
        Meta(
            ge=0,
            description="Gbit/s that fetches are expected to get, until some were measured. 0: that of [[links]] to "
            "the site, else 1.",
        ),
    ] = 0.0
    rtt_ms: Annotated[
        float,
        Meta(ge=0, description="Round-trip time in milliseconds, until it was measured. 0: that of [[links]], else 0."),
    ] = 0.0


class PrefixCacheConfig(_Config, frozen=True):
    """Prefix cache that outlives its servers: HiCache with this project's storage backend, on prefill servers."""

    backend: Annotated[
        PrefixCacheBackend,
        Meta(description="off: none. local: host memory, then disk_dir. mooncake: host memory, then Mooncake Store."),
    ] = "off"
    host_bytes: Annotated[
        int,
        Meta(
            ge=0, description="Host memory in bytes, of each rank, for cached prefixes, beside HiCache's own. 0: none."
        ),
    ] = 0
    prefix_floor: Annotated[
        float, Meta(ge=0, le=1, description="Share of host_bytes that fetches can not take from cached prefixes.")
    ] = 0.0
    transfer_floor: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of host_bytes that cached prefixes can not take from fetches on their way, which then "
            "wait there. 0: they wait in memory of their own, fetch_bytes of it.",
        ),
    ] = 0.0
    disk_dir: Annotated[
        str, Meta(description="local: directory of cached objects; the servers of a host may share one.")
    ] = ""
    disk_bytes: Annotated[
        int, Meta(ge=1 << 20, description="local: most bytes in disk_dir, of all servers that share it.")
    ] = 64 << 30
    stats_dir: Annotated[
        str, Meta(description="Directory of one JSON file of counters a rank. Empty: disk_dir/stats, or none.")
    ] = ""
    model_id: Annotated[
        str, Meta(description="Any text; change it when weights change that the model's files do not show.")
    ] = ""
    mooncake_master: Annotated[str, Meta(description="mooncake: address of mooncake_master, HOST:PORT.")] = ""
    mooncake_metadata: Annotated[str, Meta(description="mooncake: metadata server. P2PHANDSHAKE needs none.")] = (
        "P2PHANDSHAKE"
    )
    mooncake_host: Annotated[
        str, Meta(description="mooncake: address at which other hosts reach this one's segment.")
    ] = "127.0.0.1"
    mooncake_protocol: Annotated[Literal["tcp", "rdma"], Meta(description="mooncake: tcp or rdma.")] = "tcp"
    mooncake_device: Annotated[str, Meta(description="mooncake: RDMA devices, comma separated. Empty for tcp.")] = ""
    mooncake_segment_bytes: Annotated[
        int, Meta(ge=0, description="mooncake: memory each rank lends to the store, in bytes.")
    ] = 4 << 30
    mooncake_buffer_bytes: Annotated[
        int, Meta(ge=1 << 20, description="mooncake: memory of each rank for transfers, in bytes.")
    ] = 256 << 20
    serve_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="Port where the agent lets other sites read disk_dir, with the keys of [transport]. 0: none.",
        ),
    ] = 0
    serve_host: Annotated[str, Meta(description="Address of serve_port. Empty: agent.host.")] = ""
    serve_to: Annotated[
        list[str],
        Meta(
            description="Sites that may read from serve_port, where keys are used; no others, whatever peers.toml "
            "says. Without keys: whoever reaches the port."
        ),
    ] = field(default_factory=list)
    peers: Annotated[
        list[CachePeerConfig],
        Meta(description="Sites asked for prefixes, in this order, where fetching is quicker than computing."),
    ] = field(default_factory=list)
    prefill_profile: Annotated[
        str,
        Meta(
            description="For peers: profile file (docs/planning.md) whose prefill curve tells what computing takes. "
            "Empty: prefill_tokens_per_s."
        ),
    ] = ""
    prefill_hardware: Annotated[
        str, Meta(description="Prefill curve of prefill_profile that these servers have. Empty: the only one.")
    ] = ""
    prefill_tokens_per_s: Annotated[
        float,
        Meta(
            ge=0,
            description="For peers, without a profile: prompt tokens a server computes in a second, as 1 over seconds.",
        ),
    ] = 0.0
    fetch_margin: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="Share of the time to compute that a fetch has to save, as expected, to be begun.",
        ),
    ] = 0.2
    fetch_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Seconds a fetch may take, where computing would take longer still. Else it ends when "
            "computing would have.",
        ),
    ] = 30.0
    fetch_bytes: Annotated[
        int, Meta(ge=1 << 20, description="Memory of each rank for what is being fetched, in bytes.")
    ] = 1 << 30


class LinkConfig(_Config, frozen=True):
    """A link from this site to another."""

    to_site: Annotated[Name, Meta(description="Name of the site at the other end.")]
    capacity_gbps: Annotated[float, Meta(gt=0, description="Capacity in Gbit/s.")]
    rtt_ms: Annotated[float, Meta(ge=0, description="Round-trip time in milliseconds.")] = 0.0
    codec: Annotated[
        CodecName | Literal[""],
        Meta(description="In a site's file: codec of [transport] for that site. Empty: that of [transport]."),
    ] = ""
    connections: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="In a site's file: TCP connections between two ranks over this link; the prefill site's file "
            "counts before the decode site's. 0: those of [transport], and more where capacity and round-trip time "
            "need more than the kernel's buffers hold.",
        ),
    ] = 0
    socket_buffer_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="In a site's file: socket buffer of one connection over this link, in bytes. 0: that of "
            "[transport], else the kernel's autotuning, or as capacity and round-trip time need where it gives less.",
        ),
    ] = 0
    congestion_control: Annotated[
        str,
        Meta(
            max_length=15,
            description="In a site's file: TCP congestion control over this link. Empty: that of [transport].",
        ),
    ] = ""
    dial: Annotated[
        Literal["decode", "prefill"],
        Meta(
            description="Which site dials. decode: the decode site, as needed. prefill: the site that prefills, which "
            "cannot be reached, dials the gateway of the other one (`launch gateway`)."
        ),
    ] = "decode"
    gateway: Annotated[
        str,
        Meta(
            description="dial = prefill: HOST:PORT of the decode site's gateway; it takes the port after it too. In "
            "the prefilling site's file where it is dialled, in the decode site's where it listens."
        ),
    ] = ""
    gateway_ports: Annotated[
        list[Port],
        Meta(
            max_length=1024,
            description="dial = prefill, in the decode site's file: ports of the other site that the gateway has at "
            "its own address: bootstrap, mover and agent ports.",
        ),
    ] = field(default_factory=list)
    pacing_mbps: Annotated[
        float, Meta(ge=0, description="In a site's file: pacing_mbps over this link. 0: that of [transport].")
    ] = 0.0


class AgentConfig(_Config, frozen=True):
    """The agent: watches the site's servers and is its HTTP gateway for routers."""

    host: Annotated[str, Meta(description="Address the agent listens on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="HTTP port of the agent. 0: no agent endpoint.")] = 0
    tls: Annotated[
        bool,
        Meta(
            description="HTTPS at `port`, with the keys of [transport], for clients with a certificate of a site in "
            "peers.toml only: routers then have an https agent_url. Otherwise prompts and answers cross in clear."
        ),
    ] = False
    reports_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="ZeroMQ port for routers: loads, links and states up, commands down. With the keys of "
            "[transport]. 0: none, routers only ask over HTTP.",
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


class SiteLimits(_Config, frozen=True):
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


class SiteSection(_Config, frozen=True):
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


class SiteConfig(_Config, frozen=True):
    """One datacenter: `[site]`, `[[servers]]`, `[transport]`, `[prefix_cache]`, `[[links]]`, `[agent]`, `[limits]`."""

    site: SiteSection
    servers: Annotated[list[ServerConfig], Meta(min_length=1, description="The SGLang servers.")]
    transport: TransportConfig = TransportConfig()
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    links: Annotated[list[LinkConfig], Meta(description="Links to other sites.")] = field(default_factory=list)
    agent: AgentConfig = AgentConfig()
    limits: SiteLimits = SiteLimits()


# --- the router -----------------------------------------------------------------------------------------------------


class TargetConfig(_Config, frozen=True):
    """One SGLang server as the router reaches it."""

    name: Annotated[Name, Meta(description="Name of the server, unique in its site.")]
    role: Annotated[ServerRole, Meta(description="What it does: prefill or decode.")]
    url: Annotated[
        str, Meta(pattern=r"^https?://", description="Base URL of the server, or of its agent's gateway path.")
    ]
    bootstrap_host: Annotated[
        str, Meta(description="Prefill only: where decode reaches its bootstrap. Empty: the host of url.")
    ] = ""
    bootstrap_port: Annotated[int, Meta(ge=0, le=65535, description="Prefill only: its bootstrap port.")] = 0
    kv_events: Annotated[
        str,
        Meta(description="ZeroMQ endpoint of its KV events, as tcp://HOST:PORT. Without keys: in one network only."),
    ] = ""
    kv_replay: Annotated[
        str, Meta(description="Endpoint where its KV events are replayed. Empty: every gap starts from nothing.")
    ] = ""
    kv_topic: Annotated[str, Meta(description="Topic of its KV events.")] = ""


class RouterSite(_Config, frozen=True):
    """One site as the router sees it: either `agent_url` (the agent lists its servers) or `servers`."""

    name: Annotated[Name, Meta(description="Name of the site.")]
    role: Annotated[SiteRole, Meta(description="prfaas or pd.")]
    agent_url: Annotated[
        str, Meta(description="Base URL of the site's agent, which lists and relays to its servers. Empty: no agent.")
    ] = ""
    reports_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="The agent's reports_port, at the host of agent_url: loads and states as they change. 0: none.",
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


class RouterSection(_Config, frozen=True):
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


class RolesConfig(_Config, frozen=True):
    """The long timescale: when a server of the PD site changes its role."""

    enabled: Annotated[bool, Meta(description="Change roles of the PD site's servers as traffic shifts.")] = False
    interval_s: Annotated[float, Meta(gt=0, description="Seconds between two looks at utilisation and queues.")] = 60.0
    drain_s: Annotated[
        float,
        Meta(ge=0, description="Expected seconds until a server has finished its work; weighed against the gain."),
    ] = 30.0
    switch_s: Annotated[
        float, Meta(ge=0, description="Expected seconds from then until it serves again; weighed against the gain.")
    ] = 20.0
    horizon_s: Annotated[float, Meta(gt=0, description="Seconds over which a switch has to pay.")] = 900.0
    min_gain: Annotated[
        float,
        Meta(ge=0, le=1, description="Share of the demand that a switch must win over the horizon, after its cost."),
    ] = 0.03
    headroom: Annotated[
        float,
        Meta(ge=1, description="Demand counts as so many times the forecast: a stage just large enough has queues."),
    ] = 1.15
    confirm: Annotated[int, Meta(ge=1, description="Looks in a row that must want the same switch.")] = 2
    settle_s: Annotated[float, Meta(ge=0, description="Seconds of rest after a switch.")] = 120.0
    backoff_s: Annotated[
        float,
        Meta(ge=0, description="Seconds of rest after a failed switch; doubles up to 16 times with each further one."),
    ] = 300.0
    drain_timeout_s: Annotated[
        float, Meta(gt=0, description="Seconds that a server's requests may take to end; then it stays what it is.")
    ] = 300.0
    slo_tokens_per_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Speed promised to a request, in tokens over seconds. With a profile that has decode figures, "
            "what other roles could serve is then solved over the recent lengths. 0: it is measured, from utilisation "
            "and queues.",
        ),
    ] = 0.0
    slot_period_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Seconds of a period in which one server has both roles in turn, where whole servers leave "
            "capacity idle and it pays. 0: never.",
        ),
    ] = 0.0

    @property
    def cost_s(self) -> float:
        """Seconds that one server does not serve during a switch."""
        return self.drain_s + self.switch_s


class PolicyConfig(_Config, frozen=True):
    """How requests are routed (PrfaaS section 3.4.3)."""

    mode: Annotated[
        PolicyMode,
        Meta(
            description="fixed: t is threshold_tokens. live: t follows lengths, queues and links, and needs profile. "
            "auto: live where profile is given."
        ),
    ] = "auto"
    profile: Annotated[
        str,
        Meta(
            description="Profile file with measured curves (docs/planning.md), or paper for the paper's case study. "
            "Empty: none."
        ),
    ] = ""
    threshold_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="t: requests with more uncached tokens than this go to a PrfaaS site. Live: where t starts.",
        ),
    ] = 19_400
    exact_count_band: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of the threshold, around it, within which tokens are counted exactly.",
        ),
    ] = 0.5
    slo_ttft_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Live: promised seconds to the first token. A request whose path would miss it takes the other "
            "path where that meets it. 0: no promise.",
        ),
    ] = 0.0
    window_requests: Annotated[
        int, Meta(ge=50, le=1_000_000, description="Live: recent requests whose lengths t is solved over.")
    ] = 1000
    solve_interval_s: Annotated[
        float, Meta(gt=0, description="Live: seconds between two solutions of t; a change of servers or links is one.")
    ] = 10.0
    hysteresis: Annotated[
        float, Meta(ge=0, lt=1, description="Live: relative change of t below which it stays as it is.")
    ] = 0.02
    staleness_s: Annotated[
        float,
        Meta(
            gt=0,
            description="Live: age in seconds from which a report of a load or a link is not trusted. Figures are up "
            "to 0.7 s old when an agent sends them, every 0.5 s: 2.5 lets two reports in a row be late or lost.",
        ),
    ] = 2.5
    max_link_utilisation: Annotated[
        float, Meta(gt=0, le=1, description="Live: share of a link in use from which bandwidth counts as scarce.")
    ] = 0.9
    max_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            description="Live: seconds of prefill queue beyond which a request takes the other path, or is answered "
            "429 where that has as long a queue. 0: no limit.",
        ),
    ] = 0.0
    order: Annotated[
        OrderMode,
        Meta(
            description="Live: ordered: requests wait in the router until a prefill server has room, those first that "
            "can still have their first token in time, and an idle path helps the other. off: each goes to its server "
            "when it comes. auto: ordered where the policy is live."
        ),
    ] = "auto"
    feed_s: Annotated[
        float,
        Meta(ge=0, description="Ordered: a prefill server gets the next request so many seconds before it runs dry."),
    ] = 0.25
    feed_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="Ordered: a prefill server gets the next request while it has fewer tokens in work than this: "
            "a chunk of its prefill, so that short prompts fill it together.",
        ),
    ] = 8192
    max_held_s: Annotated[
        float,
        Meta(gt=0, description="Ordered: seconds after which a waiting request goes to a server, room or not."),
    ] = 120.0
    max_held_requests: Annotated[
        int, Meta(ge=0, description="Ordered: requests that may wait in the router; beyond it 429.")
    ] = 2000
    max_decode_requests: Annotated[
        int,
        Meta(ge=0, description="Requests in work per decode server; beyond it, on all of them, 429. 0: no limit."),
    ] = 0
    max_kv_occupancy: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Live: share of its KV in use, as reported, from which a decode server gets no request; on all "
            "of them, 429. 1: no limit.",
        ),
    ] = 1.0
    correct_profile: Annotated[
        bool, Meta(description="Live: correct the profile's prefill curves by what requests really take.")
    ] = True
    max_correction: Annotated[
        float, Meta(ge=1, le=100, description="Live: largest factor, up or down, on a prefill curve.")
    ] = 4.0
    correction_half_life_s: Annotated[
        float, Meta(gt=0, description="Live: seconds in which what was learnt loses half its weight.")
    ] = 600.0
    fetch_prefixes: Annotated[
        bool,
        Meta(
            description="Live: PrfaaS sites fetch prefixes that only the PD site holds ([[prefix_cache.peers]] there): "
            "while bandwidth is ample, the longest prefix of any site counts."
        ),
    ] = False
    decisions_kept: Annotated[
        int, Meta(ge=0, le=100_000, description="Last decisions that GET /decisions shows, with their figures.")
    ] = 256

    roles: RolesConfig = RolesConfig()

    @property
    def is_live(self) -> bool:
        """Whether the live policy runs."""
        return self.mode == "live" or (self.mode == "auto" and bool(self.profile))

    @property
    def is_ordered(self) -> bool:
        """Whether requests wait in the router for prefill."""
        return self.is_live and self.order != "off"


class RouterLimits(_Config, frozen=True):
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


class ReportsConfig(_Config, frozen=True):
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


class PrefixIndexConfig(_Config, frozen=True):
    """The router's index of what every server has in its prefix cache."""

    enabled: Annotated[
        bool, Meta(description="Ask agents, and servers that name kv_events, and route by what is cached.")
    ] = True
    max_blocks: Annotated[
        int, Meta(ge=1, le=1 << 30, description="Distinct blocks of all sites that it keeps; 13.4 bytes each.")
    ] = 4_000_000
    max_servers: Annotated[int, Meta(ge=1, le=4096, description="Caches that it tells apart.")] = 512
    interval_s: Annotated[
        float, Meta(gt=0, description="Seconds between two questions to an agent while nothing changes.")
    ] = 0.1
    min_tokens: Annotated[
        int, Meta(ge=0, description="Prompts that are estimated to have fewer tokens are not looked up.")
    ] = 64
    checkpoints: Annotated[
        CheckpointMode,
        Meta(
            description="Whether a prefix can be used only up to a state checkpoint, as with linear attention and "
            "sliding windows. auto: read from the model's config.json."
        ),
    ] = "auto"
    learn: Annotated[
        bool, Meta(description="Correct the index by the cached tokens that prefill servers name in their answers.")
    ] = True


class TenantConfig(_Config, frozen=True):
    """Clients that share a cache, and the sites that may see what they send."""

    name: Annotated[Name, Meta(description="Name of the tenant.")]
    api_keys: Annotated[
        list[str],
        Meta(description="SHA-256 in hexadecimal of each API key (Authorization: Bearer KEY) that is this tenant's."),
    ] = field(default_factory=list)
    sites: Annotated[
        list[Name], Meta(description="Sites that its requests may go to, prefill and decode. Empty: all.")
    ] = field(default_factory=list)
    cache_salt: Annotated[
        str,
        Meta(description="Salt of its prefix caches, put into every request in place of the client's. Empty: none."),
    ] = ""


class TenancyConfig(_Config, frozen=True):
    """How the router knows whose a request is."""

    header: Annotated[
        str,
        Meta(description="Header with a tenant's name, for tenants without api_keys; trust what sets it. Empty: none."),
    ] = ""
    required: Annotated[bool, Meta(description="Refuse requests of no tenant (403).")] = False


class RouterConfig(_Config, frozen=True):
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
