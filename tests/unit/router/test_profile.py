"""The profile that a live router goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_prfaas.config.load import load_router
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.router.profile import router_profile, site_curve
from sglang_prfaas.scheduler.paper import PAPER_PROFILE
from sglang_prfaas.scheduler.profiles import load_profile

LAUNCH = Path(__file__).parents[3] / "launch"


def test_the_shipped_file_is_the_papers_profile() -> None:
    assert load_profile(LAUNCH / "profiles/paper.toml") == PAPER_PROFILE
    assert PAPER_PROFILE.prefill["H20"].origin.startswith("derived")


def test_the_example_router_can_go_live() -> None:
    flags = (
        ("policy.profile", "paper"),
        ("sites.pd.hardware", "H20"),
        ("sites.prfaas.hardware", "H200"),
        ("sites.prfaas.links.0.to_site", "pd"),
        ("sites.prfaas.links.0.capacity_gbps", "100"),
    )
    from sglang_prfaas.config.flags import split

    arguments = [text for key, value in flags for text in (f"--{key}", value)]
    config = load_router(LAUNCH / "datacenters/router.toml", split(arguments)[1])
    assert config.policy.is_live
    assert router_profile(config) is PAPER_PROFILE


def test_a_site_says_which_curve_it_has() -> None:
    assert site_curve(PAPER_PROFILE, "pd", "H20") is PAPER_PROFILE.prefill["H20"]
    with pytest.raises(ConfigError, match=r"sites.pd.hardware: the profile has curves of H20, H200; write which"):
        site_curve(PAPER_PROFILE, "pd", "")
    with pytest.raises(ConfigError, match=r"no curve of 'B200', only of H20, H200"):
        site_curve(PAPER_PROFILE, "pd", "B200")
