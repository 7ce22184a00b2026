"""The prefix cache of a server that was started to prefill, while it decodes.

SGLang makes a server's prefix cache once, as its first role needs it, and `/pd_role_switch` only empties it. Its decode
side then matches each prompt against that cache, but without `--disaggregation-decode-enable-radix-cache` only after it
has allocated pages for the whole prompt: those of a repeated prefix are lost, and a check ends the process. With the
setting, the cache is used as decode servers use theirs, and only what it lacks is sent.
"""

from __future__ import annotations

import logging

from sglang.srt.runtime_context import get_context, get_disagg, get_memory

logger = logging.getLogger(__name__)


class RolePrefixes:
    """Keeps the setting of this process in step with its role."""

    def __init__(self) -> None:
        self._ours = False

    def decode(self) -> None:
        """This rank decodes from now on."""
        if get_memory().disable_radix_cache or get_disagg().disaggregation_decode_enable_radix_cache:
            return
        self._set(True)
        logger.info("prfaas: this server was started with a prefix cache, and uses it to decode, too")

    def end(self) -> None:
        """The role ends: as it was before."""
        if self._ours:
            self._set(False)

    def _set(self, enabled: bool) -> None:
        self._ours = enabled
        get_context().override("prfaas.role_prefixes", disaggregation_decode_enable_radix_cache=enabled)
