"""What Lightning prefill takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class LightningInputs:
    """The contract of SGLang's ``seg_la_fwd`` (lightning_backend.py, 0.5.23).

    ``q``, ``k``, ``v`` ``[T, H, D]``; ``slopes`` H values; ``cu_seqlens`` ``[N+1]``. ``state_pool``
    ``[slots, H, K, V]`` is read where ``has_initial_state[n]`` (None: everywhere) and updated in place at
    ``cache_indices`` ``[N]``; -1 means start from zeros and store nothing. Where ``track_slots[n] >= 0`` the state
    after ``track_lens[n]`` tokens (a multiple of 64 below the sequence's length) is stored in that slot too. ``scale``
    None means ``K ** -0.5``; ``max_seqlen`` as in :class:`prfaas_kernels.common.delta_inputs.DeltaInputs`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slopes: torch.Tensor
    state_pool: torch.Tensor
    cache_indices: torch.Tensor
    cu_seqlens: torch.Tensor
    has_initial_state: torch.Tensor | None = None
    scale: float | None = None
    track_lens: torch.Tensor | None = None
    track_slots: torch.Tensor | None = None
    max_seqlen: int | None = None

    @property
    def score_scale(self) -> float:
        """``scale``, or what None stands for."""
        return self.k.shape[2] ** -0.5 if self.scale is None else self.scale
