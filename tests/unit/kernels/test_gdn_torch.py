"""Chunked GDN in torch against the float64 recurrence."""

import pytest
import torch
from prfaas_kernels.gdn import GdnInputs, chunk_gdn, gdn_gate, gdn_step, recurrent_gdn

H, HV, K, V = 2, 4, 32, 16
LIMIT = 1e-5


def _inputs(tokens, *, gate_shift=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    a_log, dt_bias = torch.randn(HV, generator=rng) * 0.5, torch.randn(HV, generator=rng)
    return {
        "q": torch.randn(1, tokens, H, K, generator=rng),
        "k": torch.randn(1, tokens, H, K, generator=rng),
        "v": torch.randn(1, tokens, HV, V, generator=rng),
        "log_decay": gdn_gate(torch.randn(1, tokens, HV, generator=rng) + gate_shift, a_log, dt_bias),
        "beta": torch.rand(1, tokens, HV, generator=rng),
    }


def _pool(slots=5):
    return torch.randn(slots, HV, V, K, generator=torch.Generator().manual_seed(1)) * 0.3


def _error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def _run(**options):
    return chunk_gdn(GdnInputs(**options))


def _truth(x, cu, initial):
    return recurrent_gdn(*(x[name][0] for name in x), initial_state=initial, cu_seqlens=cu)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("gate_shift", [0.0, 30.0])
def test_one_sequence_of_any_length(tokens, gate_shift):
    x, pool, cu = _inputs(tokens, gate_shift=gate_shift), _pool(), torch.tensor([0, tokens])
    want, want_state = _truth(x, cu, pool[2:3])
    out, _ = _run(**x, state_pool=pool, cache_indices=torch.tensor([2]), cu_seqlens=cu)
    assert _error(out[0], want) < LIMIT
    assert (pool[2].double() - want_state[0]).abs().max() < 1e-5


def test_ragged_batch_and_chunk_states():
    lengths = [17, 64, 1, 130]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x, pool = _inputs(sum(lengths)), _pool()
    initial = pool[[4, 3, 1, 2]].clone()
    initial[1] = 0
    before = pool.clone()
    want, want_state = _truth(x, cu, initial)
    out, starts = _run(
        **x,
        state_pool=pool,
        cache_indices=torch.tensor([4, -1, 1, 2]),
        cu_seqlens=cu,
        return_chunk_states=True,
    )
    assert _error(out[0], want) < LIMIT
    assert all(_error(pool[slot], want_state[n]) < LIMIT for n, slot in ((0, 4), (2, 1), (3, 2)))
    assert torch.equal(pool[[0, 3]], before[[0, 3]])
    assert starts.shape == (1, 1 + 1 + 1 + 3, HV, V, K)
    torch.testing.assert_close(starts[0, [0, 2, 3]], initial[[0, 2, 3]])


def test_the_tracked_state_is_that_at_its_chunks_start():
    lengths = [17, 64, 130]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x, track = _inputs(sum(lengths)), torch.full((3, HV, V, K), torch.nan)
    slots = {"cache_indices": torch.tensor([4, -1, 1]), "cu_seqlens": cu}
    _, starts = _run(**x, state_pool=_pool(), **slots, return_chunk_states=True)
    options = {"track_state": track, "track_chunk_idx": torch.tensor([-1, 0, 2], dtype=torch.int32)}
    _, none = _run(**x, state_pool=_pool(), **slots, **options)
    assert none is None
    assert track[0].isnan().all()
    assert torch.equal(track[1:], starts[0, [1, 4]])


def test_split_prefill_and_steps_equal_one_prefill():
    x, whole, parts = _inputs(130), _pool(), _pool()
    want, _ = _run(**x, state_pool=whole, cache_indices=torch.tensor([1]), cu_seqlens=torch.tensor([0, 130]))
    head = {name: value[:, :100] for name, value in x.items()}
    out, _ = _run(**head, state_pool=parts, cache_indices=torch.tensor([1]), cu_seqlens=torch.tensor([0, 100]))
    torch.testing.assert_close(out[0], want[0, :100], rtol=1e-4, atol=1e-5)
    for t in range(100, 130):
        row = {name: value[:, t] for name, value in x.items()}
        step = gdn_step(**row, state_pool=parts, cache_indices=torch.tensor([1]))
        torch.testing.assert_close(step[0], want[0, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_pool_is_left_alone_on_request():
    x, pool = _inputs(20), _pool()
    before = pool.clone()
    slots, cu = torch.tensor([0]), torch.tensor([0, 20])
    _run(**x, state_pool=pool, cache_indices=slots, cu_seqlens=cu, store_state=False)
    assert torch.equal(pool, before)
