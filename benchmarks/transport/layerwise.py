"""Layer by layer against chunk by chunk, on real SGLang: how much of a long prefill's transfer is exposed.

    python -m benchmarks.transport.layerwise --json OUT [--rounds N] [--words N] [--chunk-tokens N] [--headroom X]

A tiny Kimi Linear of 16 layers (KDA and MLA, 3:1) on the CPU. Two prefill servers, one that sends layer by layer, and
one that sends after each prefill chunk, and a decode server. A first deployment without a rate limit tells how long a
prefill takes and what it sends; in a second one both prefill servers may send at that rate times the headroom, so that
the link just keeps up with prefill. Rounds alternate between the two. Exposed is what passes from the end of the last
chunk's forward pass until decode has every byte; the whole transfer is from the first byte to then. Every answer's
tokens are compared with those of a single server. `link_over_prefill` is what the link could carry during the prefills
that were measured, over what they made: below 1 it did not keep up, because the machine was slower during calibration,
and the run says nothing; give `--rate-mbps` then. Exits 1 where tokens differ or more than 15 % is exposed, 2 where the
link did not keep up.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import sglang
import torch

from sglang_prfaas.launch.demo import prompt_text
from sglang_prfaas.launch.demo_client import complete
from sglang_prfaas.launch.local_deployment import (
    MODEL_NAME,
    Choices,
    LocalCluster,
    run_deployment,
    write_deployment,
)
from sglang_prfaas.tiny_models.configs import KIMI_LINEAR
from sglang_prfaas.transport import transfer_log
from sglang_prfaas.transport.transfer_log import TransferRecord

LAYERS = 16
LIMIT = 0.15
MAX_TOKENS = 8
RECORD_DEADLINE_S = 60.0
ROUTES = {"layer-wise": "prfaas", "chunk-wise": "local"}


def deep_kimi_linear(layers: int = LAYERS, full: Sequence[int] = (4, 8, 12, 16)) -> dict[str, Any]:
    """What makes the tiny Kimi Linear `layers` deep, those in `full` (counted from 1) with full attention."""
    linear = [layer for layer in range(1, layers + 1) if layer not in full]
    attention = {**KIMI_LINEAR["linear_attn_config"], "full_attn_layers": list(full), "kda_layers": linear}
    return {"num_hidden_layers": layers, "linear_attn_config": attention}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--rounds", type=int, default=5, help="long prompts of each arm (default %(default)s)")
    parser.add_argument("--words", type=int, default=1800, help="length of a prompt (default %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=2048, help="of a prefill chunk (default %(default)s)")
    parser.add_argument(
        "--headroom", type=float, default=1.1, help="rate of the link over that of prefill (default %(default)s)"
    )
    parser.add_argument("--rate-mbps", type=float, default=0.0, help="of the link, without calibration")
    args = parser.parse_args()
    rate_mbps = args.rate_mbps or _calibrate(args) * args.headroom
    measured = _measure(args, rate_mbps)
    result = {
        "command": " ".join(sys.argv),
        "unix_time": datetime.datetime.now(datetime.UTC).isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "sglang": str(sglang.__version__),
        },
        "processors": os.cpu_count(),
        "load_average": os.getloadavg(),
        "rate_limit_mbps": rate_mbps,
        "rows": [_row(arm, records, rate_mbps) for arm, records in measured.items()],
    }
    Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    for row in result["rows"]:
        print(
            f"{row['arm']}: prefill {row['prefill_s']:.2f} s, whole transfer {row['whole_s']:.2f} s, exposed "
            f"{row['exposed_s']:.3f} s = {row['exposed_fraction']:.1%} (of {row['rounds']}: "
            f"{row['fraction_range'][0]:.1%} to {row['fraction_range'][1]:.1%}); link over prefill "
            f"{row['link_over_prefill']:.2f}"
        )
    layerwise = next(row for row in result["rows"] if row["arm"] == "layer-wise")
    if layerwise["link_over_prefill"] < 1.0:
        return 2
    return 0 if layerwise["exposed_fraction"] < LIMIT else 1


def _row(arm: str, records: list[TransferRecord], rate_mbps: float) -> dict[str, Any]:
    fractions = [record.exposed_s / whole_s(record) for record in records]
    return {
        "arm": arm,
        "rounds": len(records),
        "bytes": statistics.median(record.bytes for record in records),
        "ahead_bytes": statistics.median(record.ahead_bytes for record in records),
        "prefill_s": statistics.median(record.prefill_s for record in records),
        "whole_s": statistics.median(whole_s(record) for record in records),
        "exposed_s": statistics.median(record.exposed_s for record in records),
        "link_over_prefill": statistics.median(rate_mbps * r.prefill_s / (r.bytes * 8e-6) for r in records),
        "exposed_fraction": statistics.median(fractions),
        "fraction_range": [min(fractions), max(fractions)],
    }


def whole_s(record: TransferRecord) -> float:
    """From the first byte until decode had every one; what is exposed at least, where it began after the prefill."""
    return max(record.transfer_s, record.exposed_s)


def _calibrate(args: argparse.Namespace) -> float:
    """The rate in Mbit/s at which a long prefill makes KVCache here."""
    with (
        tempfile.TemporaryDirectory() as directory,
        run_deployment(write_deployment(Path(directory), _choices(args, 0.0))) as cluster,
    ):
        records = [_ask(cluster, args, f"calibrate {index}", "layer-wise") for index in range(3)]
    return statistics.median(record.bytes * 8e-6 / record.prefill_s for record in records)


def _measure(args: argparse.Namespace, rate_mbps: float) -> dict[str, list[TransferRecord]]:
    measured: dict[str, list[TransferRecord]] = {arm: [] for arm in ROUTES}
    with (
        tempfile.TemporaryDirectory() as directory,
        run_deployment(write_deployment(Path(directory), _choices(args, rate_mbps))) as cluster,
    ):
        for arm in ROUTES:
            _ask(cluster, args, f"warm up {arm}", arm)
        for number in range(args.rounds):
            for arm, records in measured.items():
                records.append(_ask(cluster, args, f"{arm} {number}", arm))
    return measured


def _choices(args: argparse.Namespace, rate_mbps: float) -> Choices:
    return Choices(
        family="kimi-linear",
        chunk_tokens=args.chunk_tokens,
        model_changes=deep_kimi_linear(),
        transport={
            "prfaas": {"rate_limit_mbps": rate_mbps, "layerwise": "auto"},
            "pd": {"rate_limit_mbps": rate_mbps, "layerwise": "off"},
        },
    )


def _ask(cluster: LocalCluster, args: argparse.Namespace, seed: str, arm: str) -> TransferRecord:
    """One long prompt over an arm; what its prefill server noted. Ends the program where tokens differ."""
    prompt = prompt_text(seed, args.words)
    answer = complete(cluster.router_url, MODEL_NAME, prompt, MAX_TOKENS, headers={"x-prfaas-route": ROUTES[arm]})
    expected = complete(cluster.reference_url, MODEL_NAME, prompt, MAX_TOKENS)
    if answer.status != 200 or answer.error or answer.token_ids != expected.token_ids:
        raise SystemExit(f"{arm}, {seed!r}: {answer.error or 'the tokens are not those of a single server'}")
    end_s = time.monotonic() + RECORD_DEADLINE_S
    room = int(answer.routing["room"])
    while time.monotonic() < end_s:
        for record in transfer_log.read(str(cluster.deployment.transfer_log)):
            if (record.room, record.role) == (room, "prefill"):
                return record
        time.sleep(0.05)
    raise SystemExit(f"{arm}, {seed!r}: no record of room {room} in the transfer log")


if __name__ == "__main__":
    sys.exit(main())
