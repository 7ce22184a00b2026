"""The quantised row format, and its encoder and decoder in torch for any device; the kernels equal them bit by bit.

A row of E elements (a page of one layer, a state) is cut into G = E / width groups: tokens of MLA latents, say, or the
(head, V row) pairs of a state. All numbers are little-endian::

    byte 0 .. E - 1                      one code for each element, in their order
    then zeros to a multiple of 4 bytes
    then 4 G bytes                       one float32 scale for each group

Encoding a group, in float32 with IEEE rounding to nearest even (bfloat16 and float16 convert exactly):

1. m = max |x|. If an element is infinite or NaN: scale = NaN (0x7FC00000), all codes 0. If m < 2^-100: scale = 1,
   codes 0.
2. scale = m / L, with L = 127 for int8 and 448 for float8_e4m3fn; q = x / scale.
3. int8: floor(q + 0.5), in two's complement. float8_e4m3fn: q rounded to nearest even, with zero always 0x00.

Decoding: code * scale in float32, rounded to nearest even in the pool's dtype.
"""

from __future__ import annotations

import torch

#: Largest magnitude of each code.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: Groups whose magnitudes are all below this count as zeros, so that no scale is subnormal.
TINY = 2.0**-100
SCALE_BYTES = 4
#: Smallest subnormal of float8_e4m3fn.
SMALLEST_E4M3 = 2.0**-9


def scales_offset_bytes(elements: int) -> int:
    """Where the scales of a row of ``elements`` begin."""
    return -(-elements // SCALE_BYTES) * SCALE_BYTES


def encoded_row_bytes(elements: int, width: int) -> int:
    """Bytes of an encoded row. Raises ValueError where ``width`` does not divide ``elements``."""
    if width < 1 or elements % width:
        raise ValueError(f"the width of a group must divide the {elements} elements of a row, got {width}")
    return scales_offset_bytes(elements) + elements // width * SCALE_BYTES


def check_code(code: torch.dtype) -> None:
    """Raises ValueError for a dtype that is no code."""
    if code not in LARGEST:
        raise ValueError(f"expected int8 or float8_e4m3fn as code, got {code}")


def encode_rows(x: torch.Tensor, *, width: int, code: torch.dtype) -> torch.Tensor:
    """``x`` ``[R, E]`` bfloat16, float16 or float32 to ``[R, encoded_row_bytes(E, width)]`` uint8.

    Raises ValueError where ``width`` does not divide E or ``code`` is neither int8 nor float8_e4m3fn.
    """
    check_code(code)
    rows, elements = x.shape
    data = torch.zeros(rows, encoded_row_bytes(elements, width), dtype=torch.uint8, device=x.device)
    groups = x.float().reshape(rows, elements // width, width)
    largest = groups.abs().amax(-1)  # NaN where an element is
    finite = torch.isfinite(largest)
    usual = finite & (largest >= TINY)
    scale = torch.where(usual, largest / LARGEST[code], torch.where(finite, 1.0, torch.nan))
    quotient = groups / scale.unsqueeze(-1)
    if not bool(usual.all()):
        quotient = torch.where(usual.unsqueeze(-1), quotient, 0.0)
    if code == torch.int8:
        codes = quotient.add_(0.5).floor_().to(torch.int8).view(torch.uint8)
    else:
        # What is not above half of the smallest subnormal becomes zero, which then has no sign.
        codes = torch.nn.functional.hardshrink(quotient, SMALLEST_E4M3 / 2).to(code).view(torch.uint8)
    data[:, :elements] = codes.reshape(rows, elements)
    data[:, scales_offset_bytes(elements) :] = scale.view(torch.uint8)
    return data


def decode_rows(
    data: torch.Tensor, *, elements: int, width: int, code: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """``data`` ``[R, encoded_row_bytes(elements, width)]`` uint8 to ``[R, elements]`` in ``dtype``.

    Raises ValueError where the size of ``data`` is another.
    """
    check_code(code)
    rows, size = data.shape[0], encoded_row_bytes(elements, width)
    if data.dtype != torch.uint8 or data.shape != (rows, size):
        raise ValueError(f"expected uint8 rows of {size} bytes, got {data.dtype} {tuple(data.shape)}")
    codes = data[:, :elements].contiguous().view(code).reshape(rows, elements // width, width)
    scales = data[:, scales_offset_bytes(elements) :].contiguous().view(torch.float32)
    values = codes.float() if code == torch.int8 or data.device.type != "cpu" else _e4m3_values(codes)
    return values.mul_(scales.unsqueeze(-1)).to(dtype).reshape(rows, elements)


def _e4m3_values(codes: torch.Tensor) -> torch.Tensor:
    """`codes.float()` for float8_e4m3fn, several times as fast on a CPU: their bits, moved to those of a float16 of
    another exponent bias, whose conversion is vectorised."""
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values = bits.view(torch.float16).float().mul_(256.0)
    if values.numel() and bool(values.abs().amax() > LARGEST[torch.float8_e4m3fn]):
        return codes.float()  # there is a NaN among them
    return values
