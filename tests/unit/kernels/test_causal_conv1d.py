"""The causal convolution against a loop over tokens in float64."""

import pytest
import torch
from prfaas_kernels.common import causal_conv1d, causal_conv1d_step

D, WIDTH = 6, 4


def _naive(x, weight, bias, past):
    """``x`` ``[D, T]``, ``past`` ``[D, WIDTH - 1]``; returns the outputs and the last inputs."""
    window, out = past.double(), []
    for t in range(x.shape[1]):
        window = torch.cat((window[:, -(WIDTH - 1) :], x[:, t : t + 1].double()), dim=1)
        out.append(torch.nn.functional.silu((window * weight.double()).sum(1) + bias.double()))
    return torch.stack(out, 1), window[:, -(WIDTH - 1) :]


@pytest.fixture
def case():
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(D, WIDTH, generator=rng), torch.randn(D, generator=rng)
    return weight, bias, torch.randn(5, D, WIDTH - 1, generator=rng), rng


@pytest.mark.parametrize("channel_last", [True, False])
def test_ragged_batch(case, channel_last):
    weight, bias, states, rng = case
    lengths, slots, warm = [1, 2, 3, 9, 5], [3, 0, 4, 1, -1], [True, False, True, False, True]
    x = torch.randn(sum(lengths), D, generator=rng).T if channel_last else torch.randn(D, sum(lengths), generator=rng)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    before = states.clone()
    out = causal_conv1d(
        x,
        weight,
        bias,
        conv_states=states,
        cu_seqlens=cu,
        cache_indices=torch.tensor(slots),
        has_initial_state=torch.tensor(warm),
    )
    for n, slot in enumerate(slots):
        rows = slice(int(cu[n]), int(cu[n + 1]))
        if slot == -1:
            assert not out[:, rows].any()
            continue
        past = before[slot] if warm[n] else torch.zeros(D, WIDTH - 1)
        want, last = _naive(x[:, rows], weight, bias, past)
        torch.testing.assert_close(out[:, rows].double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[slot].double(), last)
    assert torch.equal(states[2], before[2])


def test_steps_continue_a_prefill(case):
    weight, bias, states, rng = case
    x = torch.randn(D, 12, generator=rng)
    want, last = _naive(x, weight, bias, torch.zeros(D, WIDTH - 1))
    slots = torch.tensor([2])
    causal_conv1d(x[:, :7], weight, bias, conv_states=states, cu_seqlens=torch.tensor([0, 7]), cache_indices=slots)
    before = states.clone()
    for t in range(7, 12):
        both = x[:, t].expand(2, D)
        out = causal_conv1d_step(both, weight, bias, conv_states=states, cache_indices=torch.tensor([2, -1]))
        torch.testing.assert_close(out[0].double(), want[:, t], rtol=1e-5, atol=1e-5)
        assert not out[1].any()
    torch.testing.assert_close(states[2].double(), last)
    assert torch.equal(states[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_unknown_activation_is_refused(case):
    weight, bias, states, _ = case
    with pytest.raises(ValueError, match="'gelu'"):
        causal_conv1d(
            torch.zeros(D, 2), weight, bias, conv_states=states, cu_seqlens=torch.tensor([0, 2]), activation="gelu"
        )
