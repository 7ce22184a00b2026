"""Kimi Delta Attention: delta rule with one gate per key channel."""

from prfaas_kernels.kda.chunk import chunk_kda
from prfaas_kernels.kda.chunk_torch import kda_step
from prfaas_kernels.kda.inputs import KdaInputs
from prfaas_kernels.kda.naive import kda_gate, recurrent_kda

__all__ = ["KdaInputs", "chunk_kda", "kda_gate", "kda_step", "recurrent_kda"]
