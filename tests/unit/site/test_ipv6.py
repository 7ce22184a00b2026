"""A site whose servers and agent listen on IPv6 addresses."""

from __future__ import annotations

import socket

import msgspec
import pytest

from sglang_prfaas.launch.asking import Endpoint, ask
from sglang_prfaas.site import Site, running
from sglang_prfaas.site.progress import Progress, silent
from tests.unit.site.conftest import MakeSite, ask_agent


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_servers_are_watched_listed_and_relayed_to(make_site: MakeSite, fake_python: str) -> None:
    config = make_site("here", agent=True)
    config = msgspec.structs.replace(
        config,
        servers=[msgspec.structs.replace(server, host="::1") for server in config.servers],
        agent=msgspec.structs.replace(config.agent, host="::1"),
    )
    with running(Site(config, python=fake_python, progress=Progress(write=silent))) as sites:
        url = sites["here"].agent_url
        assert url == f"http://[::1]:{config.agent.port}"
        prefill, decode = ask(Endpoint(url), "/site")["servers"]
        assert (prefill["state"], decode["state"]) == ("ready", "ready")
        assert prefill["bootstrap_host"] == "::1"
        assert ask(Endpoint(url), "/servers/prefill_0/v1/loads")["loads"]
        assert ask_agent(url, "POST", "/control/prefill_0/none")[0] == 404, "whoever asks from ::1 is on this machine"
