"""`launch demo`: two datacenters on this machine, and every output token compared with that of a single server."""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.launch.demo_client import Answer, complete
from sglang_prfaas.tiny_models import FAMILIES

if TYPE_CHECKING:
    from sglang_prfaas.launch.local_deployment import LocalCluster
    from sglang_prfaas.transport.transfer_log import TransferRecord

_TEXT = """
time model cache prefill decode request token link queue page layer state router cluster memory server batch
attention window threshold bandwidth latency tensor kernel chunk prefix stream socket answer question
"""
WORDS = tuple(_TEXT.split())


class Row(Struct, frozen=True, kw_only=True):
    """One request of the demo's table. Durations in seconds; None where a figure does not exist."""

    request: str
    prompt_tokens: int
    output_tokens: int
    route: str
    prefill: str
    reason: str
    link_bytes: int
    """KVCache bytes that crossed between the sites."""
    moved_bytes: int
    """KVCache bytes from the prefill to the decode server, in either site."""
    queue_s: float | None
    prefill_s: float | None
    transfer_s: float | None
    """From the end of prefill until decode had every byte: what layer- and chunk-wise sending could not hide."""
    first_token_s: float
    reference_first_token_s: float
    equal: bool


class Case(Struct, frozen=True):
    """One request: its prompt is `words` words long; chat or plain completion."""

    name: str
    words: int
    chat: bool


CASES = (
    Case("short-1", 12, False),
    Case("short-2 chat", 40, True),
    Case("short-3", 120, False),
    Case("long-1", 500, False),
    Case("long-2 chat", 900, True),
    Case("long-3", 950, False),
)
CONCURRENT = (
    Case("burst-1 short", 30, False),
    Case("burst-2 long", 700, False),
    Case("burst-3 short chat", 60, True),
    Case("burst-4 long", 900, False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch demo`."""
    parser.description = (
        "Start a PrfaaS site (one prefill server) and a PD site (one prefill, one decode server), each from a TOML\n"
        "file, a router, and a plain single server; send short and long prompts through the router; show which path\n"
        "each took and why; compare every output token with the single server's. Needs no GPU and no download."
    )
    parser.add_argument(
        "--model", default="kimi-linear", choices=sorted(FAMILIES), help="model family (default: kimi-linear)"
    )
    parser.add_argument(
        "--threshold-tokens", type=int, default=512, metavar="N", help="the router's threshold in tokens (default: 512)"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=24, metavar="N", help="tokens generated for each request (default: 24)"
    )
    parser.add_argument(
        "--linear-attn-prefill-backend",
        choices=("triton", "prfaas"),
        help="of the prefill servers; prfaas takes prfaas_kernels for linear attention (default: what SGLang takes)",
    )
    parser.add_argument("--keep", action="store_true", help="leave everything serving and print a curl command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--directory", type=Path, default=Path(".demo"), metavar="DIR", help="models, files, logs (default: .demo)"
    )
    parser.epilog = "exit status: 0 all tokens equal, 1 something failed or differs, 2 the command line is wrong"


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    from sglang_prfaas.launch.local_deployment import Choices, run_deployment, write_deployment

    started = time.monotonic()
    backend = args.linear_attn_prefill_backend
    choices = Choices(
        family=args.model,
        threshold_tokens=args.threshold_tokens,
        prefill_args=("--linear-attn-prefill-backend", backend) if backend else (),
    )
    deployment = write_deployment(args.directory / args.model, choices)
    _say(f"model family {args.model} ({FAMILIES[args.model].attention}), files in {deployment.directory}")
    for file in (deployment.prfaas_file, deployment.pd_file, deployment.router_file):
        _say(f"configuration {file}")
    _say("starting two sites (3 SGLang servers), a router, and a single server to compare with: a minute or two")
    with run_deployment(deployment) as cluster:
        _say(f"everything is ready after {time.monotonic() - started:.0f} s, router at {cluster.router_url}")
        try:
            rows = _all_requests(cluster, args.output_tokens)
        except Exception as error:
            raise LaunchError(f"{error}\n{cluster.tails()}") from error
        if args.json is not None:
            _write_json(args.json, args.model, rows)
        _say(f"all requests answered after {time.monotonic() - started:.0f} s")
        if args.keep:
            _print_result(rows)
            _keep(cluster)
    if not args.keep:
        _print_result(rows)
    return 0 if all(row.equal for row in rows) else 1


def _print_result(rows: list[Row]) -> None:
    _print_table(rows)
    print(f"{sum(row.equal for row in rows)} of {len(rows)} equal", flush=True)


def _all_requests(cluster: LocalCluster, output_tokens: int) -> list[Row]:
    rows = []
    for case in CASES:
        rows.append(_one(cluster, case, output_tokens))
        _say(f"{rows[-1].request}: {rows[-1].route}, {rows[-1].reason}")
    _say(f"{len(CONCURRENT)} requests at once")
    with concurrent.futures.ThreadPoolExecutor(len(CONCURRENT)) as pool:
        answers = list(pool.map(lambda case: _ask(cluster.router_url, case, output_tokens), CONCURRENT))
    for case, answer in zip(CONCURRENT, answers, strict=True):
        reference = _ask(cluster.reference_url, case, output_tokens)
        rows.append(_row(cluster, case, answer, reference))
    return rows


def _one(cluster: LocalCluster, case: Case, output_tokens: int) -> Row:
    answer = _ask(cluster.router_url, case, output_tokens)
    return _row(cluster, case, answer, _ask(cluster.reference_url, case, output_tokens))


def _ask(url: str, case: Case, output_tokens: int) -> Answer:
    from sglang_prfaas.launch.local_deployment import MODEL_NAME

    text = prompt_text(case.name, case.words)
    prompt: str | list[dict[str, str]] = [{"role": "user", "content": text}] if case.chat else text
    answer = complete(url, MODEL_NAME, prompt, output_tokens)
    if answer.status != 200 or answer.error:
        raise LaunchError(f"request {case.name} to {url} failed with status {answer.status}: {answer.error}")
    return answer


def prompt_text(name: str, words: int) -> str:
    """`words` words, the same for the same name, another text for another: no two requests share a prefix."""
    source = random.Random(name)
    return " ".join(source.choice(WORDS) for _ in range(words))


def _row(cluster: LocalCluster, case: Case, answer: Answer, reference: Answer) -> Row:
    sent, received = _records(cluster, int(answer.routing["room"]))
    remote = answer.routing["route"] == "prfaas"
    moved = received.bytes if received else 0
    return Row(
        request=case.name,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=len(answer.token_ids),
        route=answer.routing["route"],
        prefill=answer.routing["prefill"],
        reason=answer.routing["reason"],
        link_bytes=moved if remote else 0,
        moved_bytes=moved,
        queue_s=sent.queue_s if sent else None,
        prefill_s=sent.prefill_s if sent else None,
        transfer_s=sent.exposed_s if sent else None,
        first_token_s=answer.first_token_s,
        reference_first_token_s=reference.first_token_s,
        equal=bool(answer.token_ids) and answer.token_ids == reference.token_ids,
    )


def _records(cluster: LocalCluster, room: int) -> tuple[TransferRecord | None, TransferRecord | None]:
    """What the prefill and the decode server noted of a room; prefill's may come a moment after the answer."""
    from sglang_prfaas.transport import transfer_log

    deadline = time.monotonic() + 30.0
    while True:
        records = [r for r in transfer_log.read(str(cluster.deployment.transfer_log)) if r.room == room]
        sent = next((r for r in records if r.role == "prefill"), None)
        received = next((r for r in records if r.role == "decode"), None)
        if (sent and received) or time.monotonic() > deadline:
            return sent, received
        time.sleep(0.02)


def _print_table(rows: list[Row]) -> None:
    head = ("request", "tokens", "out", "route", "prefill", "over link", "queue", "prefill", "transfer", "first token")
    lines = [(*head, "equal", "reason")]
    for row in rows:
        lines.append(
            (
                row.request,
                str(row.prompt_tokens),
                str(row.output_tokens),
                row.route,
                row.prefill,
                _bytes(row.link_bytes),
                _ms(row.queue_s),
                _ms(row.prefill_s),
                _ms(row.transfer_s),
                _ms(row.first_token_s),
                "yes" if row.equal else "NO",
                row.reason,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print()
    for index, line in enumerate(lines):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))
    print(flush=True)


def _bytes(count: int) -> str:
    return "-" if not count else f"{count / 1024:.0f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MiB"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _write_json(path: Path, family: str, rows: list[Row]) -> None:
    report = {"model": family, "equal": sum(row.equal for row in rows), "requests": len(rows), "rows": rows}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    _say(f"table written to {path}")


def _keep(cluster: LocalCluster) -> None:
    from sglang_prfaas.launch.local_deployment import MODEL_NAME

    body = f'{{"model": "{MODEL_NAME}", "prompt": "{prompt_text("curl", 600)[:3000]}", "max_tokens": 16}}'
    command = f"curl -i {cluster.router_url}/v1/completions -H 'content-type: application/json' -d {shlex.quote(body)}"
    print(f"everything keeps serving; try:\n\n  {command}\n\nCtrl-C or SIGTERM stops it", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    _say("stopping")


def _say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)
