"""Requests over time: Poisson arrivals over a length distribution, and traces in the Mooncake format.

A trace is a file of JSON lines with `timestamp` (ms), `input_length` and `output_length` (tokens), and `hash_ids`, the
chained hashes of the prompt's blocks of 512 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.lengths import LengthDistribution

BLOCK_TOKENS = 512


class Arrival(Struct, frozen=True):
    """One request. `blocks`: chained hashes of its whole prompt blocks, empty where nothing is shared."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class _TraceLine(Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def poisson(
    lengths: LengthDistribution, *, rate: float, output_tokens: int, duration_s: float, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals at `rate` requests a second over `duration_s`; lengths independent of each other."""
    if not (rate > 0 and duration_s > 0):
        raise ConfigError(f"rate {rate} and duration {duration_s} s must be positive")
    random = np.random.default_rng(seed)
    count = int(random.poisson(rate * duration_s))
    times = np.sort(random.uniform(0.0, duration_s, count))
    inputs = lengths.quantiles(random.uniform(0.0, 1.0, count))
    return [
        Arrival(float(at_s), max(1, round(float(tokens))), output_tokens)
        for at_s, tokens in zip(times, inputs, strict=True)
    ]


def load_trace(path: str | Path) -> list[Arrival]:
    """A Mooncake trace, times from 0. Raises ConfigError with the line that is wrong."""
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    decoder = msgspec.json.Decoder(_TraceLine)
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ConfigError(f"{path}: holds no request")
    found.sort(key=lambda entry: entry.timestamp)
    start = found[0].timestamp
    return [
        Arrival(
            (entry.timestamp - start) / 1e3,
            max(1, entry.input_length),
            max(1, entry.output_length),
            entry.hash_ids[: entry.input_length // BLOCK_TOKENS],
        )
        for entry in found
    ]


def spread(arrivals: Iterable[Arrival], window_s: float, seed: int = 0) -> list[Arrival]:
    """The same requests, each moved forward by a random part of `window_s`.

    The Mooncake trace has its times rounded down to 3 s: without this, a dozen requests arrive in the same instant.
    """
    random = np.random.default_rng(seed)
    moved = [msgspec.structs.replace(entry, at_s=entry.at_s + float(random.uniform(0, window_s))) for entry in arrivals]
    return sorted(moved, key=lambda entry: entry.at_s)


def time_scaled(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """The same requests at `factor` times the rate."""
    if factor <= 0:
        raise ConfigError(f"time scale must be positive, got {factor}")
    return [msgspec.structs.replace(entry, at_s=entry.at_s / factor) for entry in arrivals]


def overlaid(arrivals: list[Arrival], copies: int) -> list[Arrival]:
    """So many copies of the same requests at once, each shifted by its part of the duration and with prompts of its
    own: as many times the rate, over the same time."""
    span_s = arrivals[-1].at_s + 1e-6
    found = [
        msgspec.structs.replace(
            entry,
            at_s=(entry.at_s + copy * span_s / copies) % span_s,
            blocks=tuple(copy + copies * block for block in entry.blocks),
        )
        for copy in range(copies)
        for entry in arrivals
    ]
    return sorted(found, key=lambda entry: entry.at_s)


def with_burst(arrivals: list[Arrival], *, start_s: float, end_s: float, factor: int, seed: int = 0) -> list[Arrival]:
    """`factor` times as many requests between two times: copies at random moments of the window, with prompts of their
    own, so that they hit no cache that the originals do not.
    """
    random = np.random.default_rng(seed)
    inside = [entry for entry in arrivals if start_s <= entry.at_s < end_s]
    copies = [
        msgspec.structs.replace(
            entry,
            at_s=float(random.uniform(start_s, end_s)),
            blocks=tuple(-1 - copy - factor * block for block in entry.blocks),
        )
        for copy in range(factor - 1)
        for entry in inside
    ]
    return sorted([*arrivals, *copies], key=lambda entry: entry.at_s)
