"""Pieces shared by the operators: causal convolution, the chunk scan, small maths."""

from prfaas_kernels.common.causal_conv1d import causal_conv1d, causal_conv1d_step
from prfaas_kernels.common.maths import l2_normalise, softplus

__all__ = ["causal_conv1d", "causal_conv1d_step", "l2_normalise", "softplus"]
