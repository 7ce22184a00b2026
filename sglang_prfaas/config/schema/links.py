"""`[[links]]`: links between sites."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from sglang_prfaas.config.schema.base import CodecName, Config, Name, Port


class LinkConfig(Config, frozen=True):
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
