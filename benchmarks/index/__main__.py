"""The global index at full size: match latency of a 128K-token prompt, events per second, bytes per block.

    python -m benchmarks.index --json OUT [--quick] [--sites N] [--blocks-per-site N] [--rounds N]

Every site has one server that holds `--blocks-per-site` blocks: conversations of random length, each with a state
checkpoint at its end, on the device; the older half also in host memory. A long prompt is held by all sites, to a
different length each. Timed, each with its own loop:

- match: the index asked for the long prompt, its hashes known; then for a prompt that nobody holds
- hash: the block hashes of the prompt, which a router computes once per request
- events: stores and removals applied to the full index, in runs of several lengths; and the same with decoding from
  SGLang's messages, token ids in them

One process, one thread. Exits 1 where a match is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sglang_prfaas.monitor.kv_events import KvEventReader
from sglang_prfaas.prefix_cache.block_hash import BlockHashes, PromptHashes
from sglang_prfaas.prefix_cache.changes import Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier
from sglang_prfaas.prefix_cache.index import GlobalIndex
from sglang_prfaas.prefix_cache.matching import Holder, PrefixMatch

PROMPT_TOKENS = 131_072
RUNS_BLOCKS = (1, 16, 64, 256, 2048)
BLOCK_TOKENS = 64
TURN_MESSAGES = 64  # that the subscriber reads at once, where so many are there
EVENT_BLOCKS = 40_000  # changed for each length of run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--quick", action="store_true", help="50,000 blocks per site and fewer rounds")
    parser.add_argument("--sites", type=int, default=16, help="default %(default)s")
    parser.add_argument("--blocks-per-site", type=int, default=0, help="default 1,000,000, quick 50,000")
    parser.add_argument("--rounds", type=int, default=0, help="matches timed (default 300, quick 50)")
    args = parser.parse_args()

    per_site = args.blocks_per_site or (50_000 if args.quick else 1_000_000)
    rounds = args.rounds or (50 if args.quick else 300)
    rng = np.random.default_rng(5)
    holders = [Holder(f"site-{number}", "prefill-0") for number in range(args.sites)]
    index = GlobalIndex(args.sites * per_site + max(EVENT_BLOCKS, PROMPT_TOKENS))
    resident_before = resident_bytes()
    fill_s = timed(lambda: fill(index, holders, per_site, rng))
    resident = resident_bytes() - resident_before
    filled_blocks = index.blocks

    rows = [match_row(index, holders, block_tokens, rounds, rng) for block_tokens in (64, 16)]
    wrong = sum(row.pop("wrong") for row in rows)
    events = [events_row(index, holders[0], run, rng) for run in RUNS_BLOCKS]
    events.append(events_row(index, holders[0], 1, rng, turn=TURN_MESSAGES))
    memory = index.memory_bytes / filled_blocks
    result = {
        "command": " ".join([sys.executable.rpartition("/")[2], "-m", "benchmarks.index", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "msgspec": msgspec.__version__,
            "kernel": platform.release(),
        },
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "sites": args.sites,
        "blocks": filled_blocks,
        "fill_s": round(fill_s, 3),
        "table_bytes_per_block": round(memory, 2),
        "resident_bytes_per_block": round(resident / filled_blocks, 2),
        "holder_sets": index.holder_sets,
        "rounds": rounds,
        "wrong": wrong,
        "match": rows,
        "events": events,
    }
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(
        f"{filled_blocks:,} blocks of {args.sites} sites, {index.holder_sets} holder sets; table {memory:.1f} bytes "
        f"per block ({memory:.0f} MB per million), resident {resident / filled_blocks:.1f}; wrong: {wrong}; load "
        f"average {result['load_average']:.1f} on {result['cpus']} CPUs"
    )
    for row in rows:
        print(f"{PROMPT_TOKENS:,} tokens in {row['blocks']:,} blocks of {row['block_tokens']}, milliseconds:")
        for key in ("match_ms", "unknown_ms", "hash_ms"):
            print(f"{key[:-3]:>10}  " + "  ".join(f"{name} {value:.3f}" for name, value in row[key].items()))
    for event in events:
        print(
            f"events in runs of {event['run_blocks']:>4}, {event['turn']:>2} messages at once: "
            f"applied {event['applied_blocks_per_s']:>11,.0f} blocks/s, "
            f"decoded and applied {event['decoded_blocks_per_s']:>11,.0f} blocks/s; CPU us per block "
            f"{event['applied_cpu_us_per_block']:.2f}, {event['decoded_cpu_us_per_block']:.2f}"
        )
    return int(wrong > 0)


def fill(index: GlobalIndex, holders: list[Holder], per_site: int, rng: np.random.Generator) -> None:
    """Conversations of 1 to 1023 blocks until every site has its number."""
    for holder in holders:
        blocks = 0
        while blocks < per_site:
            run = hashes(rng, min(int(rng.integers(1, 1024)), per_site - blocks))
            changes = [Stored(run, Tier.DEVICE), Stored(run[-1:], Tier.DEVICE, Part.STATE)]
            index.apply(holder, [*changes, Stored(run, Tier.HOST)] if blocks < per_site // 2 else changes)
            blocks += len(run)


def match_row(
    index: GlobalIndex, holders: list[Holder], block_tokens: int, rounds: int, rng: np.random.Generator
) -> dict[str, Any]:
    """A prompt that every site holds to another length, and one that none holds."""
    tokens = rng.integers(0, 150_000, PROMPT_TOKENS)
    prompt, unknown = PromptHashes(tokens, block_tokens), PromptHashes(tokens[::-1].copy(), block_tokens)
    expected = {}
    for number, holder in enumerate(holders):
        blocks = len(prompt) - number * (len(prompt) // (2 * len(holders)))
        marks = prompt.all[127:blocks:128]
        index.apply(holder, [Stored(prompt.all[:blocks], Tier.DEVICE), Stored(marks, Tier.DEVICE, Part.STATE)])
        expected[holder] = PrefixMatch(blocks, blocks, blocks, blocks // 128 * 128)
    index.match(unknown)  # hashes what it needs, so that matching alone is timed
    return {
        "block_tokens": block_tokens,
        "blocks": len(prompt),
        "wrong": int(index.match(prompt).by_holder != expected or index.match(unknown).by_holder != {}),
        "match_ms": percentiles([timed(lambda: index.match(prompt)) for _ in range(rounds)]),
        "unknown_ms": percentiles([timed(lambda: index.match(unknown)) for _ in range(rounds)]),
        "hash_ms": percentiles(
            [timed(lambda: PromptHashes(tokens, block_tokens).all) for _ in range(max(5, rounds // 10))]
        ),
    }


def events_row(
    index: GlobalIndex, holder: Holder, run_blocks: int, rng: np.random.Generator, *, turn: int = 1
) -> dict[str, Any]:
    """Stores and removals in runs of one length. turn: messages that are there at once, as the subscriber reads them.
    With 1 every message has a store and a removal of another run, so that nothing can be joined; else it has one."""
    runs = [hashes(rng, run_blocks) for _ in range(max(4, EVENT_BLOCKS // run_blocks // 2))]
    pairs = list(zip(runs, [runs[-1], *runs[:-1]], strict=True))
    token_ids = rng.integers(0, 150_000, run_blocks * BLOCK_TOKENS).tolist()
    events = [(stored(new, token_ids), removed(old)) for new, old in pairs]
    batches = [[new, old] for new, old in events]
    if turn > 1:
        batches = [[new] for new, _ in events] + [[old] for _, old in events]
    messages = [msgspec.msgpack.encode([1.0, batch, None]) for batch in batches]

    def apply() -> None:
        for new, old in pairs:
            index.apply(holder, [Stored(new, Tier.DEVICE), Removed(old, Tier.DEVICE)])

    def decode() -> None:
        reader = KvEventReader(BLOCK_TOKENS)
        for number, message in enumerate(messages, 1):
            reader.feed(message)
            if number % turn == 0 or number == len(messages):
                index.apply(holder, reader.take())

    blocks = 2 * run_blocks * len(runs)
    row: dict[str, Any] = {"run_blocks": run_blocks, "turn": turn, "blocks": blocks}
    for key, work in (("applied", apply), ("decoded", decode)):
        rounds = [(timed(work), cpu_timed(work)) for _ in range(3)]
        row[f"{key}_blocks_per_s"] = round(blocks / statistics.median(seconds for seconds, _ in rounds))
        row[f"{key}_cpu_us_per_block"] = round(min(cpu_s for _, cpu_s in rounds) / blocks * 1e6, 3)
    index.apply(holder, [Removed(run, Tier.DEVICE) for run in runs])
    return row


def stored(run: BlockHashes, token_ids: list[int]) -> dict[str, Any]:
    """SGLang's event of new blocks."""
    return {
        "type": "BlockStored",
        "block_hashes": run.view(np.int64).tolist(),
        "parent_block_hash": None,
        "token_ids": token_ids,
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": "GPU",
    }


def removed(run: BlockHashes) -> dict[str, Any]:
    """SGLang's event of blocks that are gone."""
    return {"type": "BlockRemoved", "block_hashes": run.view(np.int64).tolist(), "medium": "GPU"}


def hashes(rng: np.random.Generator, blocks: int) -> BlockHashes:
    """Random bits, as SHA-256's are."""
    return rng.integers(0, 2**64, blocks, np.uint64)


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_timed(work: Callable[[], object]) -> float:
    """CPU seconds that one call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def percentiles(samples_s: list[float]) -> dict[str, float]:
    """Milliseconds: least, median and 99th percentile."""
    p50, p99 = np.percentile(samples_s, [50, 99])
    return {key: round(float(value) * 1e3, 4) for key, value in (("min", min(samples_s)), ("p50", p50), ("p99", p99))}


def resident_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
