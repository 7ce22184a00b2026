"""Launch settings per GPU and Triton version. A table, never tuned online: kernels write the state pool in place.

``kernels/bench`` measures candidates on copies and prints entries for :data:`TABLE`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton


class Settings(NamedTuple):
    """``prep_block``: key channels per step of prep; ``scan_block``: value columns per program of the scan.

    ``*_warps``: warps per program; ``*_stages``: depth of the software pipeline; ``prep_max_registers``: cap for KDA's
    mild-gate prep, so that two programs fit a multiprocessor. ``segment_*``: see
    :func:`prfaas_kernels.common.segments.plan_segments`; a segment is a multiple of ``segment_step`` chunks, and
    ``segment_programs`` programs of the scan run at once on a multiprocessor. ``attention_rows``, ``attention_keys``:
    query rows and keys of a block of full attention; ``attention_wide_*`` where V is over 128.
    """

    prep_block: int = 32
    prep_warps: int = 8
    prep_stages: int = 2
    prep_max_registers: int = 128
    solve_block: int = 64
    solve_warps: int = 4
    scan_block: int = 32
    scan_warps: int = 4
    scan_stages: int = 2
    segment_ratio: float = 3.0
    segment_min_tokens: int = 32768
    segment_step: int = 16
    segment_programs: int = 1
    merge_warps: int = 8
    attention_rows: int = 128
    attention_keys: int = 64
    attention_wide_rows: int = 64
    attention_wide_keys: int = 32
    attention_warps: int = 8
    attention_stages: int = 2


DEFAULT = Settings()

#: (name of the GPU, Triton's major.minor) -> settings. Empty until measured: see kernels/README.md.
TABLE: dict[tuple[str, str], Settings] = {}


@functools.cache
def _lookup(gpu: str, version: str) -> Settings:
    return TABLE.get((gpu, version), DEFAULT)


def settings_for(device: torch.device) -> Settings:
    """The table's entry for ``device``, else :data:`DEFAULT`."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return _lookup(gpu, ".".join(triton.__version__.split(".")[:2]))
