"""The quantised row format, byte by byte, and what it costs in precision."""

import struct

import pytest
import torch
from prfaas_kernels.kv_pack import (
    PoolTable,
    decode_rows,
    dequantise_rows,
    encode_rows,
    encoded_row_bytes,
    quantise_rows,
)

CODES = [torch.int8, torch.float8_e4m3fn]


def test_int8_bytes():
    row = torch.tensor([[1.0, -2.0, 0.0, 0.25, 254.0, 3.0]])
    (got,) = encode_rows(row, width=3, code=torch.int8).tolist()
    codes = [64, 256 - 127, 0, 0, 127, 2]  # of 63.5, -127, 0; 0.125, 127, 1.5
    scales = struct.pack("<2f", *(torch.tensor([2.0, 254.0]) / 127).tolist())
    assert bytes(got) == bytes(codes) + b"\0\0" + scales
    assert len(got) == encoded_row_bytes(6, 3) == 16


def test_float8_bytes():
    row = torch.tensor([[448.0, -1.0, 0.0625, 0.001953125, -0.0001, 17.0, 18.0, 300.0]])
    (got,) = encode_rows(row, width=8, code=torch.float8_e4m3fn).tolist()
    codes = [0x7E, 0xB8, 0x18, 0x01, 0x00, 0x58, 0x59, 0x79]  # 17 is a tie and goes to the even 16
    assert bytes(got) == bytes(codes) + struct.pack("<f", 1.0)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("value", "scale", "decoded"), [(0.0, 1.0, 0.0), (2.0**-101, 1.0, 0.0), (float("inf"), None, None)]
)
def test_groups_without_a_scale(code, value, scale, decoded):
    row = torch.tensor([[value, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    data = encode_rows(row, width=4, code=code)
    assert not data[0, :4].any()
    got = data[0, 8:12].clone().view(torch.float32).item()
    back = decode_rows(data, elements=8, width=4, code=code, dtype=torch.float32)
    if scale is None:
        assert bytes(data[0, 8:12].tolist()) == bytes.fromhex("0000c07f")
        assert back[0, :4].isnan().all()
    else:
        assert got == scale
        assert (back[0, :4] == decoded).all()
    assert back[0, 4] == 1.0


@pytest.mark.parametrize(("code", "worst"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_stays_under_half_a_step(code, worst, dtype):
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    data = encode_rows(x, width=576, code=code)
    back = decode_rows(data, elements=576, width=576, code=code, dtype=dtype)
    assert back.dtype == dtype
    bound = x.float().abs().amax(-1, keepdim=True) * worst + x.float().abs() * torch.finfo(dtype).eps
    assert ((back.float() - x.float()).abs() <= bound).all()
    again = encode_rows(
        decode_rows(data, elements=576, width=576, code=code, dtype=torch.float32), width=576, code=code
    )
    assert torch.equal(again[:, :576], data[:, :576])


@pytest.mark.parametrize("code", CODES)
def test_pools_without_triton_hold_what_the_codec_says(code):
    pools = [torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(seed)).half() for seed in range(2)]
    indices = torch.tensor([4, -1, 1])
    data = quantise_rows(PoolTable.of(pools), indices, width=4, code=code)
    assert data.shape == (2, 3, encoded_row_bytes(8, 4))
    for layer, pool in enumerate(pools):
        assert torch.equal(data[layer, [0, 2]], encode_rows(pool[[4, 1]].reshape(2, 8), width=4, code=code))
    targets = [torch.zeros_like(pool) for pool in pools]
    dequantise_rows(PoolTable.of(targets), torch.tensor([0, 5, -1]), data, width=4, code=code)
    for target, pool in zip(targets, pools, strict=True):
        torch.testing.assert_close(target[0], pool[4], rtol=0.07, atol=0.02)
        assert not target[1:].any()


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="must divide the 8 elements of a row, got 3"):
        encode_rows(x, width=3, code=torch.int8)
    with pytest.raises(ValueError, match=r"expected int8 or float8_e4m3fn as code, got torch\.float16"):
        encode_rows(x, width=4, code=torch.float16)
    with pytest.raises(ValueError, match="expected uint8 rows of 16 bytes"):
        decode_rows(torch.zeros(1, 12, dtype=torch.uint8), elements=8, width=4, code=torch.int8, dtype=torch.float32)
