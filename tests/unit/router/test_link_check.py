"""Two files say of one link what it carries: a difference is said once, with both values."""

from __future__ import annotations

import logging

import pytest

from sglang_prfaas.config.schema import LinkConfig, RouterSite
from sglang_prfaas.monitor.reports import ConfiguredLink
from sglang_prfaas.router.link_check import LinkCheck

SITE = RouterSite(name="far", role="prfaas", links=[LinkConfig(to_site="home", capacity_gbps=100, rtt_ms=20)])


def told(capacity_gbps: float, rtt_ms: float = 20) -> list[ConfiguredLink]:
    return [ConfiguredLink(to_site="home", capacity_gbps=capacity_gbps, rtt_ms=rtt_ms)]


def test_the_same_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    other = ConfiguredLink(to_site="elsewhere", capacity_gbps=1)
    LinkCheck().told(SITE, [*told(100), other])
    assert not caplog.records


def test_a_difference_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    check = LinkCheck()
    for _ in range(3):
        check.told(SITE, told(10))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert "link far to home: capacity_gbps is 100 in the router's file, 10 in the site's" in text
    assert "rtt_ms" not in text
    assert "the site's value counts while its servers report the link" in text


def test_another_difference_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    check = LinkCheck()
    for links in (told(10), told(10, rtt_ms=5), told(100), told(10)):
        check.told(SITE, links)
    assert len(caplog.records) == 3
    assert "rtt_ms is 20 in the router's file, 5 in the site's" in caplog.records[1].getMessage()


def test_a_link_that_the_site_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    LinkCheck().told(SITE, [])
    (record,) = caplog.records
    assert "the site's file has no [[links]] there" in record.getMessage()
