"""Packing in Triton against torch: the same bytes."""

import pytest
import torch
from prfaas_kernels.kv_pack import PoolTable, pack_rows, quantise_rows, unpack_rows

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


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_rows_equal_torch_and_come_back_close(code, dtype, monkeypatch):
    pools = pools_of(dtype)
    pools[1][3] = 0
    table = PoolTable.of(pools, page_size=PAGE)
    got = quantise_rows(table, pages(2, 0), width=WIDTH, code=code)
    back = [torch.zeros_like(pool) for pool in pools]
    unpack_rows(PoolTable.of(back, page_size=PAGE), pages(2, 0), got)
    with monkeypatch.context() as patch:
        patch.setattr("prfaas_kernels.kv_pack.pack._on_triton", lambda device: False)
        want = quantise_rows(table, pages(2, 0), width=WIDTH, code=code)
    assert torch.equal(got.scales, want.scales)
    # A quotient may differ by a rounding between devices, and then fall to the neighbouring code.
    assert (got.codes.float() != want.codes.float()).float().mean() <= 0.01
    for got_pool, pool in zip(back, pools, strict=True):
        rows = [*range(PAGE), *range(2 * PAGE, 3 * PAGE)]
        limit = pool[rows].float().abs().amax(-1, keepdim=True) * (0.01 if code == torch.int8 else 0.07) + 1e-6
        assert ((got_pool[rows].float() - pool[rows].float()).abs() <= limit).all()


def test_pools_that_differ_are_refused():
    with pytest.raises(ValueError, match="agree in shape"):
        PoolTable.of([torch.zeros(4, 8), torch.zeros(4, 4)])
    with pytest.raises(ValueError, match="at least one pool"):
        PoolTable.of([])
    with pytest.raises(ValueError, match="whole 4-byte words"):
        PoolTable.of([torch.zeros(4, 3, dtype=torch.bfloat16)])
    with pytest.raises(ValueError, match="must be contiguous"):
        PoolTable.of([torch.zeros(4, 8, 8).mT])
