"""The CPU platform's paged attention against a dense float64 softmax; no SGLang needed."""

from types import SimpleNamespace

import pytest
import torch

from sglang_prfaas.sglang_plugin.cpu_platform import attention, elementwise

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, ROWS, SCALING = 4, 2, 32, 16, 2500, 0.2


def _dense(q, k, v, prefix, window, sinks):
    groups = HEADS // KV_HEADS
    k, v = k.repeat_interleave(groups, 1).double(), v.repeat_interleave(groups, 1).double()
    scores = torch.einsum("thd,shd->hts", q.double(), k) * SCALING
    at = torch.arange(prefix, prefix + q.shape[0]).unsqueeze(1)
    keys = torch.arange(k.shape[0]).unsqueeze(0)
    seen = keys <= at if window is None else (keys <= at) & (keys >= at - window)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(-1, 1, 1).expand(-1, q.shape[0], 1)), -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : k.shape[0]], v)


@pytest.mark.parametrize("window_pool", [False, True])
@pytest.mark.parametrize(
    ("lengths", "prefixes", "window", "with_sinks"),
    [
        ([1300], [700], None, False),
        ([600, 3], [40, 500], 127, False),
        ([513, 1], [0, 200], 127, True),
        ([5], [0], None, True),
        ([1, 1, 1], [50, 0, 900], 16, True),
        ([1, 1], [50, 900], None, False),
    ],
)
def test_paged_attention(lengths, prefixes, window, with_sinks, window_pool):
    rng = torch.Generator().manual_seed(0)
    k_cache = torch.randn(ROWS, KV_HEADS, WIDTH, generator=rng)
    v_cache = torch.randn(ROWS, KV_HEADS, VALUE_WIDTH, generator=rng)
    place = torch.randperm(ROWS, generator=rng)
    totals = [length + prefix for length, prefix in zip(lengths, prefixes, strict=True)]
    req_to_token = torch.zeros(8, ROWS, dtype=torch.int32)
    marks = torch.tensor([0, *totals]).cumsum(0).tolist()
    for n, total in enumerate(totals):
        req_to_token[n + 2, :total] = place[marks[n] : marks[n] + total].int()
    in_window_pool = window_pool and window is not None
    # A window pool holds a token at another row than the full pool does.
    translate = torch.arange(ROWS).roll(1) if in_window_pool else torch.arange(ROWS)
    backend = SimpleNamespace(
        use_sliding_window_kv_pool=window_pool,
        req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
        token_to_kv_pool=SimpleNamespace(
            get_key_buffer=lambda layer_id: k_cache,
            get_value_buffer=lambda layer_id: v_cache,
            translate_loc_from_full_to_swa=lambda rows: translate[rows],
        ),
    )
    layer = SimpleNamespace(
        is_cross_attention=False,
        sliding_window_size=-1 if window is None else window,
        scaling=SCALING,
        attn_type=SimpleNamespace(name="DECODER"),
        tp_q_head_num=HEADS,
        qk_head_dim=WIDTH,
        v_head_dim=VALUE_WIDTH,
        layer_id=0,
    )
    batch = SimpleNamespace(
        req_pool_indices=torch.arange(2, 2 + len(lengths)),
        seq_lens=torch.tensor(totals),
        extend_seq_lens=torch.tensor(lengths),
    )
    q = torch.randn(sum(lengths), HEADS * WIDTH, generator=rng)
    sinks = torch.randn(HEADS, generator=rng) if with_sinks else None
    forward = attention.forward_decode if set(lengths) == {1} else attention.forward_extend
    got = forward(backend, q, None, None, layer, batch, save_kv_cache=False, sinks=sinks)
    begin = 0
    for n, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        rows = translate[req_to_token[n + 2, : totals[n]].long()]
        query = q[begin : begin + length].view(length, HEADS, WIDTH)
        want = _dense(query, k_cache[rows], v_cache[rows], prefix, window, sinks)
        torch.testing.assert_close(got[begin : begin + length].double(), want.reshape(length, -1), rtol=1e-4, atol=1e-5)
        begin += length


def test_projection_split_follows_key_heads():
    heads_qk, heads_v, qk, v, tokens = 2, 4, 3, 5, 6
    group = heads_v // heads_qk
    mixed = torch.arange(tokens * heads_qk * (2 * qk + 2 * group * v)).float().view(tokens, -1)
    ba = torch.arange(tokens * heads_v * 2).float().view(tokens, -1)
    mixed_qkv, z, b, a = elementwise.fused_qkvzba_split_reshape_cat(mixed, ba, heads_qk, heads_v, qk, v)
    by_head = mixed.view(tokens, heads_qk, -1)
    assert torch.equal(mixed_qkv[:, : heads_qk * qk], by_head[..., :qk].reshape(tokens, -1))
    assert torch.equal(mixed_qkv[:, heads_qk * qk : 2 * heads_qk * qk], by_head[..., qk : 2 * qk].reshape(tokens, -1))
    assert torch.equal(z[:, group:], by_head[:, 1, -group * v :].view(tokens, group, v))
    assert torch.equal(b, ba.view(tokens, heads_qk, 2, group)[:, :, 0].reshape(tokens, -1))
    assert torch.equal(a, ba.view(tokens, heads_qk, 2, group)[:, :, 1].reshape(tokens, -1))


@pytest.mark.parametrize("gate_first", [False, True])
def test_grouped_gated_norm(gate_first):
    rng = torch.Generator().manual_seed(0)
    x, z, weight = (torch.randn(5, 12, generator=rng) for _ in range(3))
    got = elementwise.layernorm_fn(
        x, weight[0], None, z, group_size=4, norm_before_gate=not gate_first, is_rms_norm=True, activation="sigmoid"
    )
    value = x * z.sigmoid() if gate_first else x
    groups = value.view(5, 3, 4)
    want = (groups / (groups.square().mean(-1, keepdim=True) + 1e-6).sqrt()).view(5, 12) * weight[0]
    torch.testing.assert_close(got, want if gate_first else want * z.sigmoid())
