"""A real server whose HiCache has this project's store behind it, and what tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_prfaas.config.schema import PrefixCacheConfig, SiteLimits
from sglang_prfaas.launch.local_deployment import STARTUP_TIMEOUT_S
from sglang_prfaas.site import Supervisor
from sglang_prfaas.site.commands import plain_command
from sglang_prfaas.site.free_ports import HeldPort
from sglang_prfaas.site.hicache import hicache_flags
from sglang_prfaas.site.threaded import LoopThread
from sglang_prfaas.store.stats import StatsFile, read_stats
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

from .driving import fetch, post, wait_for

PAGE_TOKENS = 16
OUTPUT_TOKENS = 8
Answer = tuple[list[int], int, int]
"""Output tokens, cached tokens, and those of them that came from the store."""


class StoreServer:
    """One server with a prefix cache on disk, and what tests ask of it."""

    def __init__(
        self,
        family: str,
        directory: Path,
        host_bytes: int,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        **cache: Any,
    ) -> None:
        """env: further variables. args: further arguments. cache: further keys of [prefix_cache]."""
        self.family = family
        self.directory = directory
        self.args = args
        self.env = {**cpu_server_env(family), **(env or {})}
        self.config = PrefixCacheConfig(
            backend="local", host_bytes=host_bytes, disk_dir=str(directory / "store"), disk_bytes=256 << 20, **cache
        )
        self.page_tokens = PAGE_TOKENS if family in ("qwen3", "swa") else 1
        self.model = make_tiny_model(family, directory / "model")
        held = HeldPort()
        self.port = held.port
        held.release()

    @contextmanager
    def running(self, name: str) -> Iterator[StoreServer]:
        """Start the server, and stop it in the end. Every start takes the same directory."""
        args = (*cpu_server_args(self.family), *hicache_flags(self.config, "prefill", ()))
        args += (
            "--hicache-io-backend",
            "direct",
            "--hicache-mem-layout",
            "page_first_direct",
            "--hicache-ratio",
            "1.5",
        )
        args += ("--max-total-tokens", "4096", "--enable-cache-report", "--page-size", str(self.page_tokens))
        args += (*self.args,)
        command = plain_command(name, str(self.model), self.port, args=args, env=self.env)
        limits = SiteLimits(startup_timeout_s=STARTUP_TIMEOUT_S)
        loop = LoopThread()
        supervisor = Supervisor([command], limits, self.directory / "logs")
        try:
            loop.run(supervisor.start())
            yield self
        finally:
            loop.run(supervisor.stop(at_once=True))
            loop.close()

    def ask(self, tokens: list[int], **options: Any) -> Answer:
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True},
            **options,
        }
        status, _, answer = post(f"http://127.0.0.1:{self.port}/generate", body)
        assert status == 200, answer
        meta = answer["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return answer["output_ids"], meta["cached_tokens"], details.get("storage", 0)

    def flush(self) -> None:
        """Empty the device's and HiCache's own host memory; the store keeps what it has."""
        wait_for(
            "flush of an idle server", lambda: fetch(f"http://127.0.0.1:{self.port}/flush_cache?timeout=10")[0] == 200
        )

    def objects(self) -> dict[str, Path]:
        """Finished objects on disk, by name."""
        found = {}
        for path in (self.directory / "store" / "objects").rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                found[data[26 : 26 + int.from_bytes(data[8:10], "little")].decode()] = path
        return found

    def component(self, name: str) -> dict[str, Path]:
        return {key: path for key, path in self.objects().items() if key.split("/")[1] == name}

    def wait_written(self, kv_before: int, tokens: int) -> None:
        """Wait until the store has the KV of so many more tokens, which comes after their state."""
        pages = tokens // self.page_tokens
        wait_for(f"{pages} more pages in the store", lambda: len(self.component("kv")) >= kv_before + pages)

    def stats(self) -> StatsFile:
        (stats,) = read_stats(self.directory / "store" / "stats")
        return stats


def prompt(seed: int, length: int) -> list[int]:
    return [20 + (index * 7919 + seed * 104729 + index * index * seed) % 400 for index in range(length)]
