"""What SGLang asks of ``torch`` and the CPU build does not answer, put in place once per process."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch


def install() -> None:
    """Idempotent. Raises RuntimeError when a GPU is visible: SGLang would then mix CUDA paths with this platform."""
    if torch.cuda.is_available():
        raise RuntimeError(
            "SGLANG_PLATFORM=prfaas_cpu needs the GPUs hidden: set CUDA_VISIBLE_DEVICES to the empty string, "
            "or unset SGLANG_PLATFORM to use them"
        )
    if getattr(torch.get_device_module, "prfaas_cpu", False):
        return
    torch.get_device_module = _cpu_by_default(torch.get_device_module)
    for name, value in (("device", _device), ("get_device_properties", _get_device_properties)):
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, value)


def _cpu_by_default(original: Any) -> Any:
    """``torch.get_device_module()`` without an argument answers ``torch.cuda`` in a CUDA build of torch."""

    @functools.wraps(original)
    def get_device_module(device: torch.device | str | None = None) -> Any:
        return original("cpu" if device is None else device)

    get_device_module.prfaas_cpu = True
    return get_device_module


@contextlib.contextmanager
def _device(device: object) -> Iterator[None]:
    """``torch.cuda.device``'s counterpart: there is one CPU to select."""
    yield


def _get_device_properties(device: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="cpu",
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
        major=0,
        minor=0,
    )
