"""The CPU platform in the installed SGLang: its hook table, and one real server."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

pytestmark = pytest.mark.sglang

READY_S, ANSWER_S = 400, 300
FAMILY = "kimi-linear"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **cpu_server_env(FAMILY)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=READY_S, check=False
    )


def test_every_hook_fits_the_installed_sglang() -> None:
    result = _python(
        "import sglang.srt.model_executor.model_runner\n"
        "from sglang_prfaas.sglang_plugin.cpu_platform import hooks\n"
        "hooks.register_mla_for_torch_native()\n"
        "hooks.verify_hooks()\n"
        "print('hooks in place:', len(hooks.HOOKS))"
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "hooks in place:" in result.stdout


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("hooks.OPS + '.attention.fla.kda:no_such_kernel'", "has no no_such_kernel"),
        ("'sglang.srt.no_such_module:anything'", "cannot import sglang.srt.no_such_module"),
    ],
)
def test_a_hook_that_does_not_apply_stops_the_server(hook: str, message: str) -> None:
    result = _python(
        "from sglang_prfaas.sglang_plugin.cpu_platform import hooks\n"
        f"hooks.HOOKS += (hooks.Hook({hook}, print, 'test'),)\n"
        "import sglang.srt.model_executor.model_runner\n"
        "print('went on')"
    )
    assert result.returncode != 0
    assert message in result.stderr
    assert "went on" not in result.stdout


@contextlib.contextmanager
def running_server(model: Path, log: Path, *extra: str) -> Iterator[str]:
    """A server of ``FAMILY`` on loopback; its address once it is ready, its log in the failure if it is not."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", "127.0.0.1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *cpu_server_args(FAMILY), *extra],
            env={**os.environ, **cpu_server_env(FAMILY)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, address, log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(address + "/health", timeout=5),
        ):
            return
        time.sleep(0.5)
    pytest.fail(f"server not ready after {READY_S} s:\n{log.read_text()[-4000:]}")


def _generate(address: str, tokens: list[int], count: int) -> tuple[list[int], list[float], int]:
    """Greedy tokens, their logprobs, and how many prompt tokens came from the cache."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
        "return_logprob": True,
    }
    request = urllib.request.Request(
        address + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
        meta: dict[str, Any] = json.load(response)["meta_info"]
    entries = meta["output_token_logprobs"]
    return [entry[1] for entry in entries], [entry[0] for entry in entries], meta["cached_tokens"]


def _prompt(length: int, seed: int) -> list[int]:
    return [6 + (seed * 7919 + n * n * 31 + n * 17) % 500 for n in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(FAMILY, tmp_path_factory.mktemp("models") / FAMILY)


def test_answers_depend_on_the_prefix_and_not_on_chunks_or_server(model: Path, tmp_path: Path) -> None:
    lengths = (1, 15, 65, 700, 4000)
    with running_server(model, tmp_path / "whole.log") as address:
        whole = {length: _generate(address, _prompt(length, length), 16) for length in lengths}
        changed = _prompt(1700, 1)
        before = _generate(address, changed, 8)
        changed[100] = 6 + (changed[100] + 100) % 500
        after = _generate(address, changed, 8)
        longer = _generate(address, _prompt(1700, 1) + before[0][:4], 4)
    for tokens, logprobs, _ in [*whole.values(), before, after]:
        assert all(math.isfinite(logprob) for logprob in logprobs)
        assert len(set(tokens)) > 1
    assert max(abs(a - b) for a, b in zip(before[1], after[1], strict=True)) > 1e-3
    assert longer[0] == before[0][4:]
    assert longer[2] >= 1600, "an extended prompt must hit the radix cache, recurrent state included"

    with running_server(model, tmp_path / "chunked.log", "--chunked-prefill-size", "512") as address:
        for length in lengths:
            tokens, logprobs, _ = _generate(address, _prompt(length, length), 16)
            assert tokens == whole[length][0]
            assert logprobs == pytest.approx(whole[length][1], abs=1e-3)
