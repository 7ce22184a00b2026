"""Which implementation runs: Triton's kernels or vectorised torch, with the reason, logged once for each reason."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal, NamedTuple

import torch

logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "torch"]
KEY_WIDTHS = (16, 32, 64, 128)
VALUE_WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """``backend`` is "triton" or "torch"; ``reason`` says why not the other."""

    backend: str
    reason: str


@functools.cache
def _log(operator: str, choice: Choice) -> None:
    logger.info("%s runs on %s: %s", operator, choice.backend, choice.reason)


def obstacle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why Triton's kernels can't take these inputs (``[.., T, H, width]``), or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "the tensors are on the CPU"
    if q.device.type not in ("cpu", "cuda"):
        return f"device {q.device.type} is not supported"
    if q.device.type == "cuda" and torch.version.hip is not None:
        return "ROCm is not supported"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < OLDEST_CAPABILITY:
        return f"compute capability is below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    if v.dtype not in DTYPES:
        return f"dtype {v.dtype} is not supported"
    if k.shape[-1] not in KEY_WIDTHS or v.shape[-1] not in VALUE_WIDTHS:
        return f"K={k.shape[-1]}, V={v.shape[-1]}: K must be in {KEY_WIDTHS}, V in {VALUE_WIDTHS}"
    if v.shape[-2] % k.shape[-2]:
        return f"{v.shape[-2]} value heads are no multiple of {k.shape[-2]} key heads"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the innermost dimension of q, k or v is strided"
    return None


def choose(operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: Backend = "auto") -> Choice:
    """Triton where it can, else torch. Raises ValueError where ``backend`` is "triton" and it can't."""
    if backend == "torch":
        return Choice("torch", "asked for")
    hindrance = obstacle(q, k, v)
    if hindrance is not None and backend == "triton":
        raise ValueError(
            f"{operator}: backend 'triton' can't run: {hindrance}; use backend='auto' to fall back to torch"
        )
    choice = Choice("triton", "all inputs are supported") if hindrance is None else Choice("torch", hindrance)
    _log(operator, choice)
    return choice
