"""Request bodies: what routing needs to read of them, and the bootstrap fields that PD mode needs in them.

Every other byte stays as the client sent it: fields are appended to the object, not re-encoded. Only a client that
sends bootstrap fields of its own gets its object rebuilt (from raw values), so that no field appears twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from sglang_prfaas.http import HttpError
from sglang_prfaas.prefix_cache.block_hash import PromptHashes

Endpoint = Literal["chat", "completions", "generate"]

_BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
# SGLang derives further rooms of a scalar room by adding small numbers: leave space below 2**63.
_ROOM_LIMIT = (1 << 63) - (1 << 20)
_RANDOM_BYTES = 4096


_PROMPT_FIELDS: Mapping[Endpoint, tuple[str, ...]] = {
    "chat": ("messages",),
    "completions": ("prompt",),
    "generate": ("text", "input_ids", "input_embeds"),
}

_ABSENT = Raw()


class _Fields(Struct):
    """Top-level fields of the three endpoints; heavy ones stay raw."""

    model: Any = None
    stream: Any = False
    messages: Raw = _ABSENT
    tools: Raw = _ABSENT
    chat_template_kwargs: Raw = _ABSENT
    continue_final_message: Any = False
    prompt: Raw = _ABSENT
    text: Raw = _ABSENT
    input_ids: Raw = _ABSENT
    input_embeds: Raw = _ABSENT
    return_logprob: Any = False
    rid: Any = None
    cache_salt: Any = None
    extra_key: Any = None
    lora_path: Any = None
    bootstrap_host: Raw = _ABSENT
    bootstrap_port: Raw = _ABSENT
    bootstrap_room: Raw = _ABSENT


_decoder = msgspec.json.Decoder(_Fields)
_object_decoder = msgspec.json.Decoder(dict[str, Raw])


class ParsedBody:
    """One request body. `batch` is None for one prompt, else the number of prompts."""

    __slots__ = (
        "_end",
        "_raw",
        "adapter",
        "batch",
        "cache_salt",
        "endpoint",
        "fields",
        "hashes",
        "lora_path",
        "prompt",
        "token_ids",
    )

    def __init__(self, endpoint: Endpoint, raw: bytes, fields: _Fields) -> None:
        self.endpoint = endpoint
        self.fields = fields
        self.prompt = _prompt_of(endpoint, fields)
        self.batch = None if endpoint == "chat" else _batch_size(self.prompt)
        self.cache_salt: str | None = None
        """The tenant's, which takes the place of the client's."""
        self.adapter: str | None = None
        """The one LoRA adapter that all of the request is for, where there is one."""
        self.lora_path: str | None = None
        """An adapter that the client selected by its model's name alone."""
        self.token_ids: Sequence[int] | None = None
        """Of its longest prompt, where they were needed."""
        self.hashes: dict[int, PromptHashes] = {}
        """Of these tokens, by block size, as far as they were needed."""
        self._raw = raw
        self._end = len(raw.rstrip(b" \t\r\n")) - 1 if raw[-1:] != b"}" else len(raw) - 1

    @property
    def stream(self) -> bool:
        return bool(self.fields.stream)

    @property
    def model(self) -> str | None:
        return self.fields.model if isinstance(self.fields.model, str) else None

    @property
    def merges_logprobs(self) -> bool:
        """Whether the prompt's logprobs, which only prefill has, belong into the answer."""
        wanted = self.fields.return_logprob
        return self.endpoint == "generate" and (any(wanted) if isinstance(wanted, list) else bool(wanted))

    def with_bootstrap(self, host: str, port: int, rooms: list[int]) -> bytes:
        """The body with bootstrap fields: scalars for one prompt, lists for a batch. Replaces a client's own."""
        fields: dict[str, object] = {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": rooms[0]}
        if self.batch is not None:
            fields = {
                "bootstrap_host": [host] * self.batch,
                "bootstrap_port": [port] * self.batch,
                "bootstrap_room": rooms,
            }
        own = self.fields
        replaced: tuple[str, ...] = _BOOTSTRAP
        if self.cache_salt is not None:
            fields["cache_salt"] = self.cache_salt
            replaced = (*_BOOTSTRAP, "cache_salt")
        if self.lora_path is not None:
            fields["lora_path"] = self.lora_path
            replaced = (*replaced, "lora_path")
        given = own.cache_salt is not None and self.cache_salt is not None
        given = given or (self.lora_path is not None and b'"lora_path"' in self._raw)  # null, or empty
        if given or any(memoryview(raw).nbytes for raw in (own.bootstrap_host, own.bootstrap_port, own.bootstrap_room)):
            rebuilt: dict[str, object] = dict(_object_decoder.decode(self._raw))
            for name in replaced:
                rebuilt.pop(name, None)
            return msgspec.json.encode(rebuilt | fields)
        opened = self._raw[: self._end]
        comma = b"" if opened.rstrip().endswith(b"{") and not _object_decoder.decode(self._raw) else b","
        return b"".join((opened, comma, msgspec.json.encode(fields)[1:]))


def parse_body(endpoint: Endpoint, raw: bytes) -> ParsedBody:
    """Read a request body. Raises HttpError 400 for what is not one JSON object."""
    try:
        if not raw.isascii():
            raw.decode()  # raw fields are not checked by the JSON decoder
        fields = _decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise HttpError(400, f"The body is not a JSON object: {exc}", code="invalid_json") from exc
    return ParsedBody(endpoint, raw, fields)


def require_prompt(body: ParsedBody) -> None:
    """Raises HttpError 400 where there is none: a server's own error would quote the whole body to the client, with the
    bootstrap fields that were added to it."""
    if body.prompt is None:
        names = _PROMPT_FIELDS[body.endpoint]
        text = f"The body has no prompt; it needs {' or '.join(names)}."
        raise HttpError(400, text, code="missing_field", param=names[0])


def new_rooms(body: ParsedBody) -> list[int]:
    """Fresh bootstrap rooms, 63 random bits each: one per prompt."""
    return [_random.room() for _ in range(body.batch or 1)]


class _Random:
    """The system's random numbers, read many at a time."""

    def __init__(self) -> None:
        self._bytes = b""
        self._pos = 0

    def take(self, size: int) -> bytes:
        """`size` random bytes."""
        if self._pos + size > len(self._bytes):
            self._bytes = os.urandom(_RANDOM_BYTES)
            self._pos = 0
        self._pos += size
        return self._bytes[self._pos - size : self._pos]

    def room(self) -> int:
        while True:
            room = int.from_bytes(self.take(8), "little") >> 1
            if room < _ROOM_LIMIT:
                return room


_random = _Random()


def new_request_id() -> bytes:
    """32 random hexadecimal digits."""
    return _random.take(16).hex().encode()


def _prompt_of(endpoint: Endpoint, fields: _Fields) -> Raw | None:
    for name in _PROMPT_FIELDS[endpoint]:
        value: Raw = getattr(fields, name)
        if is_given(value):
            return value
    return None


def is_given(value: Raw) -> bool:
    """Whether a field is there and not null."""
    view = memoryview(value)
    return view.nbytes > 0 and not (view.nbytes == 4 and view.tobytes() == b"null")


def _batch_size(prompt: Raw | None) -> int | None:
    """Prompts in a list of texts or of token lists; None for a text, one token list, or nothing.

    Embeddings of one prompt are a list of lists of floats, which is told from a batch by its depth.
    """
    if prompt is None:
        return None
    start = bytes(memoryview(prompt)[:64]).translate(None, b" \t\r\n")
    if not start.startswith((b'["', b"[[")):
        return None
    items: list[Raw] = msgspec.json.decode(prompt, type=list[Raw])
    if start.startswith(b"[[") and not start.startswith(b"[[["):
        inner = bytes(items[0])
        if b"." in inner or b"e" in inner or b"E" in inner:
            return None
    return len(items) or None
