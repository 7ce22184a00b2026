"""Packing in Triton against torch: the same bytes."""

import pytest
import torch
from prfaas_kernels.kv_pack import (
    PoolTable,
    decode_rows,
    dequantise_rows,
    encode_rows,
    pack_rows,
    quantise_rows,
    unpack_rows,
)

from tests.unit.kernels.triton_cases.conftest import on_device

LAYERS, TOKENS, PAGE, WIDTH = 3, 12, 4, 24


def pools_of(dtype=torch.bfloat16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [on_device(torch.randn(TOKENS, 1, WIDTH, generator=rng).to(dtype)) for _ in range(LAYERS)]


def pages(*ids):
    return on_device(torch.tensor(ids, dtype=torch.int32))


@pytest.mark.parametrize("width", [WIDTH, 6])
def test_pages_of_all_layers_and_back(width):
    pools = [pool[:, :, :width].contiguous() for pool in pools_of()]
    table = PoolTable.of(pools, page_size=PAGE)
    packed = pack_rows(table, pages(2, 0))
    want = torch.stack([pool.unflatten(0, (-1, PAGE))[[2, 0]].reshape(2, -1) for pool in pools])
    assert torch.equal(packed.view(torch.bfloat16), want)

    targets = [torch.full_like(pool, float("nan")) for pool in pools]
    unpack_rows(PoolTable.of(targets, page_size=PAGE), pages(1, 2), packed)
    for target, pool in zip(targets, pools, strict=True):
        assert torch.equal(target[PAGE : 2 * PAGE], pool[2 * PAGE :])
        assert torch.equal(target[2 * PAGE :], pool[:PAGE])
        assert target[:PAGE].isnan().all()


def test_strided_state_slots_and_skipped_rows():
    wide = [on_device(torch.randn(5, 2, 4, 8)) for _ in range(LAYERS)]
    states = [pool[:, 1] for pool in wide]
    before = [pool.clone() for pool in wide]
    packed = pack_rows(PoolTable.of(states), pages(4, -1, 0))
    assert torch.equal(packed[:, 0].view(torch.float32), torch.stack([s[4].flatten() for s in states]))
    assert not packed[:, 1].any()
    unpack_rows(PoolTable.of(states), pages(-1, 1, 2), packed)
    for pool, old in zip(wide, before, strict=True):
        assert torch.equal(pool[2, 1], old[0, 1])
        assert not pool[1, 1].any()
        assert torch.equal(pool[[0, 3, 4]], old[[0, 3, 4]])
        assert torch.equal(pool[:, 0], old[:, 0])


CODES = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def hard_pools(dtype):
    """Values of all magnitudes; a zero group, groups below the smallest scale, one infinite, one NaN."""
    rng = torch.Generator().manual_seed(2)
    pools = []
    for _ in range(LAYERS):
        x = torch.randn(TOKENS, 1, WIDTH, generator=rng) * torch.exp2(
            torch.randint(-12, 8, (TOKENS, 1, 1), generator=rng)
        )
        x[3] = -0.0
        x[1, 0, 5] = float("inf")
        x[2, 0, 7] = float("nan")
        x[0] *= 2.0**-120
        pools.append(on_device(x.to(dtype)))
    return pools


def same_bits(got, want):
    """Equal bit by bit; a NaN equals any NaN."""
    equal = (got.view(torch.uint8) == want.view(torch.uint8)).view(*got.shape, got.element_size()).all(-1)
    return bool((equal | (got.isnan() & want.isnan())).all())


@pytest.mark.parametrize("width", [WIDTH, 6, PAGE * WIDTH])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_equal_the_codec_bit_by_bit(code, dtype, width):
    pools, ids = hard_pools(dtype), [2, -1, 0]
    table = PoolTable.of(pools, page_size=PAGE)
    data = quantise_rows(table, pages(*ids), width=width, code=code)
    assert not data[:, 1].any()
    back = [torch.full_like(pool, 7.0) for pool in pools]
    dequantise_rows(PoolTable.of(back, page_size=PAGE), pages(1, -1, 2), data, width=width, code=code)
    for layer, (pool, target) in enumerate(zip(pools, back, strict=True)):
        rows = pool.cpu().reshape(-1, PAGE * WIDTH)[[2, 0]]
        want = encode_rows(rows, width=width, code=code)
        assert torch.equal(data[layer, [0, 2]].cpu(), want)
        values = decode_rows(want, elements=PAGE * WIDTH, width=width, code=code, dtype=dtype)
        got = target.cpu().reshape(-1, PAGE * WIDTH)
        assert same_bits(got[1:], values)
        assert (got[0] == 7.0).all()


@pytest.mark.parametrize("code", CODES)
def test_every_code_and_every_step_between_codes(code):
    """All 256 codes are read as torch reads them; values on and beside every border between codes are rounded alike."""
    size = 2048
    raw = torch.arange(size, dtype=torch.int64).remainder(256).to(torch.uint8)
    scales = torch.tensor([1.0, 0.3, 2.0**-90, -1.5]).repeat(2)
    data = torch.cat((raw, scales.view(torch.uint8))).view(1, 1, -1)
    pool = on_device(torch.zeros(1, size))
    dequantise_rows(PoolTable.of([pool]), pages(0), on_device(data), width=size // 8, code=code)
    want = decode_rows(data[0], elements=size, width=size // 8, code=code, dtype=torch.float32)
    assert same_bits(pool.cpu(), want)

    levels = raw[:256].view(code).float()
    levels = levels[levels.isfinite()].sort().values
    border = (levels[1:] + levels[:-1]) / 2
    near = [torch.nextafter(border, border + step) for step in (-1.0, 1.0)]
    x = torch.cat((levels, border, *near, torch.zeros(size - len(levels) - 3 * len(border)))).view(1, size)
    got = quantise_rows(PoolTable.of([on_device(x)]), pages(0), width=size, code=code)
    assert torch.equal(got[0].cpu(), encode_rows(x, width=size, code=code))


def test_pools_that_differ_are_refused():
    with pytest.raises(ValueError, match="agree in shape"):
        PoolTable.of([torch.zeros(4, 8), torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="at least one pool"):
        PoolTable.of([])
    with pytest.raises(ValueError, match="whole 4-byte words"):
        PoolTable.of([torch.zeros(4, 3, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="must be contiguous"):
        PoolTable.of([torch.zeros(4, 8, 8).mT])
