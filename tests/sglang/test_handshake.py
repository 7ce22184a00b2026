"""A decode server that serves something else is refused at the handshake, with both values, on both sides."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.launch.local_deployment import STARTUP_TIMEOUT_S
from sglang_prfaas.site import ServerCommand, Supervisor
from sglang_prfaas.site.free_ports import HeldPort
from sglang_prfaas.site.threaded import LoopThread
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

from .driving import PRFAAS, REMOTE, Driver, post, words

pytestmark = pytest.mark.sglang


@pytest.fixture
def stranger(cluster: Driver, tmp_path: Path) -> Iterator[str]:
    """URL of a decode server of another model, started by hand: no launcher, only the backend's name and the keys."""
    held = HeldPort()
    held.release()
    model = make_tiny_model("qwen3", tmp_path / "model")
    argv = (sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(held.port))
    argv += ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "prfaas")
    argv += tuple(cpu_server_args("qwen3"))
    variables = {
        **cpu_server_env("qwen3"),
        "PRFAAS_KEYS_DIR": str(cluster.cluster.deployment.directory / "keys" / "pd"),
    }
    command = ServerCommand("stranger", argv, variables, "decode", "127.0.0.1", held.port, needs_nccl_port=True)
    supervisor = Supervisor([command], SiteLimits(startup_timeout_s=STARTUP_TIMEOUT_S), tmp_path)
    thread = LoopThread()
    try:
        thread.run(supervisor.start())
        yield f"http://127.0.0.1:{held.port}"
    finally:
        thread.run(supervisor.stop(at_once=True))
        thread.close()


def test_another_model_is_refused_with_both_values(cluster: Driver, stranger: str) -> None:
    body = {
        "text": words("mismatch", 40),
        "sampling_params": {"temperature": 0, "max_new_tokens": 4},
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": cluster.cluster.sites[PRFAAS].server(REMOTE).command.bootstrap_port,
        "bootstrap_room": 20261121,
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        legs = [pool.submit(post, f"{url}/generate", body) for url in (cluster.url(REMOTE), stranger)]
    for status, _, answer in (leg.result() for leg in legs):
        assert status == 500, answer
        message = str(answer)
        assert "layout mismatch" in message
        assert "model: prefill has KimiLinearForCausalLM-" in message
        assert "decode has Qwen3ForCausalLM-" in message
    prompt = words("after the stranger", 300)
    cluster.assert_equal(cluster.ask(prompt), prompt)
