"""Mooncake Store for real: its master, and two clients over TCP on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_prfaas.config.schema import PrefixCacheConfig
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.store.mooncake import MooncakeStore
from sglang_prfaas.store.objects import frame_head
from sglang_prfaas.store.stats import Counters

SEGMENT_BYTES = 32 << 20
OBJECT_BYTES = 300_000


def config(port: int) -> PrefixCacheConfig:
    return PrefixCacheConfig(
        backend="mooncake",
        mooncake_master=f"127.0.0.1:{port}",
        mooncake_segment_bytes=SEGMENT_BYTES,
        mooncake_buffer_bytes=16 << 20,
    )


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a running master. Skips where the client does not load, and says why."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mooncake is not installed: pip install 'sglang-prfaas[mooncake]'")
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.skip(f"mooncake's client does not load: {error} (Debian: apt-get install libibverbs1)")
    binary = Path(next(iter(spec.submodule_search_locations))) / "mooncake_master"
    port, metrics_port = free_ports(1)[0], free_ports(1)[0]
    log = tmp_path_factory.mktemp("mooncake") / "master.log"
    argv = [str(binary), "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
    argv += ["--metrics_host=127.0.0.1", f"--metrics_port={metrics_port}"]
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + 60
            while not listens(port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield port
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def clients(master: int) -> Iterator[tuple[MooncakeStore, MooncakeStore]]:
    """Two, as of two hosts."""
    pair = MooncakeStore(config(master), Counters()), MooncakeStore(config(master), Counters())
    yield pair
    for client in pair:
        client.close()


def read(store: MooncakeStore, name: str) -> bytes | None:
    out = bytearray(OBJECT_BYTES)
    return bytes(out) if store.read(name, memoryview(out)) else None


def test_what_one_host_writes_the_other_reads(clients: tuple[MooncakeStore, MooncakeStore]) -> None:
    one, two = clients
    payloads = {f"d/kv/{number}": os.urandom(OBJECT_BYTES) for number in range(8)}
    for name, payload in payloads.items():
        assert not two.contains(name)
        assert one.write(name, memoryview(payload))
        assert one.write(name, memoryview(payload))
    for name, payload in payloads.items():
        assert two.contains(name)
        assert read(two, name) == payload
    assert read(two, "d/kv/none") is None


def test_a_changed_object_is_a_miss(clients: tuple[MooncakeStore, MooncakeStore]) -> None:
    one, two = clients
    payload = os.urandom(OBJECT_BYTES)
    changed = bytes([payload[0] ^ 1]) + payload[1:]
    assert one._store.put_parts("d/kv/changed", frame_head("d/kv/changed", memoryview(payload)), changed) == 0
    before = two._counters.stats.corrupt_objects
    assert read(two, "d/kv/changed") is None
    assert two._counters.stats.corrupt_objects == before + 1


def test_no_master_is_one_clear_error() -> None:
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    with pytest.raises(LaunchError, match="nothing answers at"):
        MooncakeStore(config(free_ports(1)[0]), Counters())
