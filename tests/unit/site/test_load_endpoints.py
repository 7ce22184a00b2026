"""Where a server publishes its load."""

from __future__ import annotations

import json

import pytest

from sglang_prfaas.site.load_endpoints import load_endpoints

KV = json.dumps({"publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv"})
KV_REPLAY = json.dumps({"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"})


@pytest.mark.parametrize(
    ("args", "ports"),
    [
        ([], []),
        (["--load-publish-endpoint", "off"], []),
        (["--load-publish-endpoint", "tcp://*:7000"], [7000]),
        (["--load-publish-endpoint=tcp://*:7000", "--dp-size", "3"], [7000, 7001, 7002]),
        (["--load-publish-endpoint", "auto", "--kv-events-config", KV], [5558]),
        (["--load-publish-endpoint", "auto", "--kv-events-config", KV_REPLAY], [5559]),
        (["--load-publish-endpoint", "auto", "--kv-events-config", KV_REPLAY, "--dp-size", "2"], [5560, 5561]),
        (["--load-publish-endpoint", "auto", "--kv-events-config", "no json"], []),
        (["--load-publish-endpoint", "nonsense"], []),
    ],
)
def test_endpoints(args: list[str], ports: list[int]) -> None:
    assert load_endpoints(args, "10.0.0.1") == [f"tcp://10.0.0.1:{port}" for port in ports]


def test_ipv6() -> None:
    assert load_endpoints(["--load-publish-endpoint", "tcp://*:7000"], "::1") == ["tcp://[::1]:7000"]
