"""Casts inside kernels.

DOT says how factors of ``tl.dot`` are held: "bf16", "fp32", or "bf16_in_fp32": rounded to bfloat16 but held in float32,
for the interpreter, which multiplies bfloat16 wrongly and truncates where a GPU rounds to nearest even.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_bf16(x):
    """float32 ``x`` rounded to the nearest bfloat16, still float32, by integer arithmetic."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, DOT: tl.constexpr):
    """float32 ``x`` in DTYPE, to be stored."""
    if DOT == "bf16_in_fp32" and DTYPE == tl.bfloat16:  # noqa: SIM300
        x = _nearest_bf16(x)
    return x.to(DTYPE)


@triton.jit
def operand(x, DOT: tl.constexpr):
    """``x`` as a factor of ``tl.dot``."""
    if DOT == "bf16":
        y = x.to(tl.bfloat16)
    else:
        y = x.to(tl.float32)
        if DOT == "bf16_in_fp32":
            y = _nearest_bf16(y)
    return y
