"""Profiles: what one instance can do, as measured curves, and the file they are kept in.

A profile file is TOML or JSON of the shape of `ProfileFile`; unknown keys are refused with their path.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.curves import Curve


class PrefillProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """T_prefill(l): seconds over tokens, of one instance."""

    time_s: Curve
    gpus: int
    """P, GPUs of one instance."""
    origin: str
    """Where the points come from: measured on what, or derived how."""


class DecodeProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one decode step over the batch, of one instance."""

    step_s: Curve
    gpus: int
    origin: str

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


class ProfileFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that was measured of one model; prefill and decode by the name of the hardware."""

    model: str
    kv: KvLayout
    prefill: dict[str, PrefillProfile]
    decode: dict[str, DecodeProfile]

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
    """Write a profile file as JSON, readable by `load_profile`."""
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
