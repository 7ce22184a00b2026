"""Inputs shared by the cases; on the GPU where there is one, else in the interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

FULL = os.environ.get("PRFAAS_KERNEL_TESTS") == "full"

#: Limits of relative L2 error against the float64 recurrence.
FULL_LIMIT, HALF_LIMIT = 1e-5, 1e-2


def on_device(x):
    return x.cuda() if torch.cuda.is_available() else x


def error(got, want):
    """Relative L2 distance; NaN counts as wrong."""
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def marks(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh buffers hold NaN (or a wild number), so that nothing relies on what memory held before."""
    plain = torch.empty

    def empty(*args, **options):
        x = plain(*args, **options)
        return x.fill_(float("nan") if x.is_floating_point() else 1 << 20)

    monkeypatch.setattr(torch, "empty", empty)
