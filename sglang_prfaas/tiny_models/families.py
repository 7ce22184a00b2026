"""What is known about each family: its config, and what a server of it needs on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sglang_prfaas.tiny_models import configs


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family. ``config`` is its ``config.json``; the rest is added to what every CPU server gets."""

    name: str
    attention: str
    config: Mapping[str, Any]
    dtype: str = configs.DTYPE
    extra_server_args: tuple[str, ...] = ()
    extra_server_env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


FAMILIES: Mapping[str, FamilySpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            FamilySpec("qwen3", "GQA (dense)", configs.QWEN3),
            FamilySpec(
                "kimi-linear",
                "KDA + MLA",
                configs.KIMI_LINEAR,
                extra_server_args=("--max-mamba-cache-size", "24"),
            ),
            FamilySpec(
                "ring",
                "Lightning + MLA",
                configs.RING,
                extra_server_args=("--max-mamba-cache-size", "24"),
            ),
            FamilySpec("swa", "sliding window + GQA", configs.MIMO_V2_FLASH),
            FamilySpec(
                "qwen3-next",
                "GDN + GQA",
                configs.QWEN3_NEXT,
                extra_server_args=("--max-mamba-cache-size", "24"),
            ),
        )
    }
)

_ARGS = (
    "--device",
    "cpu",
    "--load-format",
    "dummy",
    "--attention-backend",
    "torch_native",
    "--disable-overlap-schedule",
    # Several servers share a few cores here: an idle scheduler must not spin.
    "--sleep-on-idle",
    "--mem-fraction-static",
    "0.5",
    "--max-total-tokens",
    "40960",
    "--max-running-requests",
    "8",
    "--disaggregation-decode-retraction-backup",
    "cpu_tensor",
)

_ENV = MappingProxyType(
    {
        "SGLANG_PLATFORM": "prfaas_cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
)


def family_spec(name: str) -> FamilySpec:
    """The family called ``name``. Raises ValueError that lists those there are."""
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {name!r}; choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def cpu_server_args(family: str) -> list[str]:
    """SGLang arguments that serve ``family`` on a CPU, without model path, host, port and disaggregation."""
    spec = family_spec(family)
    return [*_ARGS, "--dtype", spec.dtype, *spec.extra_server_args]


def cpu_server_env(family: str) -> dict[str, str]:
    """Environment that a CPU server of ``family`` needs on top of the caller's."""
    spec = family_spec(family)
    return {**_ENV, "SGLANG_MAMBA_CONV_DTYPE": spec.dtype, **spec.extra_server_env}
