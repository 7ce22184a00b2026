"""Which prefill inputs go to our kernels, and the reason where they do not; no SGLang needed."""

import logging

import pytest
import torch

from sglang_prfaas.sglang_plugin.linear_attention import contracts

T, H, HV, K, V = 5, 2, 4, 32, 16


def _delta(device="cpu", width=K, **changed):
    given = {
        "q": torch.zeros(1, T, H, width, device=device),
        "k": torch.zeros(1, T, H, width, device=device),
        "v": torch.zeros(1, T, HV, V, device=device),
        "gate": torch.zeros(1, T, HV, width, device=device),
        "beta": torch.zeros(1, T, HV, device=device),
        "ssm_states": torch.zeros(3, HV, V, width, device=device),
        "cache_indices": torch.zeros(2, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2, T]),
    }
    return contracts.delta_obstacle(**{**given, **changed})


@pytest.mark.parametrize("gate", [torch.zeros(1, T, HV), torch.zeros(1, T, HV, K), torch.zeros(1, T, HV * K)])
def test_gates_per_head_and_per_channel_are_taken(gate):
    assert _delta(gate=gate) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"q": torch.zeros(2, T, H, K)}, "expected one packed batch"),
        ({"ssm_states": torch.zeros(3, HV, K, V)}, "states of shape (4, 32, 16), expected [HV, V, K]"),
        ({"gate": torch.zeros(1, T, H)}, "do not fit 5 tokens of 4 heads"),
        ({"beta": torch.zeros(1, T, H)}, "do not fit 5 tokens of 4 heads"),
        ({"gate": torch.zeros(1, T, K, HV).mT}, "innermost dimension of the gate"),
        ({"cache_indices": torch.zeros(3)}, "3 state slots for 2 sequences"),
    ],
)
def test_other_layouts_are_not(changed, reason):
    assert reason in _delta(**changed)


def test_what_the_kernels_lack_matters_only_off_the_cpu():
    assert _delta(width=24) is None
    assert _delta(device="meta") == "device meta is not supported"


def _gate(a_log=(HV,), dt_bias=(HV * K,), speculative=False):
    a_log, dt_bias = (None if shape is None else torch.zeros(shape) for shape in (a_log, dt_bias))
    return contracts.kda_obstacle(a_log, dt_bias, HV, K, speculative=speculative)


def test_parameters_of_kdas_gate():
    assert _gate() is None
    assert _gate(a_log=(1, 1, HV, 1), dt_bias=None) is None
    assert _gate(speculative=True) == "a speculative draft must not commit its states"
    assert _gate(a_log=(H,)) == "A_log has 2 values for 4 value heads"
    assert _gate(dt_bias=(HV,)) == "dt_bias has 4 values, expected HV K = 128"
    assert contracts.kda_obstacle(torch.zeros(2 * HV)[::2], None, HV, K, speculative=False) is not None


def _lightning(q=(T, H, K), states=(3, H, K, V)):
    q, k, v = torch.zeros(q), torch.zeros(T, H, K), torch.zeros(T, H, V)
    return contracts.lightning_obstacle(q, k, v, torch.zeros(states), torch.zeros(1), torch.tensor([0, T]))


def test_lightning():
    assert _lightning() is None
    assert "expected [T, H, D] twice" in _lightning(q=(T, HV, K))
    assert "do not fit 2 heads" in _lightning(states=(3, H, V, K))


def test_a_reason_is_logged_once_for_each_operator(caplog):
    contracts.log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger=contracts.__name__):
        for operator in ("KDA", "KDA", "GDN"):
            contracts.log_fallback(operator, "a test")
    assert [record.getMessage() for record in caplog.records] == [
        "prfaas: prefill of KDA stays with SGLang's own kernel: a test",
        "prfaas: prefill of GDN stays with SGLang's own kernel: a test",
    ]


def test_snapshots_out_of_the_states_of_all_chunks():
    lengths = [17, 0, 130, 64]
    marks = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    states = torch.arange(1 + 0 + 3 + 1).float().view(1, -1, 1, 1, 1).expand(1, -1, HV, V, K)
    rows = contracts.snapshot_rows(states, torch.tensor([0, -1, 2, -1]), marks)
    assert rows.shape == (4, HV, V, K)
    assert rows[[0, 2], 0, 0, 0].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [([17, 64], 64), (torch.tensor([17, 64]), 64), ([], None), (torch.tensor([]), None), (None, None)],
)
def test_the_longest_length_is_read_where_it_is_on_the_host(lengths, longest):
    assert contracts.longest_tokens(lengths) == longest
    assert contracts.longest_tokens(torch.zeros(2, device="meta")) is None
