"""A table of pools of equal shape, one per layer, addressed by row."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PoolTable(NamedTuple):
    """``pools``: L tensors ``[rows, ...]`` of one dtype whose rows are contiguous; a row is a page or a slot.

    ``addresses`` ``[L]`` int64 on their device; ``strides_bytes`` ``[L]`` int64: from row to row, per pool.
    ``row_bytes``: the same for all. ``aligned``: whether all addresses, strides and rows are multiples of 16 bytes.
    """

    pools: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    strides_bytes: torch.Tensor
    row_bytes: int
    aligned: bool

    @classmethod
    def of(cls, pools: list[torch.Tensor], *, page_size: int = 1) -> PoolTable:
        """``pools`` ``[rows * page_size, ...]`` each: with pages, row r is the tokens from ``r * page_size``.

        Raises ValueError where shapes, dtypes or devices differ, rows are not contiguous or not of whole 4-byte words.
        """
        if not pools:
            raise ValueError("expected at least one pool, got none")
        if page_size > 1:
            pools = [pool.unflatten(0, (-1, page_size)) for pool in pools]
        head = pools[0]
        row_bytes = head[0].numel() * head.element_size()
        for pool in pools:
            if pool.shape[1:] != head.shape[1:] or pool.dtype != head.dtype or pool.device != head.device:
                raise ValueError(
                    f"pools must agree in shape, dtype and device: {tuple(pool.shape)} {pool.dtype} {pool.device}"
                    f" against {tuple(head.shape)} {head.dtype} {head.device}"
                )
            if not pool[0].is_contiguous():
                raise ValueError(f"the rows of a pool must be contiguous, got strides {pool.stride()}")
        strides = [pool.stride(0) * pool.element_size() for pool in pools]
        addresses = [pool.data_ptr() for pool in pools]
        if any(n % 4 for n in (row_bytes, *strides, *addresses)):
            raise ValueError(f"rows must be whole 4-byte words, got {row_bytes} bytes at strides {strides}")
        return cls(
            pools=tuple(pools),
            addresses=torch.tensor(addresses, dtype=torch.int64, device=head.device),
            strides_bytes=torch.tensor(strides, dtype=torch.int64, device=head.device),
            row_bytes=row_bytes,
            aligned=not any(n % 16 for n in (row_bytes, *strides, *addresses)),
        )
