"""Whether a mover uses keys, and where it must. Needs no key files."""

from __future__ import annotations

import ipaddress

from sglang_prfaas.config.schema import ReportsConfig, TransportConfig
from sglang_prfaas.errors import ConfigError

NO_KEYS = (
    "which other machines reach, without keys: make some with `python -m sglang_prfaas.launch keys DIR` and set "
    "transport.keys_dir (PRFAAS_KEYS_DIR), or, in a network where everybody may read and forge KVCache, set "
    'transport.security = "off" (PRFAAS_SECURITY=off)'
)


def uses_keys(config: TransportConfig | ReportsConfig) -> bool:
    """Whether connections are authenticated and encrypted. Raises ConfigError for `keys` without a directory."""
    if config.security == "keys" and not config.keys_dir:
        table = "reports" if isinstance(config, ReportsConfig) else "transport"
        raise ConfigError(f'{table}.security = "keys" needs {table}.keys_dir, the directory with this site\'s keys')
    return bool(config.keys_dir) and config.security != "off"


def beyond_this_machine(host: str) -> bool:
    """Whether others may reach what listens on `host`; a name other than localhost counts as yes."""
    host = host.strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return True
