"""Objects in Mooncake Store, which several hosts of a site share: its master knows where they are, every client lends
memory. Needs the package `mooncake-transfer-engine` (or `-non-cuda`) and, on Debian, `libibverbs1`."""

from __future__ import annotations

import socket
import threading
from typing import Any

from sglang_prfaas.config.schema import PrefixCacheConfig
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.store.objects import frame_head, head_bytes, is_intact
from sglang_prfaas.store.stats import Counters

CONNECT_TIMEOUT_S = 10.0


class MooncakeStore:
    """An `ObjectStore`. Raises LaunchError where the package, its libraries or the master is missing.

    The store has no checksums, so objects carry ours. What is evicted there is up to its master.
    """

    def __init__(self, config: PrefixCacheConfig, counters: Counters) -> None:
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise LaunchError(
                f"prefix_cache.backend is mooncake, but its client does not load: {error}; "
                "pip install 'sglang-prfaas[mooncake]', and on Debian apt-get install libibverbs1"
            ) from error
        _reach(config.mooncake_master)
        self._counters = counters
        self._lock = threading.Lock()
        self._store: Any = MooncakeDistributedStore()
        code = self._store.setup(
            config.mooncake_host,
            config.mooncake_metadata,
            config.mooncake_segment_bytes,
            config.mooncake_buffer_bytes,
            config.mooncake_protocol,
            config.mooncake_device,
            config.mooncake_master,
        )
        if code:
            raise LaunchError(
                f"cannot join the Mooncake Store of {config.mooncake_master} (code {code}): are "
                f"prefix_cache.mooncake_host = {config.mooncake_host!r}, mooncake_protocol and mooncake_metadata right?"
            )

    def contains(self, name: str) -> bool:
        return bool(self._store.is_exist(name) == 1)

    def read(self, name: str, out: memoryview) -> bool:
        framed = memoryview(self._store.get(name))
        if not framed:
            return False
        head = head_bytes(name)
        if len(framed) != head + len(out) or not is_intact(name, framed[:head], framed[head:]):
            self._counters.add(corrupt_objects=1)
            self._store.remove(name)
            return False
        out[:] = framed[head:]
        return True

    def write(self, name: str, payload: memoryview) -> bool:
        if self.contains(name):
            return True
        kept = bool(self._store.put_parts(name, frame_head(name, payload), bytes(payload)) == 0)
        if not kept:
            self._counters.add(backend_refused=1)
        return kept

    def close(self) -> None:
        """Leave the store; what this client lent goes with it."""
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()


def _reach(master: str) -> None:
    """Raises LaunchError where nothing listens: the client itself would try for minutes."""
    host, _, port = master.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise LaunchError(
            f"prefix_cache.mooncake_master: nothing answers at {master!r} ({error}); start mooncake_master there"
        ) from error
