"""What encoding full-attention KVCache costs, loses and gains.

    python -m benchmarks.transport.codecs --json OUT [--quick] [--rounds N] [--links 0.1,1,10]

First each codec by itself, on one thread: bytes, relative L2 and largest error, GB/s and CPU seconds per GB of both
directions. Then whole transfers between two movers in this process, over 4 connections that the kernel paces to the
rate of a link (SO_MAX_PACING_RATE), arms interleaved: seconds per request, tokens whose KVCache passes in a second, and
how many times as fast as without a codec. bfloat16, 16 layers of MLA latents (pages of 64 tokens of 512 + 64 elements):
normal values, whose channels have magnitudes of their own (log-normal, sigma 0.5). GB are 1e9 bytes of memory, not of
the wire. Every arm's pages are compared; exits 1 where an error is above its codec's limit.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import zstandard

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.codec.base import Codec
from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.memory import Bytes, HostBuffer, RankMemory
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer import State

CODECS = ("raw", "fp8", "int8", "shuffle")
LARGEST_ERROR = {"raw": 0.0, "fp8": 0.04, "int8": 0.02, "shuffle": 0.0}
LAYERS, PAGE_TOKENS, LATENT = 16, 64, 576
PAGE_BYTES = PAGE_TOKENS * LATENT * 2
CHUNK_PAGES = 14
"""As many as fit into a chunk of 1 MiB."""
SO_MAX_PACING_RATE = 47
"""Of Linux; not in Python's socket module."""
POLL_S = 0.0005


def values(pages: int, seed: int) -> Bytes:
    """`[pages, PAGE_BYTES]`."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(0.5 * torch.randn(LATENT, generator=generator))
    tokens = torch.randn(pages * PAGE_TOKENS, LATENT, generator=generator) * magnitude
    found: Bytes = tokens.to(torch.bfloat16).view(torch.uint8).numpy().reshape(pages, PAGE_BYTES)
    return found


def floats(pages: Bytes) -> torch.Tensor:
    return torch.from_numpy(pages).view(torch.bfloat16).float()


def errors(expected: Bytes, found: Bytes) -> tuple[float, float]:
    """Relative L2 error, and the largest one beside the largest magnitude."""
    truth = floats(expected)
    difference = floats(found) - truth
    return (difference.norm() / truth.norm()).item(), (difference.abs().max() / truth.abs().max()).item()


def layout() -> Layout:
    return Layout("bench", "bfloat16", PAGE_TOKENS, 1, "", (), (Component("kv", (PAGE_BYTES,) * LAYERS),))


def timed(work: Callable[[], None], rounds: int, gigabytes: float) -> dict[str, float]:
    """GB/s (median) and CPU seconds per GB of calls of `work`; the first warms up."""
    work()
    walls, cpus = [], []
    for _ in range(rounds):
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        work()
        walls.append(time.perf_counter() - wall_s)
        cpus.append(time.thread_time() - cpu_s)
    return {"gb_per_s": gigabytes / statistics.median(walls), "cpu_s_per_gb": statistics.median(cpus) / gigabytes}


def alone(name: str, pages: int, rounds: int) -> dict[str, Any]:
    """A codec by itself, in chunks as the mover cuts them."""
    codec = SessionCodec(name, layout()).of(0, 0)
    assert codec is not None, name
    raw = values(pages, 1)
    chunks = [raw[at : at + CHUNK_PAGES] for at in range(0, pages, CHUNK_PAGES)]
    payloads = [_encoded(codec, chunk) for chunk in chunks]
    out = np.empty_like(raw)

    def decode() -> None:
        for at, payload in enumerate(payloads):
            codec.decode(payload, out[at * CHUNK_PAGES : (at + 1) * CHUNK_PAGES])

    gigabytes = raw.nbytes / 1e9
    row: dict[str, Any] = {"codec": name, "ratio": raw.nbytes / sum(map(len, payloads))}
    encode_figures = timed(lambda: [_encoded(codec, chunk) for chunk in chunks] and None, rounds, gigabytes)
    row |= {f"encode_{key}": value for key, value in encode_figures.items()}
    row |= {f"decode_{key}": value for key, value in timed(decode, rounds, gigabytes).items()}
    row["relative_l2"], row["largest_error"] = errors(raw, out)
    return row


def _encoded(codec: Codec, chunk: Bytes) -> Bytes:
    payload = codec.encode(chunk)
    return chunk.reshape(-1) if payload is None else payload


class Arm:
    """Two movers with a codec between them."""

    def __init__(self, codec: Any, source: list[Bytes]) -> None:
        config = TransportConfig(codec=codec, handshake_timeout_s=60.0)
        self.codec, self.source = codec, source
        self.target = [np.zeros_like(buffer) for buffer in source]
        clock = MonotonicClock()
        self.sender = SendMover(layout(), _memory(source), config, clock, host="127.0.0.1")
        self.receiver = ReceiveMover(layout(), _memory(self.target), config, clock, site="bench")
        self.sender.start()
        self.receiver.start()
        self.session = self.receiver.session("127.0.0.1:1", "127.0.0.1", self.sender.control_port)
        _until(lambda: self.session.up or self.session.failure)
        if self.session.failure:
            raise RuntimeError(self.session.failure)

    def pace(self, bytes_per_s: float) -> None:
        """Let all connections together send so many bytes a second."""
        for sender in self.sender._table.sessions.values():
            _until(lambda sender=sender: len(sender.links) == sender.hello.connections)
            for link in sender.links.values():
                rate = int(bytes_per_s / sender.hello.connections)
                link.connection.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)

    def move(self, room: int, pages: int) -> dict[str, float]:
        """A request of so many pages."""
        slots = np.random.default_rng(room).permutation(len(self.source[0]))[:pages].astype(np.int64)
        item = self.receiver.expect(self.session, room, (slots,), 0)
        transfer = self.sender.transfer(room)
        _until(lambda: transfer.expected)
        cpu_s, began_s = time.process_time(), time.perf_counter()
        with transfer.lock:
            transfer.start(pages)
        self.sender.send(transfer, 0, 0, slots)
        self.sender.finish(transfer)
        _until(lambda: not item.transfer.live)
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        _until(lambda: not transfer.live)
        if item.transfer.state is not State.DONE:
            raise RuntimeError(item.transfer.reason)
        worst = max(errors(a[slots], b[slots])[0] for a, b in zip(self.source, self.target, strict=True))
        gigabytes = item.transfer.bytes / 1e9
        ratio = item.transfer.bytes / item.transfer.wire_bytes
        self.sender.release(transfer)
        self.receiver.release(item)
        return {"wall_s": wall_s, "cpu_s_per_gb": cpu_s / gigabytes, "ratio": ratio, "relative_l2": worst}

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()


def _memory(buffers: list[Bytes]) -> RankMemory:
    return RankMemory([[HostBuffer(b.ctypes.data, b.nbytes, PAGE_BYTES) for b in buffers]])


def _until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(POLL_S)


def over_links(links_gbps: list[float], rounds: int, pages: int) -> list[dict[str, Any]]:
    """Whole transfers. A request takes about a second of each link, and has `pages` pages of all layers at most."""
    source = [values(pages, seed) for seed in range(LAYERS)]
    arms = [Arm(codec, source) for codec in CODECS]
    rows = []
    try:
        room = 0
        for gbps in links_gbps:
            count = max(4, min(pages, round(gbps * 1e9 / 8 / (LAYERS * PAGE_BYTES))))
            samples: dict[str, list[dict[str, float]]] = {codec: [] for codec in CODECS}
            for arm in arms:
                arm.pace(gbps * 1e9 / 8)
            for round_ in range(rounds + 1):
                for arm in arms:
                    room += 1
                    sample = arm.move(room, count)
                    if round_:
                        samples[arm.codec].append(sample)
            plain_s = statistics.median(s["wall_s"] for s in samples["raw"])
            for codec, found in samples.items():
                row = {key: statistics.median(s[key] for s in found) for key in found[0]}
                rows.append(
                    {
                        "codec": codec,
                        "link_gbps": gbps,
                        "request_mb": count * LAYERS * PAGE_BYTES / 1e6,
                        "tokens_per_s": count * PAGE_TOKENS / row["wall_s"],
                        **row,
                        "wall_s_min": min(s["wall_s"] for s in found),
                        "wall_s_max": max(s["wall_s"] for s in found),
                        "times_as_fast": plain_s / row["wall_s"],
                    }
                )
    finally:
        for arm in arms:
            arm.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--quick", action="store_true", help="fewer bytes and rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every arm (default 7, quick 2)")
    parser.add_argument("--links", default="0.1,1,10", help="Gbit/s of the links (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = args.rounds or (2 if args.quick else 7)
    pages = 28 if args.quick else 112
    codecs = [alone(codec, pages, rounds) for codec in CODECS[1:]]
    links = over_links([float(text) for text in args.links.split(",")], rounds, pages)
    wrong = [row for row in (*codecs, *links) if row["relative_l2"] > LARGEST_ERROR[row["codec"]]]
    result = {
        "command": " ".join([sys.executable.rpartition("/")[2], "-m", "benchmarks.transport.codecs", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "zstandard": zstandard.__version__,
            "kernel": platform.release(),
        },
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
        "wrong": len(wrong),
        "codecs": codecs,
        "links": links,
    }
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    for row in codecs:
        print(
            f"{row['codec']:>8}: {row['ratio']:.3f} times fewer bytes, relative L2 {row['relative_l2']:.2e}, largest "
            f"error {row['largest_error']:.2e}"
        )
        for what in ("encode", "decode"):
            speed, cpu_s = row[f"{what}_gb_per_s"], row[f"{what}_cpu_s_per_gb"]
            print(f"          {what} {speed:.2f} GB/s, {cpu_s:.2f} CPU s/GB")
    for row in links:
        print(
            f"{row['link_gbps']:>5g} Gbit/s {row['codec']:>8}: {row['request_mb']:.0f} MB in {row['wall_s']:.3f} s "
            f"({row['wall_s_min']:.3f} to {row['wall_s_max']:.3f}), {row['tokens_per_s']:.0f} tokens/s, "
            f"{row['times_as_fast']:.2f} times as fast, {row['cpu_s_per_gb']:.2f} CPU s/GB"
        )
    print(f"load {result['load_average']:.1f} on {result['cpus']} cores, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
