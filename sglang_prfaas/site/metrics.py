"""The agent's metrics in Prometheus text format. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.transport.object_server import ServedStats


class ServerFigures(Struct, frozen=True, kw_only=True):
    """One server, for its metrics. offered: whether routers may use it."""

    name: str
    role: str
    state: State
    offered: bool
    restarts: int
    relayed: int
    load: ServerLoad | None


Sample = tuple[Mapping[str, str], float]


def render(
    site: str,
    servers: list[ServerFigures],
    links: Iterable[LinkLoad],
    role_changes: Mapping[tuple[str, str], int],
    routers: int,
    cached_blocks: Iterable[Sample] = (),
) -> str:
    """What `GET /metrics` answers. role_changes: ended ones by server and result."""
    loads = [(server, server.load) for server in servers if server.load is not None]

    def of(server: ServerFigures, **labels: str) -> dict[str, str]:
        return {"site": site, "server": server.name, **labels}

    lines = [
        *_family(
            "prfaas_server_state",
            "gauge",
            "Whether a server is in a state.",
            ((of(s, role=s.role, state=state), s.state is state) for s in servers for state in State),
        ),
        *_family(
            "prfaas_server_offered",
            "gauge",
            "Whether routers may give a server new requests.",
            ((of(s, role=s.role), s.offered) for s in servers),
        ),
        *_family(
            "prfaas_server_restarts_total",
            "counter",
            "Restarts of a server since the site was started.",
            ((of(s), s.restarts) for s in servers),
        ),
        *_family(
            "prfaas_agent_relayed_requests_total",
            "counter",
            "Requests relayed to a server.",
            ((of(s), s.relayed) for s in servers),
        ),
        *_family(
            "prfaas_server_requests",
            "gauge",
            "Requests that a server holds, by queue.",
            (
                (of(server, queue=queue), getattr(load, queue))
                for server, load in loads
                for queue in ("running", "waiting", "prealloc", "transferring")
            ),
        ),
    ]
    for name, text, field in (
        ("waiting_uncached_tokens", "Prompt tokens that prefill has to compute.", "waiting_uncached_tokens"),
        ("kv_tokens_used", "Tokens in the KVCache.", "kv_tokens_used"),
        ("kv_tokens_total", "Tokens that fit into the KVCache.", "kv_tokens_total"),
        ("prefill_tokens_per_s", "Prompt tokens computed per busy second.", "prefill_tokens_per_s"),
        ("decode_tokens_per_s", "Tokens generated per busy second.", "decode_tokens_per_s"),
        ("step_seconds", "Mean time of a decode step.", "step_s"),
        ("busy_fraction", "Share of the last seconds in which a server computed.", "busy_fraction"),
        ("load_age_seconds", "Age of a server's figures.", "age_s"),
    ):
        samples = ((of(server), getattr(load, field)) for server, load in loads)
        lines += _family(f"prfaas_server_{name}", "gauge", text, samples)
    for name, text, field in (
        ("used_bytes_per_second", "KVCache that crosses a link.", "used_bytes_per_s"),
        ("capacity_bytes_per_second", "What a link carries at most.", "capacity_bytes_per_s"),
        ("backlog_bytes", "KVCache that is ready and not yet acknowledged.", "backlog_bytes"),
        ("rtt_seconds", "Round-trip time.", "rtt_s"),
        ("min_rtt_seconds", "Round-trip time without queues.", "min_rtt_s"),
        ("loss_fraction", "Share of segments sent again.", "loss_fraction"),
        ("available_bytes_per_second", "What is left of a link's capacity.", "available_bytes_per_s"),
        ("connections", "Data connections that stand.", "connections"),
        ("filled", "Whether the network was the limit just now.", "filled"),
        ("congested", "Whether more would only queue.", "congested"),
        ("load_age_seconds", "Age of a link's figures.", "age_s"),
    ):
        samples = (({"from_site": link.from_site, "to_site": link.to_site}, getattr(link, field)) for link in links)
        lines += _family(f"prfaas_link_{name}", "gauge", text, samples)
    changes = (({"site": site, "server": name, "result": result}, n) for (name, result), n in role_changes.items())
    lines += _family("prfaas_role_changes_total", "counter", "Changes of a server's role, by result.", changes)
    text = "Blocks that a server has cached, by tier; states: at how many a recurrent state is kept."
    lines += _family("prfaas_server_cached_blocks", "gauge", text, cached_blocks)
    lines += _family("prfaas_agent_routers", "gauge", "Routers that get reports.", [({"site": site}, routers)])
    return "\n".join(lines) + "\n"


def render_transfers(counts: Mapping[tuple[str, str, str], LinkCounts]) -> str:
    """What movers have sent, by from site, to site and mover."""
    labelled = [
        ({"from_site": from_site, "to_site": to_site, "mover": mover}, one)
        for (from_site, to_site, mover), one in counts.items()
    ]
    lines: list[str] = []
    results = [({**labels, "result": name}, getattr(one, name)) for labels, one in labelled for name in _RESULTS]
    lines += _family("prfaas_transfer_requests_total", "counter", "Requests that have ended, by result.", results)
    for name, text in (
        ("resent_chunks", "Chunks sent again: they arrived corrupt, or their connection was lost."),
        ("corrupt_chunks", "Chunks that arrived with a wrong checksum."),
        ("reconnects", "Data connections made again after the first time."),
        ("sessions_ended", "Sessions with decode ranks that have ended."),
    ):
        samples = [(labels, getattr(one, name)) for labels, one in labelled]
        lines += _family(f"prfaas_transfer_{name}_total", "counter", text, samples)
    codecs = [
        ({**labels, "codec": name}, one) for labels, link in labelled for name, one in sorted(link.codecs.items())
    ]
    lines += _family(
        "prfaas_transfer_bytes_total",
        "counter",
        "Bytes of ended requests, as they lie in memory, by the session's encoding of KVCache.",
        [(labels, one.bytes) for labels, one in codecs],
    )
    lines += _family(
        "prfaas_transfer_wire_bytes_total",
        "counter",
        "The same bytes as they were sent.",
        [(labels, one.wire_bytes) for labels, one in codecs],
    )
    lines += _family(
        "prfaas_transfer_saved_bytes_total",
        "counter",
        "Bytes that the encoding has saved.",
        [(labels, one.bytes - one.wire_bytes) for labels, one in codecs],
    )
    lines += _family(
        "prfaas_transfer_sessions",
        "gauge",
        "Sessions with decode ranks that stand, by encoding.",
        [(labels, one.sessions) for labels, one in codecs],
    )
    return "\n".join(lines) + "\n" if lines else ""


_RESULTS = ("done", "failed")


def render_cache(site: str, served: ServedStats) -> str:
    """What other sites read from the prefix cache."""
    lines: list[str] = []
    for name, text, field in (
        ("questions", "Questions of other sites for prefixes.", "questions"),
        ("objects", "Pages and states sent to other sites.", "objects"),
        ("bytes", "Bytes of them.", "bytes"),
        ("refused_connections", "Connections that were not let in, or broke the protocol.", "refused"),
    ):
        lines += _family(
            f"prfaas_cache_served_{name}_total", "counter", text, [({"site": site}, getattr(served, field))]
        )
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, help_text: str, samples: Iterable[Sample]) -> list[str]:
    lines = []
    for labels, value in samples:
        inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
        lines.append(f"{name}{{{inner}}} {float(value):.10g}")
    return [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *lines] if lines else []
