"""The routers under test, as processes: ours and those peers that are installed where `--peers-python` points."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version as installed_version
from pathlib import Path

from msgspec import Struct

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Contender(Struct):
    """A running router."""

    name: str
    version: str
    port: int
    process: subprocess.Popen[bytes]

    def cpu_s(self) -> float:
        """CPU seconds of the process and its children, threads included."""
        return sum(_process_cpu_s(pid) for pid in _family(self.process.pid))


def _process_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in _family(int(child)))]


def start_ours(directory: Path, prefill_port: int, decode_port: int, port: int, *, live: bool = False) -> Contender:
    """This project's router, through its command line; `live`: with the live policy, on the paper's profile."""
    from sglang_prfaas.tiny_models.tokenizer import write_tokenizer

    model = directory / "tiny"
    model.mkdir(exist_ok=True)
    write_tokenizer(model)
    config = directory / f"router-{port}.toml"
    policy = '[policy]\nprofile = "paper"\n' if live else ""
    hardware = 'hardware = "H20"\n' if live else ""
    config.write_text(
        f'{policy}[router]\nmodel = "{model}"\nserved_model_name = "tiny"\nport = {port}\n'
        f'[[sites]]\nname = "home"\nrole = "pd"\n{hardware}'
        f'[[sites.servers]]\nname = "p"\nrole = "prefill"\nurl = "http://127.0.0.1:{prefill_port}"\n'
        f"bootstrap_port = 8998\n"
        f'[[sites.servers]]\nname = "d"\nrole = "decode"\nurl = "http://127.0.0.1:{decode_port}"\n'
    )
    command = [sys.executable, "-m", "sglang_prfaas.launch", "router", str(config)]
    name = "prfaas router, live policy" if live else "prfaas router"
    return _start(name, installed_version("sglang-prfaas"), command, port, directory)


def start_peers(python: str, directory: Path, prefill_port: int, decode_port: int, ports: list[int]) -> list[Contender]:
    """sglang-router, smg and mini_lb, where `python` has them; what does not start is reported and left out."""
    servers = ["--pd-disaggregation", "--prefill", f"http://127.0.0.1:{prefill_port}", "8998"]
    servers += ["--decode", f"http://127.0.0.1:{decode_port}", "--host", "127.0.0.1", "--policy", "random"]
    launch = [python, "-m", "sglang_router.launch_router"]
    quiet = ["--log-level", "warn", "--prometheus-port"]
    commands = {
        "sglang-router": [*launch, *servers, *quiet, str(ports[3])],
        "smg": [python, "-m", "smg", "launch", *servers, *quiet, str(ports[4])],
        "mini_lb": [*launch, *servers, "--mini-lb"],
    }
    packages = {"sglang-router": "sglang-router", "smg": "smg", "mini_lb": "sglang-router"}
    contenders = []
    for (name, command), port in zip(commands.items(), ports, strict=False):
        code = f"from importlib.metadata import version; print(version({packages[name]!r}))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        if found.returncode:
            print(f"{name}: not installed for {python}", file=sys.stderr)
            continue
        try:
            contenders.append(_start(name, found.stdout.strip(), [*command, "--port", str(port)], port, directory))
        except RuntimeError as exc:
            print(f"{name}: left out, {exc}", file=sys.stderr)
    return contenders


def _start(name: str, version: str, command: list[str], port: int, directory: Path) -> Contender:
    log = directory / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline_s = time.monotonic() + 90
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return Contender(name, version, port, process)
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    stop(process)
    raise RuntimeError(f"it did not become healthy; the end of {log}:\n{log.read_text(errors='replace')[-1500:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that this benchmark started."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
