"""LoRA adapters and the prefix store: real servers with real adapters share what the same adapter computed, whatever
path it was loaded from, and nothing else."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sglang_prfaas.tiny_models import adapter_args, make_tiny_adapter, make_tiny_model

from .driving import wait_for
from .store_server import OUTPUT_TOKENS, PAGE_TOKENS, StoreServer, prompt

pytestmark = pytest.mark.sglang

PROMPT = prompt(1, 280)
REUSABLE = (len(PROMPT) - 1) // PAGE_TOKENS * PAGE_TOKENS
ADAPTERS = (None, "red", "blue")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StoreServer]]:
    """Two servers with one store on disk. `red` is the same adapter in both, `blue` is not; all paths differ."""
    directory = tmp_path_factory.mktemp("lora-store")
    model = make_tiny_model("qwen3", directory / "model")
    made = [_server(directory, model, name, seeds) for name, seeds in (("one", (1, 2)), ("two", (1, 3)))]
    with ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(len(made)) as pool:
        contexts = [server.running(f"server{number}") for number, server in enumerate(made)]
        starting = [pool.submit(context.__enter__) for context in contexts]
        concurrent.futures.wait(starting)
        for context, start in zip(contexts, starting, strict=True):
            if start.exception() is None:
                stack.push(context.__exit__)
        yield [start.result() for start in starting]


def _server(directory: Path, model: Path, name: str, seeds: tuple[int, int]) -> StoreServer:
    files = directory / "adapters" / name
    made = {
        colour: make_tiny_adapter(files / colour, model, seed)
        for colour, seed in zip(("red", "blue"), seeds, strict=True)
    }
    return StoreServer("qwen3", directory, host_bytes=8 << 20, args=adapter_args(made))


def test_adapters_share_no_prefix_and_servers_share_each_adapters_own(servers: list[StoreServer]) -> None:
    one, two = servers
    pages = (len(PROMPT) + OUTPUT_TOKENS - 1) // PAGE_TOKENS
    computed = {}
    for count, adapter in enumerate(ADAPTERS, 1):
        computed[adapter], cached, _ = one.ask(PROMPT, lora_path=adapter)
        assert cached == 0, f"{adapter} found what another computed"
        wait_for(f"the pages of {adapter}", lambda: len(one.component("kv")) >= count * pages)  # noqa: B023
    assert len({tuple(tokens) for tokens in computed.values()}) == 3, "adapters must show, or this shows nothing"

    # On the device, and from the store: each its own.
    for adapter in ADAPTERS:
        assert one.ask(PROMPT, lora_path=adapter) == (computed[adapter], REUSABLE, 0)
    one.flush()
    for adapter in ADAPTERS:
        assert one.ask(PROMPT, lora_path=adapter) == (computed[adapter], REUSABLE, REUSABLE)

    # Another server has computed nothing yet. What the same weights computed is of use, under whatever path.
    for adapter in (None, "red"):
        assert two.ask(PROMPT, lora_path=adapter) == (computed[adapter], REUSABLE, REUSABLE)
    tokens, cached, _ = two.ask(PROMPT, lora_path="blue")
    assert cached == 0, "an adapter found what other weights of its name had computed"
    assert tokens not in computed.values()
