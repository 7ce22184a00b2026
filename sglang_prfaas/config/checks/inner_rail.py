"""Rules of `transport.inner_rail`."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_prfaas.config.checks.finding import Raw
from sglang_prfaas.config.schema import SiteConfig

_PATH = "transport.inner_rail"


def inner_rail_findings(config: SiteConfig) -> Iterator[Raw]:
    """What is wrong with a site's inner rail, or makes it useless."""
    rail, site = config.transport.inner_rail, config.site
    if rail == "none":
        return
    if site.transfer_backend != "prfaas":
        text = f'works beside the transfer backend prfaas only, site.transfer_backend is "{site.transfer_backend}"'
        yield _PATH, f'{text}; remove one of both (SGLang alone runs with transfer_backend = "{rail}")', True
    elif site.role == "prfaas":
        yield _PATH, "not used by a prfaas site, which has no decode servers; remove it", False
