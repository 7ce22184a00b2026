"""A chunk's payload where it lies in memory, sent or received piece by piece and summed up on its way.

There are two kinds. `ViewVector` is Python, and works with everything that takes or gives bytes. A `NativeVector` needs
a descriptor that the kernel can write to and read from (TCP without TLS): one call moves as much as the socket takes or
has, without an object for each page, and other threads run meanwhile. It needs the module `_vectored`, which pip builds
from C where there is a compiler, and xxhash's own functions; `why_not_native` says what is missing."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import numpy as np
import xxhash

from sglang_prfaas.transport import memory
from sglang_prfaas.transport.memory import Buffer, HostBuffer, Indices
from sglang_prfaas.transport.views import cut, split

SEND_BYTES = 1 << 20
"""Summed up and handed over at a time: so much stays in a core's cache in between."""
RECEIVE_BYTES = 512 << 10
"""Received in one call, and summed up before the next."""
NATIVE_SEND_BYTES = 256 << 10
"""As `SEND_BYTES`, of a native vector, whose calls cost less."""
NATIVE_RECEIVE_BYTES = 384 << 10
INTERFACE = 1
"""The `_vectored` that this was written for."""
_UPDATE = "XXH3_64bits_update"
_FUNCTIONS = (
    "XXH3_createState",
    "XXH3_freeState",
    "XXH3_64bits_reset_withSeed",
    _UPDATE,
    "XXH3_64bits_digest",
)
"""Of xxhash.h, in the order in which `_vectored.use` takes them."""
_ONE_ITEM = np.zeros(1, np.int64)
"""Its slot, in memory that is that item."""


class Sink(Protocol):
    """Takes bytes and never waits: a connection."""

    def send(self, views: list[memoryview], *, more: bool = False) -> int:
        """Take bytes; returns how many, 0 where it would have to wait."""

    def send_with(self, act: Callable[[int], int]) -> int:
        """Have `act` send through the descriptor it is given; returns what it returns, as `send`. Only for native
        vectors."""


class Source(Protocol):
    """Gives bytes and never waits: a connection."""

    def receive(self, views: list[memoryview]) -> int | None:
        """Fill views from the front. Returns how many bytes came, 0 at the end, None for none yet."""

    def receive_with(self, act: Callable[[int], int | None]) -> int | None:
        """Have `act` receive from the descriptor it is given; returns what it returns, as `receive`. Only for native
        vectors."""


class Vector(Protocol):
    """Bytes to be moved once, from the first to the last, in one direction."""

    @property
    def nbytes(self) -> int:
        """Yet to move."""

    def push(self, sink: Sink, before: list[memoryview]) -> int:
        """Send `before`, a few bytes, and what follows, which is not nothing; returns how many bytes of all those were
        taken. More is to come after them."""

    def pull(self, source: Source, after: memoryview) -> int | None:
        """Receive what is missing, and then `after`, until less comes than there is room for; returns as
        `Source.receive`."""

    def put(self, data: memoryview) -> int:
        """Bytes that came already; returns how many were missing."""

    def digest(self) -> int:
        """The checksum of what has moved: xxh3-64. Of one with a seed."""


class ViewVector:
    """See `Vector`. seed: of the checksum, None for none."""

    __slots__ = ("_left", "_pieces", "_sum", "_summed", "nbytes")

    def __init__(self, views: list[memoryview], seed: int | None = None) -> None:
        self.nbytes = sum(map(len, views))
        self._left = views
        self._pieces: list[tuple[list[memoryview], int]] = []
        """In reverse; none before the first is moved."""
        self._sum = None if seed is None else xxhash.xxh3_64(seed=seed)
        self._summed = False
        """Whether the next piece is in the sum already: it did not leave whole."""

    def push(self, sink: Sink, before: list[memoryview]) -> int:
        total, prefix = 0, sum(map(len, before))
        while self.nbytes:
            views, nbytes = self._next(SEND_BYTES)
            if not self._summed:
                self._summed = True
                self._sum_up(views)
            sent = sink.send([*before, *views], more=True)
            total += sent
            if sent < prefix:
                break
            self._moved(sent - prefix)
            if sent < prefix + nbytes:
                break
            before, prefix = [], 0
        return total

    def pull(self, source: Source, after: memoryview) -> int | None:
        total = 0
        while True:
            views, nbytes = self._next(RECEIVE_BYTES)
            last = nbytes == self.nbytes
            count = source.receive([*views, after] if last else views)
            if not count:
                return total or count
            own = min(count, nbytes)
            if own < nbytes:
                self._sum_up(split(views, own)[0])
            else:
                self._sum_up(views)
            self._moved(own)
            total += count
            if last or count < nbytes:
                return total

    def put(self, data: memoryview) -> int:
        total = 0
        while self.nbytes and len(data):
            view = self._next(RECEIVE_BYTES)[0][0]
            part = data[: len(view)]
            view[: len(part)] = part
            self._sum_up([part])
            self._moved(len(part))
            data = data[len(part) :]
            total += len(part)
        return total

    def digest(self) -> int:
        if self._sum is None:
            raise RuntimeError("this vector makes no checksum")
        result: int = self._sum.intdigest()
        return result

    def _next(self, limit: int) -> tuple[list[memoryview], int]:
        if not self.nbytes:
            return [], 0
        if not self._pieces:
            self._pieces = cut(self._left, limit)
            self._pieces.reverse()
        return self._pieces[-1]

    def _sum_up(self, views: list[memoryview]) -> None:
        if self._sum is not None:
            take = self._sum.update
            for view in views:
                take(view)

    def _moved(self, count: int) -> None:
        """So much of the next piece has moved."""
        if not self.nbytes:
            return
        self.nbytes -= count
        views, nbytes = self._pieces[-1]
        if count < nbytes:
            self._pieces[-1] = split(views, count)[1], nbytes - count
        else:
            self._pieces.pop()
            self._summed = False


NativeVector = Callable[[memoryview, Indices, int, int, int, int | None], Vector]
"""Memory, rows, bytes of an item, first byte, bytes, seed: as `_vectored.Vector`."""


def _native() -> tuple[NativeVector | None, str]:
    """The constructor of native vectors, or None and why there are none."""
    try:
        from sglang_prfaas.transport import _vectored
    except ImportError as error:
        return (
            None,
            f"the module _vectored is not there ({error}); with a C compiler and Python's headers, pip builds it",
        )
    if getattr(_vectored, "INTERFACE", 0) != INTERFACE:
        return None, "the module _vectored was built from another version of its source; install this one again"
    if why_not := _borrow_xxh3(_vectored):
        return None, why_not

    class Native(_vectored.Vector):
        __slots__ = ()

        def push(self, sink: Sink, before: list[memoryview]) -> int:
            prefix = before[0] if len(before) == 1 else b"".join(before)
            return sink.send_with(lambda descriptor: self.send(descriptor, prefix, NATIVE_SEND_BYTES))

        def pull(self, source: Source, after: memoryview) -> int | None:
            return source.receive_with(lambda descriptor: self.receive(descriptor, after, NATIVE_RECEIVE_BYTES))

    data = memoryview(bytes(range(256)) * 16)
    vector = Native(bytearray(len(data)), _ONE_ITEM, len(data), 0, len(data), 1)
    vector.put(data)
    if vector.digest() != xxhash.xxh3_64_intdigest(data, seed=1):
        return None, f"xxhash {xxhash.VERSION}: its functions make other checksums than its objects"
    return Native, ""


def _borrow_xxh3(native: ModuleType) -> str:
    """Give the module the functions of xxhash's own library; returns why that is not possible."""
    try:
        library = ctypes.CDLL(str(importlib.import_module("xxhash._xxhash").__file__))
        functions = {name: getattr(library, name) for name in _FUNCTIONS}
    except (AttributeError, ImportError, OSError) as error:
        return f"xxhash {xxhash.VERSION} does not export its functions ({error})"
    # The one that takes the widest instructions this processor has, where the library brings it.
    functions[_UPDATE] = getattr(library, f"{_UPDATE}_dispatch", functions[_UPDATE])
    native.use(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions.values()))
    return ""


_native_vector, why_not_native = _native()
"""why_not_native: empty where there are native vectors."""


def of_items(
    buffer: Buffer, indices: Indices, first_item: int, offset: int, nbytes: int, seed: int | None, *, native: bool
) -> Vector | None:
    """Bytes `offset` to `offset + nbytes` of a request's stream where they lie (see `Buffer.gather`); None where that
    is not possible, or would cost more than a copy. native: a native one, where there are such."""
    if native and _native_vector is not None and isinstance(buffer, HostBuffer):
        size = buffer.item_bytes
        item, start = divmod(offset, size)
        last = (offset + nbytes - 1) // size
        if nbytes < memory.MIN_VIEW_BYTES * (last - item + 1):
            return None
        rows = indices[item - first_item : last - first_item + 1]
        return _native_vector(buffer.bytes, rows, size, start, nbytes, seed)
    views = buffer.views(indices, first_item, offset, nbytes)
    return ViewVector(views, seed) if views else None


def of_bytes(data: memoryview, seed: int | None, *, native: bool) -> Vector:
    """Bytes that lie end to end."""
    if native and _native_vector is not None:
        return _native_vector(data, _ONE_ITEM, len(data), 0, len(data), seed)
    return ViewVector([data], seed)
