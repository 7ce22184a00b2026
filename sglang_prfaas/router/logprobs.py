"""Prompt logprobs of /generate in PD mode: prefill computes them, decode answers; both go into one answer.

What SGLang's own routers do for `input_token_logprobs`, applied to all per-prompt-token fields.
"""

from __future__ import annotations

from typing import Any

import msgspec

_FIELDS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def merge_answers(prefill: bytes, decode: bytes) -> bytes:
    """Decode's JSON answer with prefill's prompt logprobs before its own; unchanged where there is nothing to add."""
    try:
        ours = msgspec.json.decode(prefill)
        theirs = msgspec.json.decode(decode)
    except msgspec.DecodeError:
        return decode
    changed = False
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for left, right in zip(ours, theirs, strict=True):
            changed |= _merge(left, right)
    else:
        changed = _merge(ours, theirs)
    return msgspec.json.encode(theirs) if changed else decode


class StreamMerger:
    """Merges into every event of decode's stream (payload bytes, without transfer coding)."""

    def __init__(self) -> None:
        self._prefill: dict[int, Any] = {}
        self._held = b""

    def add_prefill(self, stream: bytes) -> None:
        """Prefill's whole stream: its events carry the prompt's logprobs, one `index` per prompt."""
        for event in stream.split(b"\n\n"):
            payload = event.removeprefix(b"data:").strip()
            if payload.startswith(b"{"):
                answer = msgspec.json.decode(payload)
                self._prefill.setdefault(answer.get("index", 0), answer)

    def feed(self, data: bytes) -> bytes:
        """Bytes of decode's stream in; merged bytes of the events that are complete out."""
        *events, self._held = (self._held + data).split(b"\n\n")
        return b"".join([self._merge_event(event) + b"\n\n" for event in events])

    def rest(self) -> bytes:
        """What is left at the stream's end."""
        held, self._held = self._held, b""
        return held

    def _merge_event(self, event: bytes) -> bytes:
        payload = event.removeprefix(b"data:").strip()
        if not payload.startswith(b"{"):
            return event
        answer = msgspec.json.decode(payload)
        if not _merge(self._prefill.get(answer.get("index", 0)), answer):
            return event
        return b"data: " + msgspec.json.encode(answer)


def _merge(prefill: Any, decode: Any) -> bool:
    if not isinstance(prefill, dict) or not isinstance(decode, dict):
        return False
    ours, theirs = prefill.get("meta_info"), decode.get("meta_info")
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return False
    changed = False
    for name in _FIELDS:
        if ours.get(name) and isinstance(theirs.get(name), list):
            theirs[name] = list(ours[name]) + theirs[name]
            changed = True
    return changed
