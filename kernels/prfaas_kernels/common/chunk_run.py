"""What one call's launches share: its chunks, workspace, precision and settings; and where states are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from prfaas_kernels.common.chunk_table import CHUNK, ChunkTable, build_chunk_table
from prfaas_kernels.common.precision import Precision, precision_of
from prfaas_kernels.common.tuning import Settings, settings_for


class Workspace(NamedTuple):
    """Tiles per (chunk, head): ``qg``, ``kg``, ``w`` ``[chunks, H, C, K]``, ``u`` ``[.., C, V]``, ``scores``
    ``[.., C, C]``, ``lower`` ``[.., C, C]`` float32, ``decay`` ``[chunks, H, K]`` float32. Uninitialised: the kernels
    write every element of the tiles in use before they read it. ``w``, ``u``, ``lower``: None without a delta rule.
    """

    qg: torch.Tensor
    kg: torch.Tensor
    w: torch.Tensor | None
    u: torch.Tensor | None
    scores: torch.Tensor
    lower: torch.Tensor | None
    decay: torch.Tensor

    @property
    def prepared(self) -> tuple[torch.Tensor | None, ...]:
        """What prep kernels write, in the order of their parameters: all but ``u``, with ``k 2^G`` in ``w``'s place."""
        return self.qg, self.kg, self.w, self.scores, self.lower, self.decay


class ChunkRun(NamedTuple):
    """``heads`` value heads of K = ``width`` and V = ``value_width``, cut into the chunks of ``table``."""

    table: ChunkTable
    work: Workspace
    precision: Precision
    settings: Settings
    heads: int
    width: int
    value_width: int

    def prep_options(self, q: torch.Tensor) -> dict[str, Any]:
        """Constants and launch options of a prep kernel for ``q`` ``[T, Hk, K]``."""
        return {
            "GROUP": self.heads // q.shape[1],
            "K": self.width,
            "C": CHUNK,
            "BK": min(self.settings.prep_block, self.width),
            "DOT": self.precision.dot,
            "PREC": self.precision.prec,
            "num_warps": self.settings.prep_warps,
            "num_stages": self.settings.prep_stages,
        }


class StateIo(NamedTuple):
    """``pool`` ``[slots, H, V, K]`` by ``slots`` ``[N]``; ``warm`` ``[N]`` or None.

    ``key_dim`` and ``value_dim``: which dimension of ``pool`` and ``track_state`` is which. Where ``track_index[n]``
    names a chunk, the state at its start goes to row ``n`` of ``track_state``, or to row ``track_slots[n]``.
    """

    pool: torch.Tensor
    slots: torch.Tensor
    warm: torch.Tensor | None = None
    key_dim: int = 3
    value_dim: int = 2
    store: bool = True
    chunk_states: torch.Tensor | None = None
    track_state: torch.Tensor | None = None
    track_index: torch.Tensor | None = None
    track_slots: torch.Tensor | None = None

    def strides(self, states: torch.Tensor | None) -> tuple[int, int, int, int]:
        """Of slot, head, key and value in ``states``, which is ordered as ``pool`` is; zeros for None."""
        if states is None:
            return 0, 0, 0, 0
        return states.stride(0), states.stride(1), states.stride(self.key_dim), states.stride(self.value_dim)


def start_run(
    v: torch.Tensor, width: int, cu_seqlens: torch.Tensor, *, delta_rule: bool = True, settings: Settings | None = None
) -> ChunkRun:
    """Chunk table and buffers for ``v`` ``[T, H, V]`` and keys of ``width`` channels.

    ``settings`` None: the tuning table's for the device of ``v``.
    """
    tokens, heads, value_width = v.shape
    table, precision = build_chunk_table(cu_seqlens, tokens), precision_of(v.dtype)

    def tiles(*shape: int, dtype: torch.dtype = precision.store) -> torch.Tensor:
        return torch.empty(table.bound, heads, *shape, dtype=dtype, device=v.device)

    work = Workspace(
        qg=tiles(CHUNK, width),
        kg=tiles(CHUNK, width),
        w=tiles(CHUNK, width) if delta_rule else None,
        u=tiles(CHUNK, value_width) if delta_rule else None,
        scores=tiles(CHUNK, CHUNK),
        lower=tiles(CHUNK, CHUNK, dtype=torch.float32) if delta_rule else None,
        decay=tiles(width, dtype=torch.float32),
    )
    settings = settings_for(v.device) if settings is None else settings
    return ChunkRun(table, work, precision, settings, heads, width, value_width)
