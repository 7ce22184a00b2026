"""Whether the keys that site files name are there, fit together, and know each other."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from sglang_prfaas.config.checks import Finding
from sglang_prfaas.config.schema import SiteConfig
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
        try:
            keys = key_files.load_keys(Path(directory))
            texts = key_files.warnings(keys, time.time())
        except (ConfigError, OSError) as error:
            found.append(Finding(source, KEY, str(error)))
            continue
        if keys.site != config.site.name:
            text = f"{directory} holds the keys of site {keys.site}; this is site {config.site.name}"
            found.append(Finding(source, KEY, text))
            continue
        loaded[source] = keys
        found += [Finding(source, KEY, text, fatal=False) for text in texts]
        listed = keys.peers.current()
        for link in config.links:
            if link.to_site not in listed:
                text = f"{keys.peers.path} has no site {link.to_site}, which [[links]] leads to"
                found.append(Finding(source, KEY, text))
    by_site = {keys.site: keys for keys in loaded.values()}
    for source, keys in loaded.items():
        found += [Finding(source, KEY, text) for text in key_files.missing_peers(keys, by_site)]
    return found
