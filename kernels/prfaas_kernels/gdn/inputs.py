"""What GDN prefill takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prfaas_kernels.common.delta_inputs import DeltaInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class GdnInputs(DeltaInputs):
    """SGLang's ``extend`` contract (srt/layers/attention/linear/gdn_backend.py, 0.5.23), beyond :class:`DeltaInputs`.

    ``log_decay`` ``[1, T, HV]``, at most 0; ``beta`` in (0, 1). ``store_state``: whether the pool is updated.
    """

    log_decay: torch.Tensor
    store_state: bool = True
