"""`launch gateway` as a process: two sites find each other, and it ends when told to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.transport.addresses import HERE, THERE, free_pair
from tests.transport.rig import DEADLINE_S, wait_until

SITE = """
[site]
name = "{name}"
role = "{role}"
model = "owner/model"

[[servers]]
name = "p0"
role = "prefill"
port = {server}
bootstrap_port = {bootstrap}
mover_port = {mover}

{more}

[transport]
advertise_host = "{there}"

[[links]]
to_site = "{to}"
capacity_gbps = 1
dial = "prefill"
gateway = "{there}:{gateway}"
{ports}
"""
DECODE = '[[servers]]\nname = "d0"\nrole = "decode"\nport = 1'


@contextlib.contextmanager
def running(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sglang_prfaas.launch", "gateway", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("gateway is ready: ")
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_two_sites_are_joined(tmp_path: Path) -> None:
    bootstrap, server, mover, gateway = (free_pair(HERE) for _ in range(4))
    values = {"there": THERE, "gateway": gateway, "bootstrap": bootstrap, "server": server, "mover": mover}
    far, near = tmp_path / "prfaas.toml", tmp_path / "pd.toml"
    far.write_text(SITE.format(name="prfaas", role="prfaas", to="pd", more="", ports="", **values))
    ports = f"gateway_ports = [{bootstrap}]"
    near.write_text(SITE.format(name="pd", role="pd", to="prfaas", more=DECODE, ports=ports, **values))
    with socket.create_server((HERE, bootstrap)) as listener, running(near), running(far):
        answering = threading.Thread(target=_answer, args=(listener,))
        answering.start()
        wait_until(lambda: _asked(bootstrap), "an answer through the gateway")
        answering.join()


def _answer(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.sendall(b"here")


def _asked(port: int) -> bool:
    try:
        with socket.create_connection((THERE, port), DEADLINE_S) as sock:
            return sock.recv(4) == b"here"
    except ConnectionError:
        return False  # the sites have yet to find each other


def test_a_site_without_such_links(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    values = {"there": THERE, "gateway": 7, "bootstrap": 8, "server": 9, "mover": 31}
    text = SITE.format(name="prfaas", role="prfaas", to="pd", more="", ports="", **values)
    path.write_text(text.partition("[[links]]")[0])
    command = [sys.executable, "-m", "sglang_prfaas.launch", "gateway", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert 'no [[links]] with dial = "prefill"' in done.stderr
