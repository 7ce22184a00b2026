"""Where servers publish their KV events, and what a site adds to their command lines."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.config import sglang_args
from sglang_prfaas.site import kv_event_endpoints as endpoints
from sglang_prfaas.site.site import Site

from .conftest import MakeSite


def test_one_cache_gets_unix_sockets_and_ranks_get_ports() -> None:
    one = endpoints.chosen_config([], "/tmp/x", 3)
    assert (one.endpoint, one.replay_endpoint, one.bind) == ("ipc:///tmp/x/3", "ipc:///tmp/x/3r", None)
    two = endpoints.chosen_config(["--dp-size", "2"], "/tmp/x", 0)
    assert two.bind is True
    found = endpoints.sources("pd", "s", two, 2, "127.0.0.1")
    ports = [int(url.rpartition(":")[2]) for source in found for url in (source.endpoint, source.replay_endpoint)]
    assert len(set(ports)) == 4
    assert [source.holder.dp_rank for source in found] == [0, 1]
    assert ports[2] == ports[0] + 1


@pytest.mark.parametrize(
    ("config", "endpoint"),
    [
        ('{"publisher":"zmq","endpoint":"tcp://*:5557","topic":"kv","hwm":5}', "tcp://10.0.0.3:5558"),
        ('{"publisher":"zmq","endpoint":"tcp://10.9.9.9:5557"}', "tcp://10.9.9.9:5558"),
        ('{"publisher":"null"}', ""),
        ('{"publisher":"zmq","endpoint":"tcp://*:5557","format":"dynamo"}', ""),
        ('{"publisher":"zmq","endpoint":"tcp://nowhere"}', ""),
        ("no json", ""),
    ],
)
def test_what_a_servers_arguments_say_is_used(config: str, endpoint: str) -> None:
    given = endpoints.given_config(["--kv-events-config", config])
    assert (given is not None) == bool(endpoint)
    if given is not None:
        assert endpoints.sources("pd", "s", given, 2, "10.0.0.3")[1].endpoint == endpoint


def test_a_site_with_reports_has_its_servers_publish(make_site: MakeSite) -> None:
    config = make_site(agent=True)
    with_reports = msgspec.structs.replace(
        config, agent=msgspec.structs.replace(config.agent, reports_port=config.agent.port + 1)
    )
    for given, publishes in (
        (config, False),
        (with_reports, True),
        (
            msgspec.structs.replace(with_reports, agent=msgspec.structs.replace(with_reports.agent, kv_events=False)),
            False,
        ),
    ):
        servers = Site(given).servers.values()
        assert [sglang_args.has(s.command.argv, "--kv-events-config") for s in servers] == [publishes] * 2


def test_a_servers_own_option_stays_the_only_one(make_site: MakeSite) -> None:
    own = '{"publisher":"zmq","endpoint":"tcp://*:5557"}'
    config = make_site(agent=True)
    config = msgspec.structs.replace(
        config,
        agent=msgspec.structs.replace(config.agent, reports_port=config.agent.port + 1),
        site=msgspec.structs.replace(config.site, args=["--kv-events-config", own]),
    )
    for server in Site(config).servers.values():
        assert server.command.argv.count("--kv-events-config") == 1
