"""Prefill attention over paged prefixes against float64."""

import pytest
import torch
from prfaas_kernels.full_attention import naive_prefill, prefill_attention

from tests.unit.kernels.triton_cases.conftest import FULL, FULL_LIMIT, HALF_LIMIT, error, marks, on_device

#: name -> (heads, key heads, K, V or None for values inside the keys)
SHAPES = {"gqa": (6, 2, 32, 32), "mha": (2, 2, 64, 16), "mla": (2, 2, 48, 32), "absorbed": (4, 1, 48, None)}


def case(shape, lengths, prefixes, *, page=4, dtype=torch.float32, spread=1.0, seed=0):
    """Pages of all sequences are shuffled over the pool; unused slots, and slots past a prefix's end, hold NaN."""
    rng = torch.Generator().manual_seed(seed)
    heads, key_heads, width, value_width = shape
    tokens, most = sum(lengths), max(1, max(-(-n // page) for n in prefixes))

    def random(*size):
        return (torch.randn(*size, generator=rng) * spread).to(dtype)

    shared = value_width is None
    values = 1 << (width.bit_length() - 1) if shared else value_width
    packed = random(tokens, heads * width + key_heads * (width + values))
    q, k, v = packed.split([heads * width, key_heads * width, key_heads * values], dim=-1)
    slots = (len(lengths) * most + 3) * page
    k_pool = torch.full((slots, key_heads, width), float("nan"), dtype=dtype)
    v_pool = torch.full((slots, key_heads, values), float("nan"), dtype=dtype)
    order = torch.randperm(len(lengths) * most + 3, generator=rng)[: len(lengths) * most].view(len(lengths), most)
    for pages, length in zip(order, prefixes, strict=True):
        token = torch.arange(length)
        rows = pages[token // page] * page + token % page
        k_pool[rows], v_pool[rows] = random(length, key_heads, width), random(length, key_heads, values)
    x = {
        "q": q.unflatten(-1, (heads, width)),
        "k": k.unflatten(-1, (key_heads, width)),
        "v": None if shared else v.unflatten(-1, (key_heads, values)),
        "cu_seqlens": marks(lengths),
        "k_pool": k_pool,
        "v_pool": None if shared else v_pool,
        "page_table": order.int(),
        "prefix_lens": torch.tensor(prefixes, dtype=torch.int32),
    }
    return x, {"page_size": page, "value_width": values}


def run(x, options):
    return prefill_attention(**{name: None if y is None else on_device(y) for name, y in x.items()}, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_ragged_batches_with_paged_prefixes(name):
    x, options = case(SHAPES[name], [70, 0, 1, 33], [5, 9, 70, 0])
    got = run(x, options)
    assert error(got, naive_prefill(**x, **options)) < FULL_LIMIT


@pytest.mark.parametrize("tokens", [1, 15, 17, 64, 130])
@pytest.mark.parametrize("name", ["gqa", "absorbed"])
def test_lengths_without_prefix(name, tokens):
    x, options = case(SHAPES[name], [tokens], [0])
    plain = {key: x[key] for key in ("q", "k", "v", "cu_seqlens")}
    value_width = {"value_width": options["value_width"]}
    want = naive_prefill(**plain, **value_width)
    got = run(plain, value_width)
    assert error(got, want) < FULL_LIMIT
    assert torch.equal(got, run(x, options))


@pytest.mark.parametrize("page", [1, 16, 64])
def test_page_sizes(page):
    x, options = case(SHAPES["gqa"], [20, 40], [63, 65], page=page)
    assert error(run(x, options), naive_prefill(**x, **options)) < FULL_LIMIT


@pytest.mark.parametrize(("name", "shape"), [("mla", (1, 1, 192, 128)), ("absorbed", (2, 1, 576, None))])
def test_widths_of_mla_in_bfloat16(name, shape):
    x, options = case(shape, [40], [50], page=16, dtype=torch.bfloat16)
    options["scale"] = 192**-0.5
    got = run(x, options)
    assert got.dtype == torch.bfloat16
    assert error(got, naive_prefill(**x, **options)) < HALF_LIMIT


def test_split_prefill_equals_one():
    """What the first part computed lies in pages when the second runs."""
    x, options = case(SHAPES["gqa"], [90], [0], page=4)
    whole = run({key: x[key] for key in ("q", "k", "v", "cu_seqlens")}, {})
    k_pool, v_pool = torch.zeros(64, *x["k"].shape[1:]), torch.zeros(64, *x["v"].shape[1:])
    k_pool[:50], v_pool[:50] = x["k"][:50], x["v"][:50]
    rest = {key: x[key][50:] for key in ("q", "k", "v")}
    prefix = {"page_table": torch.arange(16).view(1, 16), "prefix_lens": torch.tensor([50])}
    got = run({**rest, "cu_seqlens": marks([40]), "k_pool": k_pool, "v_pool": v_pool, **prefix}, options)
    torch.testing.assert_close(got, whole[50:], rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow():
    x, options = case(SHAPES["gqa"], [66], [20], spread=30.0)
    got = run(x, options)
    assert torch.isfinite(got).all()
    assert error(got, naive_prefill(**x, **options)) < 10 * FULL_LIMIT


def test_tokens_of_no_sequence_are_zeros():
    x, options = case(SHAPES["gqa"], [20, 9], [4, 4])
    x["cu_seqlens"] = marks([20])
    x["page_table"], x["prefix_lens"] = x["page_table"][:1], x["prefix_lens"][:1]
    got = run(x, options)
    assert error(got[:20], naive_prefill(**x, **options)[:20]) < FULL_LIMIT
    assert not got[20:].any()


def test_more_heads_in_a_group_than_rows_in_a_block():
    x, options = case((160, 1, 16, 16), [3], [2])
    assert error(run(x, options), naive_prefill(**x, **options)) < FULL_LIMIT


@pytest.mark.skipif(not FULL, reason="PRFAAS_KERNEL_TESTS=full")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_long_ragged_batches(name, dtype):
    x, options = case(SHAPES[name], [500, 3, 129], [70, 900, 0], page=64, dtype=dtype)
    limit = FULL_LIMIT if dtype == torch.float32 else HALF_LIMIT
    assert error(run(x, options), naive_prefill(**x, **options)) < limit
