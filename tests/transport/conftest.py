"""Every test here must leave no thread and no descriptor behind. Keys, and two ends of a mover that use them."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_prfaas.transport import vector
from sglang_prfaas.transport.vector import Vector
from tests.transport.keyring import Keyring
from tests.transport.rig import Pair, wait_until


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=["native", "python"])
def sending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How pages get to the socket, and from there."""
    made = 0
    make = vector._native_vector

    def counted(*args: Any) -> Vector:
        nonlocal made
        assert make is not None
        made += 1
        return make(*args)

    if request.param == "native" and make is None:
        pytest.skip(vector.why_not_native)
    monkeypatch.setattr(vector, "_native_vector", counted if request.param == "native" else None)
    yield str(request.param)
    assert (made > 0) is (request.param == "native")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    gc.collect()
    threads, open_before = set(threading.enumerate()), descriptors()
    yield
    gc.collect()
    wait_until(
        lambda: not [t for t in threading.enumerate() if t not in threads],
        f"end of threads, there are {[t.name for t in threading.enumerate() if t not in threads]}",
        20.0,
    )
    wait_until(lambda: descriptors() <= open_before, "all descriptors closed", 20.0)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring(tmp_path_factory.mktemp("strangers"))


@pytest.fixture
def pair(keyring: Keyring) -> Iterator[Pair]:
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as made:
        yield made
