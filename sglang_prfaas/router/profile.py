"""The profile that a live router goes by."""

from __future__ import annotations

from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.paper import PAPER_PROFILE
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, load_profile


def router_profile(config: RouterConfig) -> ProfileFile:
    """The profile of a live policy. Raises ConfigError where it cannot be read or lacks a site's hardware."""
    profile = PAPER_PROFILE if config.policy.profile == "paper" else load_profile(config.policy.profile)
    for site in config.sites:
        site_curve(profile, site.name, site.hardware)
    return profile


def site_curve(profile: ProfileFile, site: str, hardware: str) -> PrefillProfile:
    """The prefill curve of a site's servers. Raises ConfigError where the profile has none, or several and no name."""
    if not hardware and len(profile.prefill) > 1:
        names = ", ".join(sorted(profile.prefill))
        raise ConfigError(
            f"sites.{site}.hardware: the profile has curves of {names}; write which one this site's servers have"
        )
    if hardware and hardware not in profile.prefill:
        names = ", ".join(sorted(profile.prefill))
        raise ConfigError(f"sites.{site}.hardware: the profile has no curve of {hardware!r}, only of {names}")
    return profile.prefill[hardware or next(iter(profile.prefill))]
