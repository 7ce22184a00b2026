"""What SGLang says of a server's load, in its three forms, as plain figures. Pure functions over bytes.

- `LoadStat`, MessagePack on a ZeroMQ PUB socket (`--load-publish-endpoint`), one for each data-parallel rank: at once
  when something changes, without the queues of disaggregation.
- `GET /v1/loads`, JSON: everything, read from the shared memory into which the scheduler writes every few steps.
- `GET /metrics`, Prometheus (`--enable-metrics`): the gauges, renewed every few seconds; no counters of busy time.

Source: SGLang 0.5.23, managers/scheduler_components/load_publisher.py and load_inquirer.py, managers/load_snapshot.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.errors import ProtocolError

LOAD_TOPIC = b"load"


class Figures(Struct, frozen=True, kw_only=True):
    """The load of one rank, or of several added up. Requests, tokens, seconds; counters grow from the server's start.

    waiting: that wait to be computed. written_s: the server's wall clock, 0 where it does not tell.
    None: this form does not tell.
    """

    role: str = ""
    ranks: int = 1
    running: int
    waiting: int
    prealloc: int | None = None
    transferring: int | None = None
    waiting_uncached_tokens: int | None = None
    kv_tokens_used: int
    kv_tokens_total: int
    prefill_tokens: int | None = None
    prefill_busy_s: float | None = None
    decode_tokens: float | None = None
    decode_steps: float | None = None
    decode_busy_s: float | None = None
    generated_tokens_per_s: float = 0.0
    written_s: float = 0.0


# --- LoadStat ---------------------------------------------------------------------------------------------------------


class _LoadStat(Struct, array_like=True, tag="LoadStat"):
    num_running_reqs: int
    num_waiting_reqs: int
    num_tokens: int
    max_total_num_tokens: int
    attn_dp_rank: int | None = None
    num_waiting_uncached_tokens: int = 0
    num_total_tokens: int = 0
    max_running_requests: int = 0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0


_stat_decoder = msgspec.msgpack.Decoder(_LoadStat)


def parse_load_stat(frames: list[bytes]) -> tuple[int, Figures]:
    """Sequence number and figures of one message: topic, number (8 bytes), LoadStat. `waiting` counts all queues here,
    those of disaggregation too. Raises ProtocolError."""
    if len(frames) != 3 or frames[0] != LOAD_TOPIC or len(frames[1]) != 8:
        raise ProtocolError(f"LoadStat: {len(frames)} frames, expected topic, sequence number and payload")
    try:
        stat = _stat_decoder.decode(frames[2])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"LoadStat: a message that is none of SGLang's: {error}") from None
    return int.from_bytes(frames[1], "big"), Figures(
        running=stat.num_running_reqs,
        waiting=stat.num_waiting_reqs,
        waiting_uncached_tokens=stat.num_waiting_uncached_tokens,
        kv_tokens_used=stat.num_tokens,
        kv_tokens_total=stat.max_total_num_tokens,
        prefill_tokens=stat.total_prefill_uncached_tokens,
        prefill_busy_s=stat.total_prefill_busy_us * 1e-6,
    )


# --- /v1/loads --------------------------------------------------------------------------------------------------------


class _Disaggregation(Struct):
    mode: str = ""
    prefill_bootstrap_queue_reqs: int = 0
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0
    decode_retracted_queue_reqs: int = 0


class _Queues(Struct):
    waiting: int = 0
    grammar: int = 0


class _Load(Struct):
    timestamp: float = 0.0
    num_running_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    num_used_tokens: int = 0
    max_total_num_tokens: int = 0
    gen_throughput: float = 0.0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0
    decode_moments: list[float] | None = None
    disaggregation: _Disaggregation | None = None
    queues: _Queues | None = None


class _Loads(Struct):
    loads: list[_Load]


_loads_decoder = msgspec.json.Decoder(_Loads)


def parse_loads(body: bytes) -> Figures:
    """The sum over the ranks in an answer of `GET /v1/loads`. Raises ProtocolError, also where no rank has reported."""
    try:
        loads = _loads_decoder.decode(body).loads
    except msgspec.DecodeError as error:
        raise ProtocolError(f"/v1/loads: an answer that is none of SGLang's: {error}") from None
    if not loads:
        raise ProtocolError("/v1/loads: no rank has reported yet")
    return add(_figures(load) for load in loads)


def _figures(load: _Load) -> Figures:
    queues = load.queues or _Queues()
    stages = load.disaggregation or _Disaggregation()
    role = stages.mode if stages.mode in ("prefill", "decode") else ""
    moments = load.decode_moments if load.decode_moments and len(load.decode_moments) >= 6 else [0.0] * 6
    return Figures(
        role=role,
        running=load.num_running_reqs,
        waiting=queues.waiting + queues.grammar + stages.decode_retracted_queue_reqs,
        prealloc=stages.decode_prealloc_queue_reqs if role == "decode" else stages.prefill_bootstrap_queue_reqs,
        transferring=stages.decode_transfer_queue_reqs if role == "decode" else stages.prefill_inflight_queue_reqs,
        waiting_uncached_tokens=load.num_waiting_uncached_tokens,
        kv_tokens_used=load.num_used_tokens,
        kv_tokens_total=load.max_total_num_tokens,
        prefill_tokens=load.total_prefill_uncached_tokens,
        prefill_busy_s=load.total_prefill_busy_us * 1e-6,
        decode_steps=moments[0],
        decode_busy_s=moments[2] * 1e-6,
        decode_tokens=moments[5],
        generated_tokens_per_s=load.gen_throughput,
        written_s=load.timestamp,
    )


# --- /metrics ---------------------------------------------------------------------------------------------------------

_GAUGES = {
    f"sglang:{name}"
    for name in (
        "num_running_reqs",
        "num_queue_reqs",
        "num_grammar_queue_reqs",
        "num_used_tokens",
        "max_total_num_tokens",
        "gen_throughput",
        "num_prefill_bootstrap_queue_reqs",
        "num_prefill_inflight_queue_reqs",
        "num_decode_prealloc_queue_reqs",
        "num_decode_transfer_queue_reqs",
    )
}


def parse_metrics(text: bytes) -> Figures:
    """The gauges in an answer of `GET /metrics`, added up over data-parallel ranks; of a tensor-parallel group, rank 0
    counts. Raises ProtocolError where they are missing."""
    sums: dict[str, float] = {}
    for line in text.decode(errors="replace").splitlines():
        name, brace, rest = line.partition("{")
        if name not in _GAUGES or not brace:
            continue
        labels, _, value = rest.rpartition("}")
        if 'tp_rank="' in labels and 'tp_rank="0"' not in labels:
            continue
        try:
            sums[name.removeprefix("sglang:")] = sums.get(name.removeprefix("sglang:"), 0.0) + float(value)
        except ValueError:
            raise ProtocolError(f"/metrics: a line that is no sample: {line[:100]!r}") from None
    if "num_running_reqs" not in sums:
        raise ProtocolError("/metrics: no sglang:num_running_reqs; start the server with --enable-metrics")

    def count(*names: str) -> int:
        return sum(round(sums.get(name, 0.0)) for name in names)

    return Figures(
        running=count("num_running_reqs"),
        waiting=count("num_queue_reqs", "num_grammar_queue_reqs"),
        prealloc=count("num_prefill_bootstrap_queue_reqs", "num_decode_prealloc_queue_reqs"),
        transferring=count("num_prefill_inflight_queue_reqs", "num_decode_transfer_queue_reqs"),
        kv_tokens_used=count("num_used_tokens"),
        kv_tokens_total=count("max_total_num_tokens"),
        generated_tokens_per_s=max(0.0, sums.get("gen_throughput", 0.0)),
    )


def add(ranks: Iterable[Figures]) -> Figures:
    """Figures of several data-parallel ranks together. The oldest counts for the time; busy times add up, so that rates
    per busy second are those of one rank. Raises ValueError for none."""
    figures = list(ranks)
    if not figures:
        raise ValueError("no figures to add")
    if len(figures) == 1:
        return figures[0]
    summed = {
        field: _sum([getattr(one, field) for one in figures])
        for field in Figures.__struct_fields__
        if field not in ("role", "written_s")
    }
    return Figures(role=figures[0].role, written_s=min(one.written_s for one in figures), **summed)


def _sum(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
