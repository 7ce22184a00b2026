"""Which sequence and which of its chunks each program of a launch works on; built on the device, no host sync.

With N packed sequences over T tokens and chunks of C tokens, the number of chunks is at most ``T // C + N``: launches
use that bound, and programs past the real number leave at once. So lengths may change inside a captured CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 64


class ChunkTable(NamedTuple):
    """``chunks`` ``[bound, 2]`` int32: (sequence, chunk in it), or (-1, -1) for unused rows;
    ``first`` ``[N]`` int32: row of each sequence's chunk 0; ``bound``: rows of ``chunks``; ``cu_seqlens`` ``[N+1]``.
    """

    chunks: torch.Tensor
    first: torch.Tensor
    bound: int
    cu_seqlens: torch.Tensor


@triton.jit
def chunk_table_kernel(cu_seqlens, chunks, first, sequences, bound, chunk, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Grid (N + 1): program n writes the rows of sequence n; the last one clears the unused rows."""
    n = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    before = ids < n
    begins = tl.load(cu_seqlens + ids, mask=before, other=0).to(tl.int32)
    ends = tl.load(cu_seqlens + ids + 1, mask=before, other=0).to(tl.int32)
    row = tl.sum((ends - begins + chunk - 1) // chunk)
    steps = tl.arange(0, ROWS)
    if n < sequences:
        length = tl.load(cu_seqlens + n + 1).to(tl.int32) - tl.load(cu_seqlens + n).to(tl.int32)
        count = (length + chunk - 1) // chunk
        tl.store(first + n, row)
        for at in range(0, count, ROWS):
            index = at + steps
            place = chunks + 2 * (row + index)
            tl.store(place, tl.zeros([ROWS], tl.int32) + n, mask=index < count)
            tl.store(place + 1, index, mask=index < count)
    else:
        for at in range(row, bound, ROWS):
            index = at + steps
            tl.store(chunks + 2 * index, tl.full([ROWS], -1, tl.int32), mask=index < bound)
            tl.store(chunks + 2 * index + 1, tl.full([ROWS], -1, tl.int32), mask=index < bound)


def build_chunk_table(cu_seqlens: torch.Tensor, total_tokens: int, chunk: int = CHUNK) -> ChunkTable:
    """``cu_seqlens`` ``[N+1]`` int32 or int64 on the launch's device, rising from 0 to at most ``total_tokens``.

    ``chunk``: tokens of a chunk.
    """
    sequences = cu_seqlens.shape[0] - 1
    bound = -(-total_tokens // chunk) if sequences == 1 else total_tokens // chunk + sequences
    chunks = torch.empty(max(bound, 1), 2, dtype=torch.int32, device=cu_seqlens.device)
    first = torch.empty(max(sequences, 1), dtype=torch.int32, device=cu_seqlens.device)
    block = triton.next_power_of_2(max(sequences, 1))
    chunk_table_kernel[(sequences + 1,)](cu_seqlens, chunks, first, sequences, bound, chunk, BLOCK=block, ROWS=128)
    return ChunkTable(chunks, first, bound, cu_seqlens)


def real_chunks(cu_seqlens: torch.Tensor) -> int:
    """Chunks in use. Waits for the device."""
    return int(((cu_seqlens.diff() + CHUNK - 1) // CHUNK).sum())
