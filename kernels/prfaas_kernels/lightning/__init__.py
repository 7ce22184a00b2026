"""Lightning attention: linear attention with a fixed decay per head, no delta rule."""

from prfaas_kernels.lightning.chunk import chunk_lightning
from prfaas_kernels.lightning.chunk_torch import lightning_step
from prfaas_kernels.lightning.inputs import LightningInputs
from prfaas_kernels.lightning.naive import recurrent_lightning

__all__ = ["LightningInputs", "chunk_lightning", "lightning_step", "recurrent_lightning"]
