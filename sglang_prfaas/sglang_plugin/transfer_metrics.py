"""Finished transfers in a server's own `/metrics`, beside SGLang's figures, where the server has `--enable-metrics`."""

from __future__ import annotations

import functools
from typing import Any

_LABELS = ("role", "rail", "status")


def count(role: str, rail: str, status: str, nbytes: int) -> None:
    """Count one transfer of this rank, and its bytes as they lie in memory."""
    transfers, moved = _counters()
    transfers.labels(role, rail, status).inc()
    moved.labels(role, rail, status).inc(nbytes)


@functools.cache
def _counters() -> tuple[Any, Any]:
    # SGLang sets prometheus_client's directory for several processes first, so it is not imported before it is needed.
    from prometheus_client import Counter

    return (
        Counter("prfaas_transfers", "Finished transfers of KVCache, by what moved them.", _LABELS),
        Counter("prfaas_transfer_bytes", "Bytes of finished transfers, as they lie in memory.", _LABELS),
    )
