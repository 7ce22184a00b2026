"""`[transport]`: the KVCache mover."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sglang_prfaas.config.schema.base import CodecName, Config, SecurityMode

LayerwiseMode = Literal["auto", "off"]
InnerRailKind = Literal["none", "mooncake"]


class TransportConfig(Config, frozen=True):
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
    ] = 4 << 20
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
