"""What KDA prefill takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prfaas_kernels.common.delta_inputs import DeltaInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class KdaInputs(DeltaInputs):
    """SGLang's ``extend`` contract (srt/layers/attention/linear/kda_backend.py, 0.5.23), beyond :class:`DeltaInputs`.

    ``g`` ``[1, T, HV, K]``: raw gate if ``a_log`` is given (see :func:`prfaas_kernels.kda.kda_gate`, also for
    ``dt_bias`` and ``lower_bound``), else log decay. ``beta``: logits if ``beta_is_raw``, else in (0, 1).
    """

    g: torch.Tensor
    a_log: torch.Tensor | None = None
    dt_bias: torch.Tensor | None = None
    lower_bound: float | None = None
    beta_is_raw: bool = False
