"""Our prefill kernels in SGLang's dispatchers and Lightning method, on inputs with the strides that its backends give.

As its attention backends call them: q, k, v are views of one convolution's output; the pools have one
layer's stride of a pool of all layers. The truth is the recurrence token by token, called here with arguments of its
own: it shares nothing with how the plugin hands SGLang's on, which looks alike and is what is tested.
"""

from types import SimpleNamespace

import pytest
import sglang.srt.model_executor.model_runner  # noqa: F401  (hooks of the CPU platform)
import torch
from prfaas_kernels import kda
from prfaas_kernels.gdn import recurrent_gdn
from prfaas_kernels.kda import kda_gate, recurrent_kda
from prfaas_kernels.lightning import recurrent_lightning
from sglang.srt.layers.attention.linear import gdn_backend, kda_backend, lightning_backend
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.srt.layers.attention.linear.kernels.kda_triton import TritonKDAKernel
from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend as Backend
from sglang.srt.plugins import load_plugins

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.sglang_plugin.hooks import Hook
from sglang_prfaas.sglang_plugin.linear_attention import contracts, hooks

LENGTHS, SLOTS = [17, 64, 1, 130], [4, -1, 1, 2]
CU = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
TOKENS, ROWS = sum(LENGTHS), torch.tensor(SLOTS, dtype=torch.int32)
H, K, V = 2, 32, 16
LIMIT = 1e-5


@pytest.fixture(autouse=True, scope="module")
def in_place():
    load_plugins()
    hooks.install_kernels()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def pool_of(heads, rows, columns):
    """One layer's part of a pool of three layers: slots are strided."""
    return (0.3 * draw(6, 3, heads, rows, columns, seed=1))[:, 1]


def views(heads):
    """q, k, v ``[1, T, ., .]`` as SGLang splits them from the convolution's output ``[T, D]``."""
    packed = draw(TOKENS, 2 * H * K + heads * V)
    q, k, v = packed.split([H * K, H * K, heads * V], dim=-1)
    return packed, *(x.unflatten(-1, (-1, width)).unsqueeze(0) for x, width in ((q, K), (k, K), (v, V)))


def kda_dispatcher(prefill="prfaas"):
    return kda_backend.KDAKernelDispatcher(Backend.TRITON, Backend(prefill), Backend.TRITON)


def gdn_dispatcher(prefill="prfaas"):
    return gdn_backend.GDNKernelDispatcher(Backend.TRITON, Backend(prefill), Backend.TRITON)


@pytest.mark.parametrize("make", [kda_dispatcher, gdn_dispatcher])
def test_only_prefill_is_ours(make):
    ours, theirs = make(), make("triton")
    assert type(ours.extend_kernel).__module__.startswith("sglang_prfaas.")
    assert type(theirs.extend_kernel) in (TritonKDAKernel, TritonGDNKernel)
    for phase in ("decode_kernel", "verify_kernel"):
        assert type(getattr(ours, phase)) is type(getattr(theirs, phase))
    assert ours.supports_packed_decode == theirs.supports_packed_decode
    assert ours.extend_kernel.supports_track_state_snapshot
    assert isinstance(ours.extend_kernel, type(theirs.extend_kernel)), "SGLang asks by class what graphs may hold"


def kda_call(dispatcher, pool, lower_bound=None, **options):
    packed, q, k, v = views(H)
    gate = draw(1, TOKENS, H * K + 8, seed=2)[..., : H * K].unflatten(-1, (H, K))
    beta = draw(1, TOKENS, 2 * H, seed=3)[..., ::2]
    a_log, dt_bias = 0.5 * draw(1, 1, H, 1, seed=4), draw(H * K, seed=5)
    kept = [x.clone() for x in (packed, gate, beta)]
    out = dispatcher.extend(
        q=q,
        k=k,
        v=v,
        g=gate,
        beta=beta,
        ssm_states=pool,
        cache_indices=ROWS,
        query_start_loc=CU,
        A_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_is_raw=True,
        layer_id=1,
        **{
            "extend_seq_lens_cpu": LENGTHS,
            "is_spec_decode": False,
            "return_intermediate_states": False,
            **options,
        },
    )
    assert all(torch.equal(x, y) for x, y in zip((packed, gate, beta), kept, strict=True)), "an input was changed"
    initial = pool_of(H, V, K)[[4, 3, 1, 2]]
    initial[1] = 0
    truth = recurrent_kda(
        q[0],
        k[0],
        v[0],
        kda_gate(gate[0].double(), a_log, dt_bias, lower_bound),
        beta[0].double().sigmoid(),
        initial_state=initial,
        cu_seqlens=CU,
    )
    return out, truth, initial


def assert_pool(pool, states, rows, columns):
    untouched = pool_of(pool.shape[1], rows, columns)
    assert all(error(pool[slot], states[n]) < LIMIT for n, slot in enumerate(SLOTS) if slot >= 0)
    assert torch.equal(pool[[0, 3, 5]], untouched[[0, 3, 5]])


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_kda(lower_bound):
    pool = pool_of(H, V, K)
    out, (want, states), _ = kda_call(kda_dispatcher(), pool, lower_bound)
    assert out.shape == (1, TOKENS, H, V)
    assert error(out[0], want) < LIMIT
    assert_pool(pool, states, V, K)


def test_kda_states_of_chunks_and_the_tracked_one():
    (_, starts), _, initial = kda_call(kda_dispatcher(), pool_of(H, V, K), return_intermediate_states=True)
    assert starts.shape == (1, 1 + 1 + 1 + 3, H, V, K)
    torch.testing.assert_close(starts[0, [0, 2, 3]], initial[[0, 2, 3]])
    track = torch.full((4, H, V, K), torch.nan)
    (_, none), _, _ = kda_call(
        kda_dispatcher(),
        pool_of(H, V, K),
        return_intermediate_states=True,
        track_state=track,
        track_chunk_idx=torch.tensor([-1, 0, -1, 2], dtype=torch.int32),
    )
    assert none is None
    torch.testing.assert_close(track[[1, 3]], starts[0, [1, 5]])
    assert track[[0, 2]].isnan().all()


@pytest.mark.parametrize("given", [LENGTHS, torch.tensor(LENGTHS), None], ids=["list", "tensor", "none"])
def test_kda_is_told_of_the_longest_sequence(monkeypatch, given):
    taken, run = [], kda.chunk_kda
    monkeypatch.setattr(kda, "chunk_kda", lambda inputs: taken.append(inputs.max_seqlen) or run(inputs))
    kda_call(kda_dispatcher(), pool_of(H, V, K), extend_seq_lens_cpu=given)
    assert taken == [None if given is None else max(LENGTHS)]


def test_kda_that_we_do_not_take_is_sglangs(monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(TritonKDAKernel, "extend", lambda self, *args, **options: calls.append(options))
    contracts.log_fallback.cache_clear()
    for _ in range(2):
        kda_call(kda_dispatcher(), pool_of(H, V, K), is_spec_decode=True)
    assert len(calls) == 2
    assert calls[0]["beta_is_raw"]
    assert calls[0]["layer_id"] == 1
    said = [record.getMessage() for record in caplog.records if "stays with SGLang" in record.getMessage()]
    assert said == [
        "prfaas: prefill of KDA stays with SGLang's own kernel: a speculative draft must not commit its states"
    ]


def gdn_call(dispatcher, pool, **options):
    heads = 2 * H
    packed, q, k, v = views(heads)
    gate, beta = -draw(1, TOKENS, heads, seed=2).abs(), draw(1, TOKENS, heads, seed=3).sigmoid()
    kept = packed.clone()
    result = dispatcher.extend(
        q=q,
        k=k,
        v=v,
        g=gate,
        beta=beta,
        ssm_states=pool,
        cache_indices=ROWS,
        query_start_loc=CU,
        output=None,
        layer_id=1,
        **options,
    )
    assert torch.equal(packed, kept), "an input was changed"
    initial = pool_of(heads, V, K)[[4, 3, 1, 2]]
    initial[1] = 0
    truth = recurrent_gdn(q[0], k[0], v[0], gate[0], beta[0], initial_state=initial, cu_seqlens=CU)
    return result, truth, initial


TRACKED = torch.tensor([-1, 0, -1, 2], dtype=torch.int32)


def test_gdn_and_the_tracked_state():
    pool, track = pool_of(2 * H, V, K), torch.full((4, 2 * H, V, K), torch.nan)
    (out, last, starts), (want, states), initial = gdn_call(
        gdn_dispatcher(), pool, track_state=track, track_chunk_idx=TRACKED
    )
    assert (last, starts) == (None, None)
    assert error(out[0], want) < LIMIT
    assert_pool(pool, states, V, K)
    torch.testing.assert_close(track[1], initial[1])
    assert track[[0, 2]].isnan().all()
    head = sum(LENGTHS[:3])
    _, q, k, v = views(2 * H)
    gate, beta = -draw(1, TOKENS, 2 * H, seed=2).abs(), draw(1, TOKENS, 2 * H, seed=3).sigmoid()
    _, tracked = recurrent_gdn(*(x[0, head : head + 128] for x in (q, k, v, gate, beta)), initial_state=initial[3:4])
    assert error(track[3], tracked[0]) < LIMIT


def test_gdn_that_we_do_not_take_is_sglangs_with_the_tracked_state(monkeypatch, caplog):
    ours = torch.full((4, 2 * H, V, K), torch.nan)
    gdn_call(gdn_dispatcher(), pool_of(2 * H, V, K), track_state=ours, track_chunk_idx=TRACKED)
    monkeypatch.setattr(contracts, "delta_obstacle", lambda *args: "this is a test")
    theirs = torch.full((4, 2 * H, V, K), torch.nan)
    (out, _, _), (want, _), _ = gdn_call(
        gdn_dispatcher(), pool_of(2 * H, V, K), track_state=theirs, track_chunk_idx=TRACKED
    )
    assert error(out[0], want) < LIMIT
    torch.testing.assert_close(theirs[[1, 3]], ours[[1, 3]])
    assert "prefill of GDN stays with SGLang's own kernel: this is a test" in caplog.text


def lightning_call(num_prefills=4, **options):
    q, k, v = (draw(TOKENS, H, K, seed=seed) for seed in range(3))
    pool, slopes = pool_of(H, K, K), torch.tensor([0.003, 3.0]).view(H, 1, 1)
    backend = SimpleNamespace(tp_slope=[None, slopes])
    metadata = SimpleNamespace(
        num_prefills=num_prefills,
        batch_size=len(LENGTHS),
        query_start_loc=CU,
        has_initial_states=torch.tensor([True, True, False, True]),
    )
    entry = lightning_backend.LightningAttentionBackend._linear_attention_entry
    out = entry(backend, q, k, v, pool, ROWS, metadata, SimpleNamespace(layer_id=1, scaling=K**-0.5), **options)
    initial = pool_of(H, K, K)[[4, 3, 1, 2]]
    initial[[1, 2]] = 0  # no slot, and a slot of an earlier request
    truth = recurrent_lightning(q, k, v, slopes, initial_state=initial, cu_seqlens=CU)
    return out, pool, truth


def test_lightning(monkeypatch):
    monkeypatch.setattr(lightning_backend, "seg_la_fwd", None)
    out, pool, (want, states) = lightning_call(
        track_lens=torch.tensor([0, 0, 0, 64]), track_state_indices=torch.tensor([-1, -1, -1, 5])
    )
    assert error(out, want) < LIMIT
    assert all(error(pool[slot], states[n]) < LIMIT for n, slot in ((0, 4), (2, 1), (3, 2)))
    untouched = pool_of(H, K, K)
    assert torch.equal(pool[[0, 3]], untouched[[0, 3]])
    assert not torch.equal(pool[5], untouched[5]), "the tracked state was not stored"


@pytest.mark.parametrize(
    ("num_prefills", "options"), [(0, {}), (4, {"temp_cache": torch.zeros(1)}), (4, {"mask": torch.zeros(1)})]
)
def test_lightning_decode_and_verification_are_sglangs(monkeypatch, num_prefills, options):
    calls = []
    monkeypatch.setattr(lightning_backend, "seg_la_fwd", lambda **given: calls.append(given))
    lightning_call(num_prefills, **options)
    assert len(calls) == 1
    assert calls[0]["caches"] is options.get("temp_cache")


def flags(monkeypatch, **values):
    names = ("linear_attn_backend", "linear_attn_decode_backend", "linear_attn_verify_backend")
    given = {**dict.fromkeys(names), "linear_attn_backend": "triton", "linear_attn_prefill_backend": None, **values}
    context = SimpleNamespace(mamba=SimpleNamespace(**given))
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: context)


@pytest.mark.parametrize("phase", ["backend", "decode_backend", "verify_backend"])
def test_other_phases_are_refused(monkeypatch, phase):
    flags(monkeypatch, **{f"linear_attn_{phase}": "prfaas"})
    with pytest.raises(LaunchError, match="prefill only; write --linear-attn-prefill-backend prfaas instead"):
        hooks._resolve(lambda prefill_default: None)


def test_a_hook_that_does_not_hold_stops_the_server_only_where_it_is_asked_for(monkeypatch):
    broken = Hook("sglang.srt.layers.attention.linear.utils.no_such_thing", "around", (), "is made up")
    monkeypatch.setattr(hooks, "KERNELS", (*hooks.KERNELS, broken))
    flags(monkeypatch)
    assert hooks._resolve(lambda prefill_default: "stock") == "stock"
    flags(monkeypatch, linear_attn_prefill_backend="prfaas")
    with pytest.raises(LaunchError, match=r"prefill-backend prfaas cannot be served by this SGLang:\n.*no_such_thing"):
        hooks._resolve(lambda prefill_default: None)
