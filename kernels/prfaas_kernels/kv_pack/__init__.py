"""Gather and scatter rows of many pools (paged KV, recurrent state, convolution state), one launch each."""

from prfaas_kernels.kv_pack.pack import pack_rows, quantise_rows, unpack_rows
from prfaas_kernels.kv_pack.pools import PoolTable

__all__ = ["PoolTable", "pack_rows", "quantise_rows", "unpack_rows"]
