"""The site's prefix cache as other sites may read it."""

from __future__ import annotations

from pathlib import Path

from sglang_prfaas.config.prefix_cache import serve_host
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.transport.object_server import ObjectServer, ServedStats


class CacheServer:
    """Serves `disk_dir`, which the site's servers write. Raises LocalError, ConfigError, OSError."""

    def __init__(self, config: SiteConfig) -> None:
        cache = config.prefix_cache
        self._store = DiskStore(Path(cache.disk_dir), cache.disk_bytes, Counters())
        try:
            self._server = ObjectServer(
                serve_host(config), cache.serve_port, self._store, config.transport, cache.serve_to
            )
        except BaseException:
            self._store.close()
            raise
        self.port = self._server.port

    def stats(self) -> ServedStats:
        return self._server.stats()

    def close(self) -> None:
        """Cut all connections."""
        self._server.close()
        self._store.close()
