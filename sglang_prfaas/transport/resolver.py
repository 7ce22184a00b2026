"""Names resolved without holding up the caller: a name server may take seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.addresses import is_numeric, resolve


def resolve_in_background(host: str, found: Callable[[str], None], failed: Callable[[str], None]) -> None:
    """Call `found` with the address of `host`, at once where it is one, else from a short-lived thread; or `failed`."""
    if is_numeric(host):
        found(host)
        return

    def work() -> None:
        try:
            address = resolve(host)
        except LocalError as error:
            failed(str(error))
        else:
            found(address)

    threading.Thread(target=work, name="prfaas-resolve", daemon=True).start()
