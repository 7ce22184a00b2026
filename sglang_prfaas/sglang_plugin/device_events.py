"""When the device has written what was launched so far."""

from __future__ import annotations

from collections.abc import Callable

from sglang_prfaas.transport.outbox import at_hand


def written_so_far() -> Callable[[], None]:
    """A function that waits until everything launched on the current stream before this call is done. On a CPU it
    always is."""
    from sglang.srt.runtime_context import get_device

    if str(get_device().device) != "cuda":
        return at_hand
    import torch

    event = torch.cuda.Event(blocking=True)
    event.record()
    return event.synchronize  # type: ignore[no-any-return]
