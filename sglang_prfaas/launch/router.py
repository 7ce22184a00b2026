"""`launch router`: one router, until it is told to stop."""

from __future__ import annotations

import argparse
from functools import partial

import msgspec

from sglang_prfaas.config import checks, load
from sglang_prfaas.config.ports import router_claims
from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.launch.overrides import describe_keys, log_to_stderr, print_warnings, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch router`."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="TOML file of the router")
    parser.add_argument("--json-status", action="store_true", help="when it listens, print one JSON line on stdout")
    parser.description = (
        "Start a router. It listens at once and finds servers as they come up; SIGTERM or SIGINT stop it, after the\n"
        "requests in work have ended or limits.drain_timeout_s is over."
    )
    describe_keys(parser, RouterConfig)


def run(args: argparse.Namespace) -> int:
    """Run the router; returns the exit status."""
    config = load.load_router(args.file, args.overrides)
    log_to_stderr()
    print_warnings(checks.router_findings(config, load.name_of(args.file)))
    from sglang_prfaas import router
    from sglang_prfaas.router.profile import router_profile
    from sglang_prfaas.site.free_ports import require_free

    if config.policy.is_live:
        router_profile(config)  # what is wrong with it is said before the tokenizer is loaded
    require_free(router_claims(config))
    router.run(config, ready=partial(_announce, config, args.json_status))
    return 0


def _announce(config: RouterConfig, json_status: bool, port: int) -> None:
    """The ready line on stdout."""
    url = base_url("http", config.router.host, port)
    if json_status:
        print(msgspec.json.encode({"event": "ready", "url": url}).decode(), flush=True)
    else:
        print(f"router is ready: {url}, threshold {config.policy.threshold_tokens} tokens", flush=True)
        say(f"sites: {', '.join(f'{site.name} ({site.role})' for site in config.sites)}")
