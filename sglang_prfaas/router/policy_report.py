"""What a live policy has in force, for `GET /policy` and `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.scheduler.types import LinkView

if TYPE_CHECKING:
    from sglang_prfaas.router.live_policy import LiveRouting


def describe(policy: LiveRouting, now_s: float) -> dict[str, Any]:
    """What is in force, for `GET /policy`."""
    moment = policy.look(now_s)
    for home, state in moment.states.items():
        policy.live.threshold(state, 0, 0, home)
    return {
        "mode": "live",
        "thresholds": policy.live.choices,
        "sites": moment.states,
        "bandwidth_scarce": policy.source.scarce,
        "links": [
            {"from": pair[0], "to": pair[1], "gbps": bytes_per_s_to_gbps(link.bytes_per_s), **_plain(link)}
            for pair, link in policy.observation.links.items()
        ],
        "prefill": [
            {
                "site": t.site,
                "server": t.name,
                "alive": t.alive,
                "requests": t.inflight_requests,
                "wait_s": t.wait_s,
                "of_others_s": t.foreign_wait_s,
            }
            for t in policy.registry.targets()
            if t.role == "prefill"
        ],
        "order": policy.line.describe(now_s) if policy.line is not None else None,
        "profile": {
            "model": policy.profile.model,
            "sites": {site: profile.origin for site, profile in policy.live.profiles.items()},
            "correction": policy.live.correction.table(),
        },
        "settings": policy.config.policy,
    }


def gauges(policy: LiveRouting, now_s: float) -> list[Gauge]:
    """Figures for `/metrics`."""
    moment = policy.look(now_s)
    choices = {home: policy.live.threshold(state, 0, 0, home) for home, state in moment.states.items()}
    correction = policy.live.correction.table()
    return [
        (
            "prfaas_router_policy_threshold_tokens",
            "t of a PD site at this moment, without any prefix.",
            ("site",),
            [((home,), choice.t_tokens) for home, choice in choices.items()],
        ),
        (
            "prfaas_router_policy_balanced_tokens",
            "t*, eq. 7 over the recent lengths.",
            ("site",),
            [((home,), choice.t_balanced) for home, choice in choices.items()],
        ),
        (
            "prfaas_router_policy_utilisation",
            "rho, of both prefill stages at t*.",
            ("site",),
            [((home,), choice.utilisation) for home, choice in choices.items()],
        ),
        (
            "prfaas_router_prefill_wait_seconds",
            "Expected wait for a prefill server.",
            ("site", "server"),
            [((t.site, t.name), t.wait_s) for t in policy.registry.targets() if t.role == "prefill"],
        ),
        (
            "prfaas_router_link_bytes_per_second",
            "What a link carries at most.",
            ("from", "to"),
            [(pair, link.bytes_per_s) for pair, link in policy.observation.links.items()],
        ),
        (
            "prfaas_router_link_wait_seconds",
            "Time to send what is ready at a link.",
            ("from", "to"),
            [(pair, link.wait_s) for pair, link in policy.observation.links.items()],
        ),
        *(policy.line.gauges(now_s) if policy.line is not None else ()),
        (
            "prfaas_router_link_free_bytes_per_second",
            "What a new transfer would get of a link.",
            ("from", "to"),
            [(pair, link.free_bytes_per_s) for pair, link in policy.observation.links.items()],
        ),
        (
            "prfaas_router_link_rtt_seconds",
            "Round-trip time of a link.",
            ("from", "to"),
            [(pair, link.rtt_s) for pair, link in policy.observation.links.items()],
        ),
        (
            "prfaas_router_link_congested",
            "Whether a link is reported as congested.",
            ("from", "to"),
            [(pair, link.congested) for pair, link in policy.observation.links.items()],
        ),
        (
            "prfaas_router_link_measured",
            "Whether the figures of a link are reported and fresh, or as configured.",
            ("from", "to"),
            [(pair, link.measured) for pair, link in policy.observation.links.items()],
        ),
        (
            "prfaas_router_prefill_correction",
            "Factor on the profile's prefill time, by lowest length.",
            ("site", "tokens"),
            [((site, str(low)), f) for site, table in correction.items() for low, f in table.items()],
        ),
    ]


def _plain(link: LinkView) -> dict[str, Any]:
    return {**msgspec.structs.asdict(link), "wait_s": link.wait_s}
