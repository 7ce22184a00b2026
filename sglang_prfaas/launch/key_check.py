"""Whether the keys that site files name are there, fit together, and know each other."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from sglang_prfaas.config.checks import Finding
from sglang_prfaas.config.schema import RouterConfig, SiteConfig
from sglang_prfaas.config.security import uses_keys
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.security import key_files
from sglang_prfaas.transport.security.key_files import KeyFiles

KEY = "transport.keys_dir"


def key_findings(sites: Mapping[str, SiteConfig], *, here: bool = False) -> list[Finding]:
    """Check the keys of sites; the mapping's keys are the files they came from. here: the sites run on this machine, so
    that a missing directory is a fault; otherwise its keys are not looked at, and a warning says so."""
    found: list[Finding] = []
    loaded: dict[str, KeyFiles] = {}
    for source, config in sites.items():
        directory = config.transport.keys_dir
        if not directory or config.transport.security == "off" or config.site.transfer_backend != "prfaas":
            continue
        if not here and not os.path.isdir(directory):
            text = f"no directory {directory} on this machine: the keys of site {config.site.name} were not checked"
            found.append(Finding(source, KEY, text, fatal=False))
            continue
        keys, said = _read(directory, source, KEY)
        if keys is None:
            found += said
            continue
        if keys.site != config.site.name:
            text = f"{directory} holds the keys of site {keys.site}; this is site {config.site.name}"
            found.append(Finding(source, KEY, text))
            continue
        loaded[source] = keys
        found += said
        listed = keys.peers.current()
        for link in config.links:
            if link.to_site not in listed:
                text = f"{keys.peers.path} has no site {link.to_site}, which [[links]] leads to"
                found.append(Finding(source, KEY, text))
    by_site = {keys.site: keys for keys in loaded.values()}
    for source, keys in loaded.items():
        found += [Finding(source, KEY, text) for text in key_files.missing_peers(keys, by_site)]
    return found


def router_key_findings(routers: Mapping[str, RouterConfig]) -> list[Finding]:
    """The same for the keys of routers: also whether the sites that they reach by their agents are in the list."""
    found: list[Finding] = []
    for source, config in routers.items():
        directory, path = config.reports.keys_dir, "reports.keys_dir"
        if not directory or not uses_keys(config.reports):
            continue
        if not os.path.isdir(directory):
            text = f"no directory {directory} on this machine: the keys of the router were not checked"
            found.append(Finding(source, path, text, fatal=False))
            continue
        keys, said = _read(directory, source, path)
        found += said
        if keys is None:
            continue
        listed = keys.peers.current()
        for site in config.sites:
            if (site.reports_port or site.agent_url.startswith("https:")) and site.name not in listed:
                text = f"{directory}/peers.toml has no site {site.name}, which [[sites]] names; copy peers.toml again"
                found.append(Finding(source, path, text))
    return found


def _read(directory: str, source: str, path: str) -> tuple[KeyFiles | None, list[Finding]]:
    """The keys in a directory, None where they do not fit, and what is to be said of them."""
    try:
        keys = key_files.load_keys(Path(directory))
        texts = key_files.warnings(keys, time.time())
    except (ConfigError, OSError) as error:
        return None, [Finding(source, path, str(error))]
    return keys, [Finding(source, path, text, fatal=False) for text in texts]
