"""Encoded KVCache between real servers: one prefill server, and a decode site for every codec, which the [[links]] of
the prefill server's site say. The same prompts go to all of them.

The models are trained on a language whose answers stand in the prompt (`trained_models`), so that they have a right
answer, margins, and nothing but the KVCache to answer from: `test_answers_come_from_the_kvcache` takes it away. Random
weights make many tokens almost as likely as the best, and say little of a codec.

PRFAAS_CODEC_KV_DTYPE: KVCache dtype of the servers (default bfloat16, the tiny models' own is float32).
PRFAAS_CODEC_WEIGHTS: `trained` (default) or `random`, which is measured and printed, and has no least share."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sglang_prfaas import env
from sglang_prfaas.config.schema import (
    LinkConfig,
    ServerConfig,
    SiteConfig,
    SiteLimits,
    SiteSection,
    TransportConfig,
)
from sglang_prfaas.launch.local_deployment import HEARTBEAT_TIMEOUT_S, STARTUP_TIMEOUT_S
from sglang_prfaas.site import Site, running
from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.site.threaded import RunningSite
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model
from sglang_prfaas.transport import transfer_log
from sglang_prfaas.transport.transfer_log import TransferRecord

from . import losing_plugin
from .driving import post, wait_for
from .trained_models.language import FIRST_TOKEN, LAST_TOKEN, prompt

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1200)]

KV_DTYPE = os.environ.get("PRFAAS_CODEC_KV_DTYPE", "bfloat16")
TRAINED = os.environ.get("PRFAAS_CODEC_WEIGHTS", "trained") == "trained"
PREFILL = "prefill"
PROMPTS, TEXT_TOKENS, NEW_TOKENS = 100, (20, 200), 16
ROOT = Path(__file__).parents[2]


class Case(NamedTuple):
    """A model, the site whose answers the others' are compared with, which loses nothing, and the codecs."""

    family: str
    exact: str
    codecs: tuple[str, ...]


CASES = [Case("kimi-linear", "raw", ("fp8", "int8")), Case("qwen3", "shuffle", ("fp8", "int8"))]
UNCHANGED = 0.95
"""Least share of prompts whose tokens after the first, which is the prefill server's, are all the same."""
RIGHT = 0.9
"""Least share of prompts that the models answer right, all tokens of it, where nothing is lost."""
LOST = 0.05
"""Largest share of prompts with the same tokens once the full-attention KVCache is lost."""
RATIO = {"fp8": 1.8, "int8": 1.8, "shuffle": 1.05, "raw": 1.0}


class Sites:
    """A prefill server, and a decode server in the site of each codec; that of the last loses what comes while the
    file `lost` exists."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        self.log = directory / "transfers.jsonl"
        self.lost = directory / "lost"
        family, names = case.family, (case.exact, *case.codecs)
        model = _trained(family, directory / "model") if TRAINED else make_tiny_model(family, directory / "model")
        weights = ["--load-format", "auto"] if TRAINED else []
        ports = free_ports(len(names) + 2)
        self.bootstrap_port = ports.pop()
        self.rooms = itertools.count(1)

        def site(name: str, role: Any, server: ServerConfig, links: list[LinkConfig]) -> SiteConfig:
            return SiteConfig(
                site=SiteSection(
                    name=name,
                    role=role,
                    model=str(model),
                    args=[*cpu_server_args(family), *weights, "--kv-cache-dtype", KV_DTYPE],
                    env={**cpu_server_env(family), env.TRANSFER_LOG: str(self.log)},
                    log_dir=str(directory / "logs"),
                ),
                servers=[server],
                links=links,
                transport=TransportConfig(heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S),
                limits=SiteLimits(startup_timeout_s=STARTUP_TIMEOUT_S),
            )

        links = [LinkConfig(to_site=name, capacity_gbps=1, codec=name) for name in names]  # type: ignore[arg-type]
        prefill = ServerConfig(name=PREFILL, role="prefill", port=ports.pop(), bootstrap_port=self.bootstrap_port)
        self.configs = [site(PREFILL, "prfaas", prefill, links)]
        for name in names:
            extra = losing_plugin.environment(directory / "plugin", self.lost) if name == names[-1] else {}
            decode = ServerConfig(name=f"decode-{name}", role="decode", port=ports.pop(), env=extra)
            self.configs.append(site(name, "pd", decode, [LinkConfig(to_site=PREFILL, capacity_gbps=1)]))
        self.running: dict[str, RunningSite] = {}

    def generate(self, name: str, prompts: list[list[int]]) -> tuple[list[list[int]], list[TransferRecord]]:
        """Tokens that a site's decode server gives to each prompt, and what it noted of their transfers."""
        rooms = [next(self.rooms) for _ in prompts]
        body = {
            "input_ids": prompts,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
            "bootstrap_host": ["127.0.0.1"] * len(prompts),
            "bootstrap_port": [self.bootstrap_port] * len(prompts),
            "bootstrap_room": rooms,
        }
        servers = [self.running[PREFILL].url(PREFILL), self.running[name].url(f"decode-{name}")]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda url: post(f"{url}/generate", body), servers))
        for status, _, answer in answers:
            assert status == 200, answer

        def noted() -> list[TransferRecord] | None:
            records = [r for r in transfer_log.read(str(self.log)) if r.role == "decode" and r.room in set(rooms)]
            return records if len(records) == len(rooms) else None

        return [one["output_ids"] for one in answers[1][2]], wait_for("the transfer log", noted)


def _trained(family: str, directory: Path) -> Path:
    """A model trained in a process of its own, whose threads and modules are not those of the tests."""
    command = [sys.executable, "-m", "tests.sglang.trained_models", family, str(directory)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return directory


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.family)
def sites(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    found = Sites(request.param, tmp_path_factory.mktemp(request.param.family))
    with running(*(Site(config) for config in found.configs)) as started:
        found.running = dict(started)
        yield found


def kv_wire_bytes(record: TransferRecord) -> int:
    """What full-attention KVCache took on the wire; everything else is sent as it is."""
    return record.kv_bytes - (record.bytes - record.wire_bytes)


def decisions(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """Of the tokens that both chose after the same ones, how many are the same, and how many there are."""
    same = total = 0
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            total += 1
            same += a == b
            if a != b:
                break
    return same, total


def asked(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and their right answers; none of random weights."""
    source = random.Random(11)
    if TRAINED:
        found = [prompt(source, source.randint(*TEXT_TOKENS), NEW_TOKENS) for _ in range(count)]
        return [one for one, _ in found], [answer for _, answer in found]
    return [
        [source.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(source.randint(*TEXT_TOKENS))] for _ in range(count)
    ], []


def share_unchanged(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Of the prompts, those whose tokens after the first are all the same."""
    return sum(a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True)) / len(ours)


def test_tokens_and_bytes(sites: Sites) -> None:
    prompts, answers = asked(PROMPTS)
    expected, _ = sites.generate(sites.case.exact, prompts)
    assert all(len(tokens) == NEW_TOKENS for tokens in expected)
    wrong = []
    if answers:
        right = sum(a == b for a, b in zip(expected, answers, strict=True)) / PROMPTS
        print(f"{sites.case.family} {sites.case.exact}: {right:.1%} of the answers are right")
        assert right >= RIGHT
    for codec in (sites.case.exact, *sites.case.codecs):
        tokens, records = sites.generate(codec, prompts)
        assert {record.codec for record in records} == {codec}
        ratio = sum(r.kv_bytes for r in records) / sum(map(kv_wire_bytes, records))
        unchanged = share_unchanged(tokens, expected)
        first = sum(a[1] == b[1] for a, b in zip(tokens, expected, strict=True)) / PROMPTS
        same, total = decisions([one[1:] for one in tokens], [one[1:] for one in expected])
        print(
            f"{sites.case.family} {codec}: {ratio:.3f} times fewer bytes; unchanged: all {NEW_TOKENS - 1} tokens of "
            f"{unchanged:.1%} of the prompts, the first of {first:.1%}, {same} of {total} tokens after equal ones "
            f"({same / total:.1%})"
        )
        if ratio < RATIO[codec] or (TRAINED and unchanged < UNCHANGED):
            wrong.append((codec, ratio, unchanged))
    assert not wrong


@pytest.mark.skipif(not TRAINED, reason="random weights have no right answers")
def test_answers_come_from_the_kvcache(sites: Sites) -> None:
    prompts, _ = asked(40)
    codec = sites.case.codecs[-1]
    kept, _ = sites.generate(codec, prompts)
    sites.lost.touch()
    try:
        lost, _ = sites.generate(codec, prompts)
    finally:
        sites.lost.unlink()
    again, _ = sites.generate(codec, prompts)
    assert [tokens[0] for tokens in lost] == [tokens[0] for tokens in kept]  # the prefill server's
    print(f"{sites.case.family}: without KVCache {share_unchanged(lost, kept):.1%} of the prompts have the same tokens")
    assert share_unchanged(lost, kept) <= LOST
    assert share_unchanged(again, kept) >= UNCHANGED
