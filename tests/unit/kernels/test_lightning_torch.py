"""Chunked Lightning attention in torch against the float64 recurrence."""

import pytest
import torch
from prfaas_kernels.lightning import LightningInputs, chunk_lightning, lightning_step, recurrent_lightning

H, D = 4, 16
SLOPES = torch.tensor([0.0, 0.003, 0.5, 30.0]).view(H, 1, 1)
LIMIT = 1e-5


def _inputs(tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, H, D, generator=rng) for _ in range(3))


def _pool(slots=5):
    return torch.randn(slots, H, D, D, generator=torch.Generator().manual_seed(1))


def _run(q, k, v, slopes, **options):
    return chunk_lightning(LightningInputs(q=q, k=k, v=v, slopes=slopes, **options))


def _error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 127, 130])
def test_one_sequence_of_any_length(tokens):
    qkv, pool, cu = _inputs(tokens), _pool(), torch.tensor([0, tokens])
    want, want_state = recurrent_lightning(*qkv, SLOPES, initial_state=pool[2:3])
    out = _run(*qkv, SLOPES, state_pool=pool, cache_indices=torch.tensor([2]), cu_seqlens=cu)
    assert _error(out, want) < LIMIT
    assert _error(pool[2], want_state[0]) < LIMIT


def test_ragged_batch_cold_and_warm_with_a_tracked_state():
    lengths = [17, 64, 1, 200]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    qkv, pool = _inputs(sum(lengths)), _pool(6)
    initial = pool[[4, 3, 1, 2]].clone()
    initial[[1, 2]] = 0  # slot -1, and a cold slot
    before = pool.clone()
    want, want_state = recurrent_lightning(*qkv, SLOPES, initial_state=initial, cu_seqlens=cu)
    out = _run(
        *qkv,
        SLOPES,
        state_pool=pool,
        cache_indices=torch.tensor([4, -1, 1, 2]),
        cu_seqlens=cu,
        has_initial_state=torch.tensor([True, True, False, True]),
        track_lens=torch.tensor([0, 0, 0, 128]),
        track_slots=torch.tensor([-1, -1, -1, 5]),
    )
    assert _error(out, want) < LIMIT
    assert all(_error(pool[slot], want_state[n]) < LIMIT for n, slot in ((0, 4), (2, 1), (3, 2)))
    assert torch.equal(pool[[0, 3]], before[[0, 3]])
    rows = slice(sum(lengths) - 200, sum(lengths) - 200 + 128)
    _, tracked = recurrent_lightning(*(x[rows] for x in qkv), SLOPES, initial_state=initial[3:4])
    assert _error(pool[5], tracked[0]) < LIMIT


def test_split_prefill_and_steps_equal_one_prefill():
    qkv, whole, parts, slots = _inputs(130), _pool(), _pool(), torch.tensor([1])
    want = _run(*qkv, SLOPES, state_pool=whole, cache_indices=slots, cu_seqlens=torch.tensor([0, 130]))
    head = (x[:100] for x in qkv)
    out = _run(*head, SLOPES, state_pool=parts, cache_indices=slots, cu_seqlens=torch.tensor([0, 100]))
    torch.testing.assert_close(out, want[:100], rtol=1e-4, atol=1e-4)
    for t in range(100, 130):
        step = lightning_step(*(x[t : t + 1] for x in qkv), SLOPES, state_pool=parts, cache_indices=slots)
        torch.testing.assert_close(step[0], want[t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_a_tracked_length_off_the_grid_is_refused():
    with pytest.raises(ValueError, match="multiple of 64 below 70 tokens, got 50"):
        _run(
            *_inputs(70),
            SLOPES,
            state_pool=_pool(),
            cache_indices=torch.tensor([0]),
            cu_seqlens=torch.tensor([0, 70]),
            track_lens=torch.tensor([50]),
            track_slots=torch.tensor([1]),
        )
