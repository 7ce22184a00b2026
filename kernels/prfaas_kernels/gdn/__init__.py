"""Gated Delta Network: delta rule with one gate per value head."""

from prfaas_kernels.gdn.chunk import chunk_gdn
from prfaas_kernels.gdn.chunk_torch import gdn_step
from prfaas_kernels.gdn.inputs import GdnInputs
from prfaas_kernels.gdn.naive import gdn_gate, recurrent_gdn

__all__ = ["GdnInputs", "chunk_gdn", "gdn_gate", "gdn_step", "recurrent_gdn"]
