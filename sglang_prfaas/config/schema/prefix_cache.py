"""`[prefix_cache]`: the prefix cache that outlives its servers, and the sites that prefixes are fetched from."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from sglang_prfaas.config.schema.base import Config, Name, OptionalPort, Port

PrefixCacheBackend = Literal["off", "local", "mooncake"]


class CachePeerConfig(Config, frozen=True):
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


class PrefixCacheConfig(Config, frozen=True):
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
        OptionalPort,
        Meta(description="Port where the agent lets other sites read disk_dir, with the keys of [transport]. 0: none."),
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
