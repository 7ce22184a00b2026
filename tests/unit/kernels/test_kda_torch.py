"""Chunked KDA in torch against the float64 recurrence."""

import pytest
import torch
from prfaas_kernels.kda import KdaInputs, chunk_kda, kda_gate, kda_step, recurrent_kda

H, HV, K, V = 2, 4, 32, 16
LIMIT = 1e-5


def _inputs(tokens, *, gate_shift=0.0, spikes=False, seed=0):
    rng = torch.Generator().manual_seed(seed)
    packed = torch.randn(1, tokens, H * K * 2 + HV * V, generator=rng)
    q, k, v = packed.split([H * K, H * K, HV * V], dim=-1)
    g = torch.randn(1, tokens, HV, K, generator=rng) + gate_shift
    if spikes:
        g = torch.where(torch.rand(g.shape, generator=rng) < 0.05, g + 200.0, g)
    return {
        "q": q.unflatten(-1, (H, K)),
        "k": k.unflatten(-1, (H, K)),
        "v": v.unflatten(-1, (HV, V)),
        "g": g,
        "beta": torch.randn(1, tokens, HV, generator=rng),
        "a_log": torch.randn(HV, generator=rng) * 0.5,
        "dt_bias": torch.randn(HV * K, generator=rng),
    }


def _truth(x, cu_seqlens, initial, lower_bound=None):
    return recurrent_kda(
        x["q"][0],
        x["k"][0],
        x["v"][0],
        kda_gate(x["g"][0].double(), x["a_log"], x["dt_bias"], lower_bound),
        x["beta"][0].double().sigmoid(),
        initial_state=initial,
        cu_seqlens=cu_seqlens,
    )


def _chunked(x, cu_seqlens, pool, slots, **options):
    inputs = KdaInputs(
        **x,
        state_pool=pool,
        cache_indices=torch.tensor(slots, dtype=torch.int32),
        cu_seqlens=cu_seqlens,
        beta_is_raw=True,
        **options,
    )
    return chunk_kda(inputs)


def _error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def _pool(slots=4, seed=1):
    return torch.randn(slots, HV, V, K, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130])
def test_one_sequence_of_any_length(tokens):
    x, pool, cu = _inputs(tokens), _pool(), torch.tensor([0, tokens])
    want, want_state = _truth(x, cu, pool[2:3])
    before = pool.clone()
    out, _ = _chunked(x, cu, pool, [2])
    assert _error(out[0], want) < LIMIT
    assert _error(pool[2], want_state[0]) < LIMIT
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


def test_ragged_batch_with_an_empty_sequence_and_no_slot():
    lengths = [17, 0, 64, 1, 130]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    x, pool = _inputs(sum(lengths)), _pool(5)
    initial = pool[[4, 3, 0, 1, 2]].clone()
    initial[2] = 0  # slot -1 starts from zeros
    want, want_state = _truth(x, cu, initial)
    before = pool.clone()
    out, _ = _chunked(x, cu, pool, [4, 3, -1, 1, 2])
    assert _error(out[0], want) < LIMIT
    for n, slot in ((0, 4), (3, 1), (4, 2)):
        assert _error(pool[slot], want_state[n]) < LIMIT
    assert torch.equal(pool[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize(("gate_shift", "spikes"), [(5.0, False), (25.0, False), (0.0, True), (-20.0, False)])
def test_strong_gates_stay_finite_and_exact(gate_shift, spikes, lower_bound):
    x, pool, cu = _inputs(130, gate_shift=gate_shift, spikes=spikes), _pool(), torch.tensor([0, 130])
    want, want_state = _truth(x, cu, pool[1:2], lower_bound)
    out, _ = _chunked(x, cu, pool, [1], lower_bound=lower_bound)
    assert torch.isfinite(out).all()
    assert torch.isfinite(pool[1]).all()
    assert _error(out[0], want) < 10 * LIMIT
    assert (pool[1].double() - want_state[0]).abs().max() < 1e-4


@pytest.mark.parametrize("cut", [1, 16, 63, 64, 100])
def test_split_prefill_equals_one(cut):
    x, whole, parts = _inputs(130), _pool(), _pool()
    want, _ = _chunked(x, torch.tensor([0, 130]), whole, [1])
    per_token = ("q", "k", "v", "g", "beta")
    for rows in (slice(0, cut), slice(cut, 130)):
        piece = {name: value[:, rows] if name in per_token else value for name, value in x.items()}
        out, _ = _chunked(piece, torch.tensor([0, rows.stop - rows.start]), parts, [1])
        torch.testing.assert_close(out[0], want[0, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_steps_equal_prefill_and_rows_without_slot_are_zero():
    x, pool = _inputs(9), _pool()
    want, want_state = _truth(x, torch.tensor([0, 9]), pool[3:4])
    before = pool.clone()
    for t in range(9):
        both = {name: x[name][0, t].expand(2, *x[name].shape[2:]) for name in ("q", "k", "v", "g", "beta")}
        out = kda_step(
            both["q"],
            both["k"],
            both["v"],
            kda_gate(both["g"], x["a_log"], x["dt_bias"], None),
            both["beta"].sigmoid(),
            state_pool=pool,
            cache_indices=torch.tensor([3, -1]),
        )
        assert _error(out[0], want[t]) < LIMIT
        assert not out[1].any()
    assert _error(pool[3], want_state[0]) < LIMIT
    assert torch.equal(pool[:3], before[:3])


def test_strided_pool_and_half_precision_inputs():
    x, pool, cu = _inputs(70), _pool(), torch.tensor([0, 70])
    x = {name: value.half() if name in ("q", "k", "v") else value for name, value in x.items()}
    wide = torch.full((4, 3, HV, V, K), float("nan"))
    wide[:, 1] = pool
    want, want_state = _truth(x, cu, pool[2:3])
    out, _ = _chunked(x, cu, wide[:, 1], [2])
    assert out.dtype == torch.float16
    assert _error(out[0], want) < 1e-3
    assert _error(wide[2, 1], want_state[0]) < LIMIT
    assert torch.isnan(wide[:, [0, 2]]).all()


def test_states_at_chunk_starts_and_tracked_state():
    lengths = [100, 200]
    cu, x, pool = torch.tensor([0, 100, 300]), _inputs(300), _pool()
    initial = pool[[0, 1]].clone()
    tracked = torch.full((2, HV, V, K), float("nan"))
    _, starts = _chunked(
        x,
        cu,
        pool,
        [0, 1],
        return_chunk_states=True,
        track_state=tracked,
        track_chunk_idx=torch.tensor([-1, 2], dtype=torch.int32),
    )
    assert starts.shape == (1, 2 + 4, HV, V, K)
    per_token = ("q", "k", "v", "g", "beta")
    piece = {name: value[:, 100 : 100 + 128] if name in per_token else value for name, value in x.items()}
    _, want = _truth(piece, torch.tensor([0, 128]), initial[1:2])
    assert _error(tracked[1], want[0]) < LIMIT
    assert _error(starts[0, 2 + 2], want[0]) < LIMIT
    assert torch.isnan(tracked[0]).all()
    assert sum(lengths) == 300


def test_inputs_are_not_changed():
    x, pool = _inputs(40), _pool()
    before = {name: value.clone() for name, value in x.items()}
    _chunked(x, torch.tensor([0, 40]), pool, [0])
    assert all(torch.equal(x[name], before[name]) for name in x)


def test_broken_sequence_marks_are_refused():
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to at most 8 tokens, got \[0, 9\]"):
        _chunked(_inputs(8), torch.tensor([0, 9]), _pool(), [0])
