"""SGLang's description of its caches as shardings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_prfaas.sglang_plugin.shardings import page_shardings, state_shardings
from sglang_prfaas.transport.layout import Sharding


def test_the_latent_of_mla_is_the_same_everywhere() -> None:
    assert page_shardings([320, 320], 16, "", 0, 2) == (Sharding(2),)


def test_heads_are_divided_by_token() -> None:
    keys, values = 16 * 2 * 64 * 2, 16 * 2 * 32 * 2
    assert page_shardings([keys, keys, values, values], 16, "nhd", 4, 2) == (
        Sharding(2, 16, (4,), 128),
        Sharding(2, 16, (4,), 64),
    )


def test_a_head_that_several_ranks_have() -> None:
    assert page_shardings([16 * 128], 16, "", 2, 4) == (Sharding(1, 16, (2,), 128),)


def test_what_cannot_be_told() -> None:
    assert page_shardings([16 * 128], 16, "page_major", 2, 2) == ()
    assert page_shardings([16 * 128 + 1], 16, "", 2, 2) == ()
    assert state_shardings(_states([100], [], [], []), 0, 2) == ()
    assert state_shardings(_states([101], [10], [1], [None]), 0, 2) == ()


def _states(sizes: list[int], dims: list[int], rows: list[int], groups: list[Any]) -> Any:
    return SimpleNamespace(
        state_item_lens=[sizes],
        state_dim_per_tensor=[dims],
        state_slice_outer_counts=[rows],
        state_conv_shard_groups=[groups],
    )


def test_states_of_kimi_linear_at_width_two() -> None:
    """Convolution rows [3, q | k | v], recurrent state [heads, 32, 32] in float32, two layers of each."""
    conv, state = 3 * 192 * 4, 2 * 32 * 32 * 4
    args = _states([conv, conv, state, state], [192, 192, 2, 2], [3, 3, 1, 1], [[128] * 3, [128] * 3, None, None])
    assert state_shardings(args, 0, 2) == (
        Sharding(2, 3, (128, 128, 128), 4),
        Sharding(2, 1, (4,), 4096),
    )


def test_a_state_that_is_the_same_everywhere_and_sections_that_do_not_add_up() -> None:
    args = _states([64, 80], [0, 20], [1, 1], [None, [10, 10]])
    assert state_shardings(args, 0, 2) == (Sharding(1), Sharding(1, 1, (40,), 4))
