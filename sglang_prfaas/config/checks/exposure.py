"""Rules of `[agent]` and of the keys in `[transport]`: what other machines reach has keys, or says that it has none."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_prfaas.config.checks.finding import NOT_EXPANDED, Raw
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.config.security import NO_KEYS, beyond_this_machine


def security_findings(config: SiteConfig) -> Iterator[Raw]:
    """What is wrong with the keys of a site's movers."""
    transport = config.transport
    if config.site.transfer_backend != "prfaas":
        return
    if transport.security == "keys" and not transport.keys_dir:
        yield "transport.security", 'needs keys; write for example keys_dir = "/etc/sglang-prfaas/keys"', True
    if transport.keys_dir.startswith("~"):
        yield "transport.keys_dir", NOT_EXPANDED, True
    if transport.security == "off" and transport.keys_dir:
        yield "transport.security", '"off": the keys in keys_dir are not used', False
    if transport.security != "off" and transport.keys_dir:
        return
    for server in config.servers:
        listens = server.role == "prefill" or server.bootstrap_port
        hosts = (server.host, transport.bind_host or server.host) if listens else ()
        host = next(filter(beyond_this_machine, hosts), None)
        if host is None:
            continue
        what = f"the KVCache of server {server.name} is served on {host or 'every address'}"
        if transport.security == "off":
            text = f'"off", and {what}: whoever reaches it can read and forge KVCache'
            yield "transport.security", text, False
        else:
            yield "transport.keys_dir", f"{what}, {NO_KEYS}", True
        return


def agent_findings(config: SiteConfig) -> Iterator[Raw]:
    """What is wrong with the agent's ports, or leaves them open."""
    agent, transport = config.agent, config.transport
    if agent.tls and not transport.keys_dir:
        yield "agent.tls", "needs keys; write transport.keys_dir, this site's directory as `launch keys` makes it", True
    if agent.tls and transport.security == "off":
        yield "agent.tls", 'needs keys, and transport.security is "off"; remove one of the two', True
    if agent.port and not agent.tls and transport.keys_dir and beyond_this_machine(agent.host):
        text = "prompts and answers cross in clear; write true, unless the network or a proxy protects them"
        yield "agent.tls", text, False
    if agent.reports_port and not agent.port:
        yield "agent.port", "routers with reports need the agent's HTTP port too; write for example port = 9000", True
    if not agent.reports_port or not beyond_this_machine(agent.host):
        return
    what = f"reports are sent to, and commands taken from, whoever reaches {agent.host or 'any address'}"
    if transport.security == "off":
        yield "agent.reports_port", f'transport.security is "off": {what}', False
    elif not transport.keys_dir:
        text = f"{what}, without keys: set transport.keys_dir, or reports_port = 0"
        yield "agent.reports_port", text, True
