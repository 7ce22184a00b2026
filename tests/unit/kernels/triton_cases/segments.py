"""The scan in segments against the float64 recurrences, and against the serial scan."""

import pytest
import torch
from prfaas_kernels.common import scan, segments
from prfaas_kernels.lightning import recurrent_lightning

from tests.unit.kernels.triton_cases import kda as kda_cases
from tests.unit.kernels.triton_cases import scalar_gates as scalar_cases
from tests.unit.kernels.triton_cases.conftest import FULL, FULL_LIMIT, HALF_LIMIT, error, marks, on_device

H, HV, K, V = kda_cases.H, kda_cases.HV, kda_cases.K, kda_cases.V


def run_kda(x, cu, pool, slots, gate="usual", **options):
    return kda_cases.run(x, cu, pool, slots, gate, **{"segment_chunks": 2, **options})


@pytest.mark.parametrize("gate", kda_cases.GATES if FULL else ["usual", "strong", "bounded and spiked"])
def test_kda_gates(gate):
    lengths = [300, 17, 0, 129]
    x, pool, cu = kda_cases.inputs(sum(lengths), gate=gate), kda_cases.pool_of(5), marks(lengths)
    initial, before = pool[[3, 0, 4, 1]].clone(), pool.clone()
    initial[3] = 0
    want, want_state = kda_cases.truth(x, cu, initial, gate)
    out, _ = run_kda(x, cu, pool, [3, 0, 4, -1], gate)
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[[3, 0]], want_state[:2]) < FULL_LIMIT
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize("tokens", [64, 127, 128, 129, 256, 257] if FULL else [127, 128, 257])
def test_kda_lengths_around_segment_borders(tokens):
    x, pool, cu = kda_cases.inputs(tokens), kda_cases.pool_of(), marks([tokens])
    want, want_state = kda_cases.truth(x, cu, pool[2:3])
    out, _ = run_kda(x, cu, pool, [2], segment_chunks=1 if tokens == 127 else 2)
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[2], want_state[0]) < FULL_LIMIT


def test_kda_at_full_width_in_bfloat16_is_no_worse_than_the_serial_scan():
    sizes = {"heads": (1, 1), "widths": (128, 128)}
    x, cu = kda_cases.inputs(400, dtype=torch.bfloat16, **sizes), marks([400])
    serial = kda_cases.pool_of(2, 1, (128, 128))
    pool = serial.clone()
    want, want_state = kda_cases.truth(x, cu, pool[1:2])
    out, _ = run_kda(x, cu, pool, [1])
    in_one, _ = run_kda(x, cu, serial, [1], segment_chunks=0)
    assert error(out[0], want) < min(HALF_LIMIT, 1.2 * error(in_one[0], want))
    assert error(pool[1], want_state[0]) < HALF_LIMIT


@pytest.mark.parametrize("index", [0, 1, 2, 4] if FULL else [2, 4])
def test_states_at_chunk_starts_and_tracked_state_equal_the_serial_scans(index):
    lengths = [100, 300]
    cu, x = marks(lengths), kda_cases.inputs(400)
    results = []
    for segment_chunks in (0, 2):
        pool, tracked = kda_cases.pool_of(), on_device(torch.full((2, HV, V, K), float("nan")))
        where = on_device(torch.tensor([-1, index], dtype=torch.int32))
        _, starts = run_kda(
            x,
            cu,
            pool,
            [0, 1],
            segment_chunks=segment_chunks,
            return_chunk_states=True,
            track_state=tracked,
            track_chunk_idx=where,
        )
        results.append((starts, tracked[1], pool))
        assert tracked[0].isnan().all()
    for serial, segmented in zip(*results, strict=True):
        assert error(segmented, serial) < FULL_LIMIT


def test_split_prefill_equals_one():
    x, whole, parts = kda_cases.inputs(400), kda_cases.pool_of(), kda_cases.pool_of()
    want, _ = run_kda(x, marks([400]), whole, [1])
    for rows in (slice(0, 250), slice(250, 400)):
        piece = {name: value[:, rows] if name in kda_cases.PER_TOKEN else value for name, value in x.items()}
        out, _ = run_kda(piece, marks([rows.stop - rows.start]), parts, [1])
        assert error(out[0], want[0, rows]) < FULL_LIMIT
    assert error(parts, whole) < FULL_LIMIT


def test_strided_pool():
    x, pool, cu = kda_cases.inputs(200), kda_cases.pool_of(), marks([200])
    wide = on_device(torch.full((4, 3, HV, V, K), float("nan")))
    wide[:, 1] = pool
    run_kda(x, cu, pool, [2])
    run_kda(x, cu, wide[:, 1], [2])
    assert torch.equal(wide[:, 1], pool)
    assert wide[:, [0, 2]].isnan().all()


def test_nearly_equal_keys_without_decay():
    x = kda_cases.inputs(300, gate="open", heads=(1, 1), widths=(32, 16))
    x["k"] = x["k"][:, :1].expand_as(x["k"]) + 1e-3 * x["k"]
    pool, cu = kda_cases.pool_of(2, 1, (32, 16)), marks([300])
    want, want_state = kda_cases.truth(x, cu, pool[1:2], "open")
    out, _ = run_kda(x, cu, pool, [1], "open")
    assert error(out[0], want) < 10 * FULL_LIMIT
    assert error(pool[1], want_state[0]) < 10 * FULL_LIMIT


@pytest.mark.parametrize("strength", [0.01, 1.0, 50.0] if FULL else [1.0])
def test_gdn(strength):
    lengths = [300, 1, 129]
    x, cu = scalar_cases.gdn_inputs(sum(lengths), strength=strength), marks(lengths)
    pool = scalar_cases.pool_of(4, scalar_cases.HV, scalar_cases.V, scalar_cases.K)
    want, want_state = scalar_cases.gdn_truth(x, cu, pool[[2, 0, 1]])
    out, starts = scalar_cases.run_gdn(x, cu, pool, [2, 0, 1], segment_chunks=2, return_chunk_states=True)
    assert error(out[0], want) < FULL_LIMIT
    assert error(pool[[2, 0, 1]], want_state) < FULL_LIMIT
    assert starts.shape[1] == 5 + 1 + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lightning_cold_and_warm(dtype):
    lengths, rng = [300, 70, 200], torch.Generator().manual_seed(0)
    heads, width = scalar_cases.HV, scalar_cases.K
    cu, pool = marks(lengths), scalar_cases.pool_of(5, heads, width, width)
    qkv = [on_device(torch.randn(sum(lengths), heads, width, generator=rng).to(dtype)) for _ in range(3)]
    initial = pool[[4, 3, 1]].cpu()
    initial[1] = 0
    want, want_state = recurrent_lightning(
        *(x.cpu() for x in qkv), scalar_cases.SLOPES, initial_state=initial, cu_seqlens=cu
    )
    warm = on_device(torch.tensor([True, False, True]))
    out = scalar_cases.run_lightning(qkv, cu, pool, [4, 3, 1], has_initial_state=warm, segment_chunks=2)
    limit = FULL_LIMIT if dtype == torch.float32 else HALF_LIMIT
    assert error(out, want) < limit
    assert error(pool[[4, 3, 1]], want_state) < limit


def test_the_longest_sequence_decides_for_every_operator(monkeypatch):
    asked = []

    def plan(**facts):
        asked.append(facts["longest"])
        return segments.SegmentPlan(1, "this is a test")

    monkeypatch.setattr(scan, "plan_segments", plan)
    cu, slots = marks([70, 70]), [0, 1]
    kda_cases.run(kda_cases.inputs(140), cu, kda_cases.pool_of(), slots, max_seqlen=70)
    heads, width = scalar_cases.HV, scalar_cases.K
    pool = scalar_cases.pool_of(2, heads, scalar_cases.V, width)
    scalar_cases.run_gdn(scalar_cases.gdn_inputs(140), cu, pool, slots, max_seqlen=71)
    qkv = [on_device(torch.randn(140, heads, width)) for _ in range(3)]
    scalar_cases.run_lightning(qkv, cu, scalar_cases.pool_of(2, heads, width, width), slots, max_seqlen=72)
    assert asked == [70, 71, 72]


@pytest.mark.skipif(not FULL, reason="PRFAAS_KERNEL_TESTS=full")
@pytest.mark.parametrize(
    ("gate", "dtype"),
    [*((gate, torch.float32) for gate in ("usual", "strong", "spiked", "bounded")), ("usual", torch.bfloat16)],
)
def test_full_width(gate, dtype):
    lengths = [330, 64, 130]
    sizes = {"heads": (1, 1), "widths": (128, 128)}
    x, pool = kda_cases.inputs(sum(lengths), gate=gate, dtype=dtype, **sizes), kda_cases.pool_of(5, 1, (128, 128))
    want, want_state = kda_cases.truth(x, marks(lengths), pool[[3, 1, 2]], gate)
    out, _ = run_kda(x, marks(lengths), pool, [3, 1, 2], gate)
    limit = FULL_LIMIT if dtype == torch.float32 else HALF_LIMIT
    assert error(out[0], want) < limit
    assert error(pool[[3, 1, 2]], want_state) < limit
