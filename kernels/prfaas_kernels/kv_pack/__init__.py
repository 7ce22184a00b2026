"""Gather and scatter rows of many pools (paged KV, recurrent state, convolution state), one launch each."""

from prfaas_kernels.kv_pack.codec import decode_rows, encode_rows, encoded_row_bytes
from prfaas_kernels.kv_pack.pack import dequantise_rows, pack_rows, quantise_rows, unpack_rows
from prfaas_kernels.kv_pack.pools import PoolTable

__all__ = [
    "PoolTable",
    "decode_rows",
    "dequantise_rows",
    "encode_rows",
    "encoded_row_bytes",
    "pack_rows",
    "quantise_rows",
    "unpack_rows",
]
