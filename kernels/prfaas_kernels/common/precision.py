"""Types of workspace, dot operands and dot accumulation, by input dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

HALF_SPAN = 112.0
FULL_SPAN = 64.0


class Precision(NamedTuple):
    """``store``: dtype of workspace tiles; ``dot``: how factors of dots are held (see ``operand``).

    ``prec``, ``merge_prec``: what ``tl.dot`` does with float32 factors; ``span``: the decay in powers of two that one
    rescaled product may cover.
    """

    store: torch.dtype
    dot: str
    prec: str
    merge_prec: str
    span: float


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def precision_of(dtype: torch.dtype) -> Precision:
    """bfloat16 operands for half inputs (float16 too: its range is too small for rescaled factors), else float32.

    The interpreter's bfloat16 dot is wrong, so it multiplies factors rounded to bfloat16 in float32.
    """
    if dtype == torch.float32:
        return Precision(torch.float32, "fp32", "tf32x3", "tf32x3", FULL_SPAN)
    dot = "bf16_in_fp32" if interpreting() else "bf16"
    return Precision(torch.bfloat16, dot, "tf32", "tf32", HALF_SPAN)
