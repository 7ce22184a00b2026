from typing import Any, Self

INTERFACE: int
"""What vector.py must be made for."""

class Vector:
    """`nbytes` bytes of the items of `item_bytes` bytes that lie at `rows` (int64) in `memory`, from byte `start` of
    the first; what they are is said in vector.py. seed: of the checksum, None for none. Raises ValueError for a row
    outside of the memory. One thread at a time may move one."""

    def __new__(
        cls, memory: Any, rows: Any, item_bytes: int, start: int, nbytes: int, seed: int | None = None
    ) -> Self: ...
    @property
    def nbytes(self) -> int: ...
    def send(self, descriptor: int, before: bytes | memoryview, piece_bytes: int) -> int:
        """Returns how many bytes of `before` and the rest the socket took, 0 where it would have to wait, or nothing is
        left. Raises OSError."""
    def receive(self, descriptor: int, after: memoryview, piece_bytes: int) -> int | None:
        """Returns how many bytes came for the rest and `after`, 0 at the end, None where it would have to wait. Raises
        OSError, and TypeError for memory that is only to be read."""
    def put(self, data: memoryview) -> int: ...
    def digest(self) -> int: ...

def use(create_state: int, free_state: int, reset_with_seed: int, update: int, digest: int) -> None:
    """Addresses of xxh3's functions. To be called first."""
