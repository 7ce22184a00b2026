"""Agents over HTTPS: the router shows its site's certificate, and takes that of the agent's site only."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_prfaas.config.schema import ReportsConfig, RouterSite
from sglang_prfaas.config.security import uses_keys
from sglang_prfaas.http import Client
from sglang_prfaas.transport.security import SiteTls, load_security


def require_agents(client: Client, sites: Sequence[RouterSite], config: ReportsConfig) -> None:
    """Make `client` insist on the right agent behind every https `agent_url`.

    Without keys in `[reports]` such a URL leads to a proxy with a certificate that the system's authorities vouch for.
    Raises ConfigError for keys that do not fit."""
    agents = [site for site in sites if site.agent_url.startswith("https:")]
    if not agents or not uses_keys(config):
        return
    security = load_security(config)
    for site in agents:
        client.require(site.agent_url, SiteTls(security, listens=False, site=site.name))
