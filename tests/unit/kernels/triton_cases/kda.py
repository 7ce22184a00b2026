"""KDA's Triton kernels against the float64 recurrence."""

import prfaas_kernels.kda.chunk_triton as kda
import pytest
import torch
from prfaas_kernels.kda import KdaInputs, kda_gate, recurrent_kda

from tests.unit.kernels.triton_cases.conftest import FULL, FULL_LIMIT, HALF_LIMIT, error, marks, on_device

H, HV, K, V = 1, 2, 32, 32
PER_TOKEN = ("q", "k", "v", "g", "beta")
#: name -> (shift of the raw gate, share of tokens with a spike, lower bound)
GATES = {
    "mild": (-3.0, 0.0, None),
    "usual": (0.0, 0.0, None),
    "strong": (5.0, 0.0, None),
    "saturated": (25.0, 0.0, None),
    "open": (-20.0, 0.0, None),
    "spiked": (0.0, 0.05, None),
    "bounded": (0.0, 0.0, -5.0),
    "bounded and spiked": (-2.0, 0.05, -5.0),
}


def inputs(tokens, *, gate="usual", dtype=torch.float32, heads=(H, HV), widths=(K, V), seed=0):
    rng = torch.Generator().manual_seed(seed)
    (h, hv), (k_width, v_width) = heads, widths
    shift, spikes, _ = GATES[gate]
    packed = torch.randn(1, tokens, 2 * h * k_width + hv * v_width, generator=rng).to(dtype)
    q, k, v = on_device(packed).split([h * k_width, h * k_width, hv * v_width], dim=-1)
    g = torch.randn(1, tokens, hv, k_width, generator=rng) + shift
    g = torch.where(torch.rand(g.shape, generator=rng) < spikes, g + 200.0, g)
    return {
        "q": q.unflatten(-1, (h, k_width)),
        "k": k.unflatten(-1, (h, k_width)),
        "v": v.unflatten(-1, (hv, v_width)),
        "g": on_device(g),
        "beta": on_device(torch.randn(1, tokens, 2 * hv, generator=rng))[..., ::2],
        "a_log": on_device(torch.randn(1, 1, hv, 1, generator=rng) * 0.5),
        "dt_bias": on_device(torch.randn(hv * k_width, generator=rng)),
    }


def pool_of(slots=4, heads=HV, widths=(K, V)):
    rng = torch.Generator().manual_seed(1)
    return on_device(torch.randn(slots, heads, widths[1], widths[0], generator=rng) * 0.3)


def truth(x, cu, initial, gate="usual"):
    x = {name: value.cpu() for name, value in x.items()}
    log_decay = kda_gate(x["g"][0].double(), x["a_log"], x["dt_bias"], GATES[gate][2])
    beta = x["beta"][0].double().sigmoid()
    return recurrent_kda(
        x["q"][0], x["k"][0], x["v"][0], log_decay, beta, initial_state=initial.cpu(), cu_seqlens=cu.cpu()
    )


def run(x, cu, pool, slots, gate="usual", *, segment_chunks=None, **options):
    given = KdaInputs(
        **x,
        beta_is_raw=True,
        lower_bound=GATES[gate][2],
        state_pool=pool,
        cache_indices=on_device(torch.tensor(slots, dtype=torch.int32)),
        cu_seqlens=on_device(cu),
        **options,
    )
    return kda.chunk_kda(given, segment_chunks=segment_chunks)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 127, 130])
def test_lengths(tokens):
    x, pool, cu = inputs(tokens), pool_of(), marks([tokens])
    want, want_state = truth(x, cu, pool[2:3])
    before = pool.clone()
    out, _ = run(x, cu, pool, [2])
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[2], want_state[0]) < FULL_LIMIT
    assert torch.equal(pool[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate):
    x, pool, cu = inputs(130, gate=gate), pool_of(), marks([130])
    want, want_state = truth(x, cu, pool[1:2], gate)
    out, _ = run(x, cu, pool, [1], gate)
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[1], want_state[0]) < FULL_LIMIT


@pytest.mark.parametrize("gate", ["usual", "strong", "bounded"])
def test_full_width_in_bfloat16(gate):
    sizes = {"heads": (1, 1), "widths": (128, 128)}
    x, pool, cu = inputs(130, gate=gate, dtype=torch.bfloat16, **sizes), pool_of(2, 1, (128, 128)), marks([130])
    want, want_state = truth(x, cu, pool[1:2], gate)
    out, _ = run(x, cu, pool, [1], gate)
    assert out.dtype == torch.bfloat16
    assert error(out[0], want) < HALF_LIMIT
    assert error(pool[1], want_state[0]) < HALF_LIMIT


def test_ragged_batch_with_empty_sequences_no_slot_and_a_strided_pool():
    lengths = [17, 0, 64, 1, 130, 0]
    cu, before = marks(lengths), pool_of(6)
    x = inputs(sum(lengths) + 9)  # the last 9 tokens belong to nobody
    initial = before[[4, 3, 0, 1, 2, 5]].clone()
    initial[2] = 0
    wide = on_device(torch.full((6, 3, HV, V, K), float("nan")))
    wide[:, 1] = before
    want, want_state = truth(x, cu, initial)
    out, _ = run(x, cu, wide[:, 1], [4, 3, -1, 1, 2, 5])
    live = sum(lengths)
    assert error(out[0, :live], want[:live]) < FULL_LIMIT
    assert not out[0, live:].any()
    for n, slot in ((0, 4), (3, 1), (4, 2)):
        assert error(wide[slot, 1], want_state[n]) < FULL_LIMIT
    assert torch.equal(wide[[0, 3, 5], 1], before[[0, 3, 5]])
    assert wide[:, [0, 2]].isnan().all()


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
def test_split_prefill_equals_one(cut):
    x, whole, parts = inputs(130), pool_of(), pool_of()
    want, _ = run(x, marks([130]), whole, [1])
    for rows in (slice(0, cut), slice(cut, 130)):
        piece = {name: value[:, rows] if name in PER_TOKEN else value for name, value in x.items()}
        out, _ = run(piece, marks([rows.stop - rows.start]), parts, [1])
        torch.testing.assert_close(out[0], want[0, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_chunk_states_and_tracked_state():
    lengths = [100, 200]
    cu, x, pool = marks(lengths), inputs(300), pool_of()
    initial = pool[[0, 1]].clone()
    tracked = on_device(torch.full((2, HV, V, K), float("nan")))
    index = on_device(torch.tensor([-1, 2], dtype=torch.int32))
    _, starts = run(x, cu, pool, [0, 1], return_chunk_states=True, track_state=tracked, track_chunk_idx=index)
    assert starts.shape == (1, 2 + 4, HV, V, K)
    piece = {name: value[:, 100 : 100 + 128] if name in PER_TOKEN else value for name, value in x.items()}
    _, want = truth(piece, marks([128]), initial[1:2])
    assert error(tracked[1], want[0]) < FULL_LIMIT
    assert error(starts[0, 2 + 2], want[0]) < FULL_LIMIT
    torch.testing.assert_close(starts[0, [0, 2]], initial)
    assert tracked[0].isnan().all()


def test_nearly_equal_keys_keep_the_triangular_solve_stable():
    """With equal keys and no decay, powers of L reach 1e18; substitution does not."""
    x = inputs(130, gate="open", heads=(1, 1), widths=(128, 16))
    x["k"] = x["k"][:, :1].expand_as(x["k"]) + 1e-3 * x["k"]
    x["beta"] = x["beta"] + 4.0
    pool, cu = pool_of(2, 1, (128, 16)), marks([130])
    want, want_state = truth(x, cu, pool[1:2], "open")
    out, _ = run(x, cu, pool, [1], "open")
    assert error(out[0], want) < 10 * FULL_LIMIT
    assert error(pool[1], want_state[0]) < 10 * FULL_LIMIT


def test_log_decay_and_activated_beta():
    x, pool, cu = inputs(70), pool_of(), marks([70])
    want, want_state = truth(x, cu, pool[1:2])
    x["g"] = kda_gate(x["g"], x.pop("a_log"), x.pop("dt_bias"), None)
    x["beta"] = x["beta"].sigmoid()
    slots = on_device(torch.tensor([1]))
    out, _ = kda.chunk_kda(KdaInputs(**x, state_pool=pool, cache_indices=slots, cu_seqlens=on_device(cu)))
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[1], want_state[0]) < FULL_LIMIT


@pytest.mark.skipif(not FULL, reason="PRFAAS_KERNEL_TESTS=full")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_width_all_gates(gate, dtype):
    lengths, heads = [130, 64, 17], (2, 4) if gate == "usual" else (1, 1)
    x = inputs(sum(lengths), gate=gate, dtype=dtype, heads=heads, widths=(128, 128))
    pool = pool_of(5, heads[1], (128, 128))
    want, want_state = truth(x, marks(lengths), pool[[3, 1, 2]], gate)
    out, _ = run(x, marks(lengths), pool, [3, 1, 2], gate)
    limit = FULL_LIMIT if dtype == torch.float32 else HALF_LIMIT
    assert error(out[0], want) < limit
    assert error(pool[[3, 1, 2]], want_state) < limit


@pytest.mark.skipif(not FULL, reason="PRFAAS_KERNEL_TESTS=full")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_thousand_tokens(dtype):
    lengths = [5000, 3000, 192]
    x, pool = inputs(8192, dtype=dtype, heads=(1, 1), widths=(64, 64)), pool_of(4, 1, (64, 64))
    want, want_state = truth(x, marks(lengths), pool[[3, 1, 2]])
    out, _ = run(x, marks(lengths), pool, [3, 1, 2])
    limit = FULL_LIMIT if dtype == torch.float32 else HALF_LIMIT
    assert error(out[0], want) < limit
    assert error(pool[[3, 1, 2]], want_state) < limit
