"""Which implementation an operator takes, and the reason it gives."""

import logging

import pytest
import torch
from prfaas_kernels.common import dispatch


def _qkv(width=32, heads=(2, 4), dtype=torch.float32):
    return (
        torch.zeros(5, heads[0], width, dtype=dtype),
        torch.zeros(5, heads[0], width, dtype=dtype),
        torch.zeros(5, heads[1], width, dtype=dtype),
    )


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_cpu_tensors_take_torch_and_say_so_once(caplog, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._log.cache_clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert dispatch.choose("kda", *_qkv()) == ("torch", "the tensors are on the CPU")
        dispatch.choose("kda", *_qkv())
    assert [record.getMessage() for record in caplog.records] == ["kda runs on torch: the tensors are on the CPU"]


@pytest.mark.usefixtures("interpreter")
def test_the_interpreter_takes_triton():
    assert dispatch.choose("kda", *_qkv()).backend == "triton"
    assert dispatch.choose("kda", *_qkv(), backend="torch") == ("torch", "asked for")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("qkv", "reason"),
    [
        (_qkv(width=24), "K=24, V=24"),
        (_qkv(heads=(2, 3)), "3 value heads are no multiple of 2 key heads"),
        (_qkv(dtype=torch.float64), "torch.float64 is not supported"),
        (tuple(x.mT.contiguous().mT for x in _qkv()), "innermost dimension"),
    ],
)
def test_what_is_not_supported_falls_back_or_is_refused(qkv, reason):
    assert reason in dispatch.choose("kda", *qkv).reason
    with pytest.raises(ValueError, match="backend 'triton' can't run"):
        dispatch.choose("kda", *qkv, backend="triton")
