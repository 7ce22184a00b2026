"""What the operators with a delta rule take alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class DeltaInputs:
    """A packed batch of N sequences over T tokens, H key heads and HV value heads (a multiple). Inputs are not changed.

    ``q``, ``k`` ``[1, T, H, K]``, ``v`` ``[1, T, HV, V]``, of any strides (Triton: innermost contiguous); ``beta``
    ``[1, T, HV]``; ``cu_seqlens`` ``[N+1]``.
    ``state_pool`` ``[slots, HV, V, K]`` is read and updated in place at ``cache_indices`` ``[N]``; -1 means start from
    zeros and store nothing. ``track_state`` ``[N, HV, V, K]`` receives, where ``track_chunk_idx[n] >= 0``, the state at
    the start of that 64-token chunk. ``return_chunk_states`` asks for the states at the start of every such chunk.
    ``scale`` None means ``K ** -0.5``; ``qk_l2norm``: q and k are normalised first. ``max_seqlen``: tokens of the
    longest sequence, where the caller knows it without waiting for the device; it helps the choice between a serial
    scan and one in segments (:mod:`prfaas_kernels.common.segments`).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    state_pool: torch.Tensor
    cache_indices: torch.Tensor
    cu_seqlens: torch.Tensor
    qk_l2norm: bool = True
    scale: float | None = None
    return_chunk_states: bool = False
    track_state: torch.Tensor | None = None
    track_chunk_idx: torch.Tensor | None = None
    max_seqlen: int | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.v.shape[1]

    @property
    def heads(self) -> int:
        """HV."""
        return self.v.shape[2]

    @property
    def width(self) -> int:
        """K."""
        return self.k.shape[3]

    @property
    def score_scale(self) -> float:
        """``scale``, or what None stands for."""
        return self.width**-0.5 if self.scale is None else self.scale
