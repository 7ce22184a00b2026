"""`[policy]` and `[policy.roles]`: where requests go, and when servers change their role."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sglang_prfaas.config.schema.base import Config

PolicyMode = Literal["auto", "fixed", "live"]
OrderMode = Literal["auto", "ordered", "off"]


class RolesConfig(Config, frozen=True):
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


class PolicyConfig(Config, frozen=True):
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
        Meta(
            gt=0,
            description="Ordered: seconds after which a waiting request goes to a server, room or not; under an "
            "overload it has its turn among the others.",
        ),
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
