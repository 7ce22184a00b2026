"""Figures of the paper (PrfaaS, arXiv 2604.15039v2), and the profile that follows from them.

What the paper prints is cited by table or section. What it does not print, and we had to derive, says "derived".
"""

from __future__ import annotations

from msgspec import Struct

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.units import KIB, MIB
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.lengths import TruncatedLogNormal
from sglang_prfaas.scheduler.profiles import DecodeProfile, PrefillProfile, ProfileFile
from sglang_prfaas.scheduler.throughput import Fleet, Workload

TABLE3_LENGTHS = (1, 8, 32, 128)
"""In K tokens."""
TABLE3_GBPS: dict[str, tuple[float, float, float, float]] = {
    "Kimi Linear": (1.19, 2.29, 3.87, 4.88),
    "MiMo-V2-Flash": (0.82, 2.85, 4.66, 4.71),
    "Qwen3.5-397B": (4.13, 6.28, 8.25, 7.47),
    "Ring-2.5-1T": (7.27, 4.47, 2.59, 1.46),
    "MiniMax-M2.5": (4.94, 32.87, 59.93, 47.82),
    "Qwen3-235B": (4.12, 22.42, 33.35, 21.50),
}
"""Table 3: Phi_kv of one instance of 8 H200, in Gbps, at 1K, 8K, 32K and 128K."""


class Table5Row(Struct, frozen=True):
    """Table 5: the 1T hybrid model on one instance of 8 H200."""

    tokens: int
    kv_mib: float
    prefill_s: float
    kv_gbps: float


TABLE5 = (
    Table5Row(1_000, 190.8, 0.44, 3.61),
    Table5Row(8_000, 308.9, 0.72, 3.59),
    Table5Row(32_000, 701.3, 1.84, 3.19),
    Table5Row(128_000, 2316.3, 7.40, 2.62),
)

# Derived: three points of the H20 curve that Table 6 implies. 3 / 1.64 at l_short, 9 / 2.11 at the mean, and the P90 of
# TTFT of the homogeneous cluster at the P90 of the lengths.
H20_ANCHORS = ((10_200.0, 1.83), (27_500.0, 4.27), (62_300.0, 9.73))

PAPER_PROFILE = ProfileFile(
    model="1T hybrid, KDA:MLA 3:1",
    # Derived: fits the 1K and 8K rows of Table 5 exactly; 15 MLA layers of 576 values in bf16 are 16.875 KiB a token.
    kv=KvLayout(full_bytes_per_token=16.875 * KIB, state_bytes=173.9 * MIB),
    prefill={
        "H200": PrefillProfile(
            time_s=Curve(
                tuple(float(row.tokens) for row in TABLE5), tuple(row.prefill_s for row in TABLE5), "quadratic"
            ),
            gpus=8,
            origin="PrfaaS Table 5, quadratic least squares",
        ),
        "H20": PrefillProfile(
            time_s=Curve(tuple(x for x, _ in H20_ANCHORS), tuple(y for _, y in H20_ANCHORS), "quadratic"),
            gpus=8,
            origin="derived from PrfaaS Table 6: quadratic through three anchors",
        ),
    },
    decode={
        "H20": DecodeProfile(
            step_s=Curve((20.0,), (0.025,)),
            gpus=8,
            origin="derived from PrfaaS Table 6: 6.25 / 8 instances of 20 requests at 40 tokens/s, 1,024 tokens each",
        ),
    },
)

CASE_STUDY_LENGTHS = TruncatedLogNormal(9.90, 1.00, 128.0, 131_072.0)
"""Section 4: input lengths of the case study."""
OUTPUT_TOKENS = 1024
SLO_TOKENS_PER_S = 40.0
LINK_GBPS = 100.0
N_PRFAAS, N_PD, N_HOMOGENEOUS = 4, 8, 12
"""Section 4: instances of 8 GPUs, H200 in the PrfaaS cluster, H20 in the others."""
H200_PRICE = 2.0
"""Derived: price of an H200 in H20s at which the paper's "about 15 % at equal cost" holds."""


class Table6Column(Struct, frozen=True, kw_only=True):
    """Table 6; None where the paper has a dash."""

    t_tokens: float | None
    n_prfaas: int
    n_p: int
    n_d: int
    ttft_mean_s: float
    ttft_p90_s: float
    theta_prfaas: float | None
    theta_pd_p: float | None
    theta_pd_d: float
    lambda_max: float
    ratio: float


TABLE6 = {
    "prfaas": Table6Column(
        t_tokens=19_400,
        n_prfaas=4,
        n_p=3,
        n_d=5,
        ttft_mean_s=2.22,
        ttft_p90_s=3.51,
        theta_prfaas=1.61,
        theta_pd_p=1.64,
        theta_pd_d=3.91,
        lambda_max=3.24,
        ratio=1.54,
    ),
    "homogeneous": Table6Column(
        t_tokens=None,
        n_prfaas=0,
        n_p=9,
        n_d=3,
        ttft_mean_s=4.44,
        ttft_p90_s=9.73,
        theta_prfaas=None,
        theta_pd_p=2.11,
        theta_pd_d=2.35,
        lambda_max=2.11,
        ratio=1.0,
    ),
    "naive": Table6Column(
        t_tokens=None,
        n_prfaas=4,
        n_p=0,
        n_d=8,
        ttft_mean_s=1.74,
        ttft_p90_s=3.51,
        theta_prfaas=2.45,
        theta_pd_p=None,
        theta_pd_d=6.25,
        lambda_max=2.45,
        ratio=1.16,
    ),
}
OFFLOADED_SHARE = 0.496
EGRESS_GBPS = 13.0


class ClusterBandwidth(Struct, frozen=True):
    """Section 2.3: what a prefill cluster sends at one length, in Gbps."""

    model: str
    gpus: int
    length_k: int
    gbps: float
    printed: str


SECTION_2_3 = (
    ClusterBandwidth("MiniMax-M2.5", 512, 32, 3_800, "3.8 Tbps"),
    ClusterBandwidth("Qwen3-235B", 512, 32, 2_100, "2.1 Tbps"),
    ClusterBandwidth("Ring-2.5-1T", 512, 32, 170, "about 170 Gbps"),
    ClusterBandwidth("Ring-2.5-1T", 10_000, 128, 1_800, "1.8 Tbps"),
)
"""The last follows from Table 3 (derived)."""


def case_study_workload() -> Workload:
    """Section 4: what comes in."""
    return Workload(CASE_STUDY_LENGTHS, OUTPUT_TOKENS, SLO_TOKENS_PER_S)


def case_study_fleet() -> Fleet:
    """Section 4: 32 H200 that prefill, 64 H20 beside them, 100 Gbps between."""
    return Fleet(
        kv=PAPER_PROFILE.kv,
        pd_prefill=PAPER_PROFILE.prefill["H20"],
        pd_decode=PAPER_PROFILE.decode["H20"],
        n_pd=N_PD,
        prfaas_prefill=PAPER_PROFILE.prefill["H200"],
        n_prfaas=N_PRFAAS,
        egress_gbps=LINK_GBPS,
    )


def homogeneous_fleet(n_pd: int = N_HOMOGENEOUS) -> Fleet:
    """Section 4: the baseline, H20 only."""
    return Fleet(
        kv=PAPER_PROFILE.kv, pd_prefill=PAPER_PROFILE.prefill["H20"], pd_decode=PAPER_PROFILE.decode["H20"], n_pd=n_pd
    )
