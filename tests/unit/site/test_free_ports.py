"""Ports and addresses before they are used."""

from __future__ import annotations

import socket

import pytest

from sglang_prfaas.config.ports import PortClaim
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.site.free_ports import require_free


def test_an_address_of_another_machine_is_one_message() -> None:
    """192.0.2.0/24 is for documentation (RFC 5737): no machine has it."""
    claims = [
        PortClaim("192.0.2.1", 30000, 30000, "server p0", "servers.p0.port"),
        PortClaim("192.0.2.1", 31000, 31007, "the mover of server p0", "servers.p0.mover_port"),
        PortClaim("no-such-host.invalid", 30000, 30000, "server p1", "servers.p1.port"),
    ]
    with pytest.raises(LaunchError) as caught:
        require_free(claims)
    first, second = str(caught.value).splitlines()
    assert first.startswith(
        "nothing can listen on 192.0.2.1 here (Cannot assign requested address): wanted by server p0,"
    )
    assert "the mover of server p0. What a file describes runs on one machine" in first
    assert second.startswith("nothing can listen on no-such-host.invalid here ('no-such-host.invalid' is no address")


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} \(the agent\) is in use.*--agent.port"):
            require_free([PortClaim("127.0.0.1", port, port, "the agent", "agent.port")])
    require_free([PortClaim("127.0.0.1", port, port, "the agent", "agent.port")])
