"""Rules of `[policy]` and `[policy.roles]`."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_prfaas.config.checks.finding import NOT_EXPANDED, Exists, Raw
from sglang_prfaas.config.schema import PolicyConfig, RouterConfig


def policy_findings(config: RouterConfig, exists: Exists) -> Iterator[Raw]:
    """What is wrong with a policy, or has no effect. exists: whether a path exists, for the profile."""
    policy = config.policy
    if policy.mode == "live" and not policy.profile:
        text = (
            '"live" needs measured curves; write policy.profile = "FILE" (docs/planning.md has the format), or "paper"'
        )
        yield "policy.mode", text, True
    if policy.mode == "fixed" and policy.profile:
        yield "policy.profile", 'not used with mode = "fixed"; remove it, or write mode = "live"', False
    if policy.profile.startswith("~"):
        yield "policy.profile", NOT_EXPANDED, True
    elif policy.profile not in ("", "paper") and not exists(policy.profile):
        yield "policy.profile", f'no such file: {policy.profile!r}; write the path of a profile file, or "paper"', True
    yield from _order(config)
    if policy.is_live:
        return
    defaults = PolicyConfig()
    for key in ("slo_ttft_s", "max_wait_s", "max_kv_occupancy"):
        if getattr(policy, key) != getattr(defaults, key):
            text = "has no effect with a fixed threshold; write a profile, or remove it"
            yield f"policy.{key}", text, False


def _order(config: RouterConfig) -> Iterator[Raw]:
    policy, limit_s = config.policy, config.limits.first_byte_timeout_s
    if policy.order == "ordered" and not policy.is_live:
        text = '"ordered" needs measured curves; write policy.profile = "FILE" (docs/planning.md has the format)'
        yield "policy.order", text, True
    if policy.is_ordered and policy.max_held_s >= limit_s:
        text = (
            f"requests may wait longer in the router ({policy.max_held_s:g} s) than at servers "
            f"(limits.first_byte_timeout_s = {limit_s:g}); write less, or more there"
        )
        yield "policy.max_held_s", text, False


def role_findings(config: RouterConfig) -> Iterator[Raw]:
    """What is wrong with changes of roles, or keeps them from happening."""
    roles = config.policy.roles
    if roles.horizon_s <= roles.cost_s:
        yield (
            "policy.roles.horizon_s",
            f"{roles.horizon_s:g} s is not longer than a switch takes (drain_s + switch_s = {roles.cost_s:g} s), so "
            "none could pay; write a longer horizon",
            True,
        )
    if 0 < roles.slot_period_s <= 2 * roles.cost_s:
        yield (
            "policy.roles.slot_period_s",
            f"{roles.slot_period_s:g} s is not longer than its two switches ({2 * roles.cost_s:g} s); write a longer "
            "period, or 0 for no slots",
            True,
        )
    if roles.enabled and not any(site.role == "pd" and site.agent_url and site.reports_port for site in config.sites):
        yield (
            "policy.roles.enabled",
            "no pd site has an agent that takes commands; write its agent_url and reports_port, or enabled = false",
            True,
        )
    if roles.slo_tokens_per_s and not config.policy.is_live:
        yield "policy.roles.slo_tokens_per_s", "has no effect without policy.profile; write one, or remove it", False
