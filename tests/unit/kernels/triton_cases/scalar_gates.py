"""GDN's and Lightning's Triton kernels against the float64 recurrences."""

import prfaas_kernels.gdn.chunk_triton as gdn
import prfaas_kernels.lightning.chunk_triton as lightning
import pytest
import torch
from prfaas_kernels.gdn import GdnInputs, recurrent_gdn
from prfaas_kernels.lightning import LightningInputs, recurrent_lightning

from tests.unit.kernels.triton_cases.conftest import FULL_LIMIT, HALF_LIMIT, error, marks, on_device

H, HV, K, V = 1, 2, 32, 16
SLOPES = torch.tensor([0.003, 30.0]).view(HV, 1, 1)


def gdn_inputs(tokens, *, spikes=0.0, strength=1.0, dtype=torch.float32, heads=(H, HV), widths=(K, V)):
    rng = torch.Generator().manual_seed(0)
    (h, hv), (k_width, v_width) = heads, widths
    packed = on_device(torch.randn(1, tokens, 2 * h * k_width + hv * v_width, generator=rng).to(dtype))
    q, k, v = packed.split([h * k_width, h * k_width, hv * v_width], dim=-1)
    log_decay = -strength * torch.rand(1, tokens, hv, generator=rng)
    log_decay = torch.where(torch.rand(log_decay.shape, generator=rng) < spikes, -1000.0, log_decay)
    return {
        "q": q.unflatten(-1, (h, k_width)),
        "k": k.unflatten(-1, (h, k_width)),
        "v": v.unflatten(-1, (hv, v_width)),
        "log_decay": on_device(log_decay),
        "beta": on_device(torch.rand(1, tokens, hv, generator=rng)),
    }


def pool_of(slots, heads, *widths):
    return on_device(torch.randn(slots, heads, *widths, generator=torch.Generator().manual_seed(1)) * 0.3)


def gdn_truth(x, cu, initial):
    return recurrent_gdn(*(x[name][0].cpu() for name in x), initial_state=initial.cpu(), cu_seqlens=cu)


def run_gdn(x, cu, pool, slots, *, segment_chunks=None, **options):
    inputs = GdnInputs(
        **x, state_pool=pool, cache_indices=on_device(torch.tensor(slots)), cu_seqlens=on_device(cu), **options
    )
    return gdn.chunk_gdn(inputs, segment_chunks=segment_chunks)


def run_lightning(qkv, cu, pool, slots, *, segment_chunks=None, **options):
    inputs = LightningInputs(
        **dict(zip("qkv", qkv, strict=True)),
        slopes=SLOPES,
        state_pool=pool,
        cache_indices=on_device(torch.tensor(slots)),
        cu_seqlens=on_device(cu),
        **options,
    )
    return lightning.chunk_lightning(inputs, segment_chunks=segment_chunks)


@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 64, 65, 130])
def test_gdn_lengths(tokens):
    x, pool, cu = gdn_inputs(tokens), pool_of(4, HV, V, K), marks([tokens])
    want, want_state = gdn_truth(x, cu, pool[2:3])
    out, _ = run_gdn(x, cu, pool, [2])
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[2], want_state[0]) < FULL_LIMIT


@pytest.mark.parametrize(("strength", "spikes"), [(0.01, 0.0), (50.0, 0.0), (0.1, 0.05)])
def test_gdn_gates(strength, spikes):
    x, pool, cu = gdn_inputs(130, strength=strength, spikes=spikes), pool_of(4, HV, V, K), marks([130])
    want, want_state = gdn_truth(x, cu, pool[2:3])
    out, _ = run_gdn(x, cu, pool, [2])
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[2], want_state[0]) < FULL_LIMIT


def test_gdn_in_bfloat16_with_four_value_heads_per_key_head():
    x = gdn_inputs(130, dtype=torch.bfloat16, heads=(1, 4), widths=(128, 64))
    pool, cu = pool_of(2, 4, 64, 128), marks([130])
    want, want_state = gdn_truth(x, cu, pool[1:2])
    out, _ = run_gdn(x, cu, pool, [1])
    assert error(out[0], want) < HALF_LIMIT
    assert error(pool[1], want_state[0]) < HALF_LIMIT


def test_gdn_ragged_batch_states_and_a_pool_left_alone():
    lengths = [17, 64, 1, 130]
    cu, x, pool = marks(lengths), gdn_inputs(sum(lengths)), pool_of(5, HV, V, K)
    initial, before = pool[[4, 3, 1, 2]].clone(), pool.clone()
    initial[1] = 0
    want, want_state = gdn_truth(x, cu, initial)
    out, _ = run_gdn(x, cu, pool, [4, -1, 1, 2], store_state=False)
    assert torch.equal(pool, before)
    track = on_device(torch.zeros(4, HV, V, K))
    chunks = on_device(torch.tensor([-1, 0, -1, 2], dtype=torch.int32))
    again, starts = run_gdn(
        x, cu, pool, [4, -1, 1, 2], return_chunk_states=True, track_state=track, track_chunk_idx=chunks
    )
    assert torch.equal(out, again)
    assert error(out[0], want) < FULL_LIMIT
    assert all(error(pool[slot], want_state[n]) < FULL_LIMIT for n, slot in ((0, 4), (2, 1), (3, 2)))
    assert torch.equal(pool[[0, 3]], before[[0, 3]])
    assert starts.shape == (1, 1 + 1 + 1 + 3, HV, V, K)
    torch.testing.assert_close(starts[0, [0, 2, 3]], initial[[0, 2, 3]])
    torch.testing.assert_close(track[[1, 3]], starts[0, [1, 5]])
    assert not track[[0, 2]].any()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightning_lengths(tokens, dtype):
    rng = torch.Generator().manual_seed(0)
    qkv = [on_device(torch.randn(tokens, HV, K, generator=rng).to(dtype)) for _ in range(3)]
    pool, cu = pool_of(4, HV, K, K), marks([tokens])
    want, want_state = recurrent_lightning(*(x.cpu() for x in qkv), SLOPES, initial_state=pool[2:3].cpu())
    out = run_lightning(qkv, cu, pool, [2])
    limit = FULL_LIMIT if dtype == torch.float32 else HALF_LIMIT
    assert error(out, want) < limit
    assert error(pool[2], want_state[0]) < limit


def test_lightning_ragged_batch_cold_and_warm_with_a_tracked_state():
    lengths = [17, 64, 1, 200]
    cu, pool, rng = marks(lengths), pool_of(6, HV, K, K), torch.Generator().manual_seed(0)
    qkv = [on_device(torch.randn(sum(lengths), HV, K, generator=rng)) for _ in range(3)]
    initial, before = pool[[4, 3, 1, 2]].cpu(), pool.clone()
    initial[[1, 2]] = 0  # slot -1, and a cold slot
    cpu = [x.cpu() for x in qkv]
    want, want_state = recurrent_lightning(*cpu, SLOPES, initial_state=initial, cu_seqlens=cu)
    out = run_lightning(
        qkv,
        cu,
        pool,
        [4, -1, 1, 2],
        has_initial_state=on_device(torch.tensor([True, True, False, True])),
        track_lens=on_device(torch.tensor([0, 0, 0, 128])),
        track_slots=on_device(torch.tensor([-1, -1, -1, 5])),
    )
    assert error(out, want) < FULL_LIMIT
    assert all(error(pool[slot], want_state[n]) < FULL_LIMIT for n, slot in ((0, 4), (2, 1), (3, 2)))
    assert torch.equal(pool[[0, 3]], before[[0, 3]])
    rows = slice(sum(lengths) - 200, sum(lengths) - 200 + 128)
    _, tracked = recurrent_lightning(*(x[rows] for x in cpu), SLOPES, initial_state=initial[3:4])
    assert error(pool[5], tracked[0]) < FULL_LIMIT


@pytest.mark.parametrize("cut", [64, 100])
def test_split_prefills_in_a_strided_pool_equal_one(cut):
    """GDN and Lightning; slots lie among those of other layers."""
    rng = torch.Generator().manual_seed(0)
    x = gdn_inputs(130)
    qkv = [on_device(torch.randn(130, HV, K, generator=rng)) for _ in range(3)]

    def gdn_part(rows, pool):
        piece = {name: value[:, rows] for name, value in x.items()}
        return run_gdn(piece, marks([rows.stop - rows.start]), pool, [1])[0][0]

    def lightning_part(rows, pool):
        return run_lightning([y[rows] for y in qkv], marks([rows.stop - rows.start]), pool, [1])

    for part, widths in ((gdn_part, (V, K)), (lightning_part, (K, K))):
        whole = pool_of(3, HV, *widths)
        wide = on_device(torch.full((3, 2, HV, *widths), float("nan")))
        wide[:, 1] = whole
        want = part(slice(0, 130), whole)
        got = torch.cat([part(rows, wide[:, 1]) for rows in (slice(0, cut), slice(cut, 130))])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wide[:, 1], whole, rtol=1e-4, atol=1e-5)
        assert wide[:, 0].isnan().all()
