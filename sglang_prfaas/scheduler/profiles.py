"""Profiles: what one instance can do, as measured curves, and the file they are kept in.

A profile file is TOML or JSON of the shape of `ProfileFile`; unknown keys are refused with their path.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.curves import Curve


class MeasuredPoint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One figure as it was measured, before a curve was drawn through it. Nothing is computed from it."""

    x: float
    """Tokens of a prefill, or streams in a decode batch."""
    median_s: float
    spread_s: float
    """Longest less shortest of the repeats kept."""
    repeats: int
    """Repeats kept."""
    outliers: int = 0
    """Repeats left out, for being far from the others."""
    context_tokens: int = 0
    """Decode: prompt tokens of each stream."""


class PrefillProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """T_prefill(l): seconds over tokens, of one instance."""

    time_s: Curve
    gpus: int
    """P, GPUs of one instance."""
    origin: str
    """Where the points come from: measured on what, or derived how."""
    points: tuple[MeasuredPoint, ...] = ()


class DecodeProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one decode step over the batch, of one instance."""

    step_s: Curve
    gpus: int
    origin: str
    points: tuple[MeasuredPoint, ...] = ()
    """Of every context length that was measured; the curve is that of the longest."""

    def batch_max(self, slo_tokens_per_s: float) -> int:
        """BS_max: the largest batch, within what was measured, whose step still meets the SLO. Raises ConfigError."""
        batches = np.arange(1, int(self.step_s.x[-1]) + 1, dtype=np.float64)
        fits = batches[self.step_s.over(batches) <= (1 + 1e-9) / slo_tokens_per_s]
        if not len(fits):
            raise ConfigError(
                f"decode: no batch meets {slo_tokens_per_s} tokens/s; the shortest step is {min(self.step_s.y)} s"
            )
        return int(fits[-1])

    def requests_per_s(self, slo_tokens_per_s: float, output_tokens: float) -> float:
        """Theta_pd-d of one instance: BS_max / (T_decode * L_out), PrfaaS eq. 5."""
        batch = self.batch_max(slo_tokens_per_s)
        return batch / (self.step_s.at(batch) * output_tokens)


class KvPoint(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KVCache bytes of one request, as moved and as the model's config.json says (0 where it says nothing)."""

    tokens: int
    moved_bytes: float
    config_bytes: float


class LinkProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What transfers got between two sites, one or several at a time. More at once may carry more."""

    from_site: str
    to_site: str
    gbps: float
    """Of the lengths that were moved, the highest median rate while something moved."""
    rtt_ms: float
    """Shortest TCP connect from where it was measured to the sending site; 0: not measured."""
    tokens: int
    """Length of the prompts that had this rate."""
    transfers: int
    """All that were measured."""
    at_once: int = 1
    """How many of them together had this rate."""


class Measurement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a profile came about. Nothing is computed from it."""

    date: str
    """ISO 8601, UTC."""
    command: str
    version: str
    """Of this package."""
    servers: dict[str, str]
    """Site/server, and what it said of itself: role, SGLang version, GPUs."""
    seconds: float
    kv: tuple[KvPoint, ...] = ()
    kv_origin: str = ""
    links: tuple[LinkProfile, ...] = ()
    notes: tuple[str, ...] = ()
    """What was cut short, left out or noisy."""


class ProfileFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that was measured of one model; prefill and decode by the name of the hardware."""

    model: str
    kv: KvLayout
    prefill: dict[str, PrefillProfile]
    decode: dict[str, DecodeProfile]
    measured: Measurement | None = None

    def prefill_on(self, hardware: str) -> PrefillProfile:
        """Raises ConfigError for hardware that was not measured."""
        if hardware not in self.prefill:
            raise ConfigError(f"profile {self.model}: no prefill curve of {hardware!r}, only of {sorted(self.prefill)}")
        return self.prefill[hardware]

    def decode_on(self, hardware: str) -> DecodeProfile:
        """Raises ConfigError for hardware that was not measured."""
        if hardware not in self.decode:
            raise ConfigError(f"profile {self.model}: no decode curve of {hardware!r}, only of {sorted(self.decode)}")
        return self.decode[hardware]


def load_profile(path: str | Path) -> ProfileFile:
    """Read a profile file, TOML or JSON by its suffix. Raises ConfigError with the path of what is wrong."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            return msgspec.json.decode(data, type=ProfileFile)
        return msgspec.toml.decode(data, type=ProfileFile)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def save_profile(profile: ProfileFile, path: str | Path) -> None:
    """Write a profile file as JSON, readable by `load_profile`: whole, or not at all. Raises OSError."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
