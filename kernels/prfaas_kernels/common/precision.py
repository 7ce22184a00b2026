"""Types of workspace, dot operands and dot accumulation, by input dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

HALF_SPAN = 112.0
FULL_SPAN = 64.0


class Precision(NamedTuple):
    """``store``: dtype of workspace tiles; ``dot``: dtype of dot operands; ``prec``, ``merge_prec``: what ``tl.dot``
    does with float32 operands; ``span``: the decay in powers of two that one rescaled product may cover.
    """

    store: torch.dtype
    dot: tl.dtype
    prec: str
    merge_prec: str
    span: float


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def precision_of(dtype: torch.dtype) -> Precision:
    """bfloat16 operands for half inputs (float16 too: its range is too small for rescaled factors), else float32.

    The interpreter's bfloat16 dot is wrong, so it multiplies in float32; tiles are stored in bfloat16 all the same.
    """
    if dtype == torch.float32:
        return Precision(torch.float32, tl.float32, "tf32x3", "tf32x3", FULL_SPAN)
    dot = tl.float32 if interpreting() else tl.bfloat16
    return Precision(torch.bfloat16, dot, "tf32", "tf32", HALF_SPAN)
