"""Causal softmax attention of a prefill: paged prefix and ragged new tokens in one pass; MHA, GQA and MLA."""

from prfaas_kernels.full_attention.naive import naive_prefill
from prfaas_kernels.full_attention.prefill import preference, prefill_attention

__all__ = ["naive_prefill", "preference", "prefill_attention"]
