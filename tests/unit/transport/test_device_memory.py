"""Items in torch tensors, with and without the `kv_pack` kernels; on a CUDA device where there is one."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("msgspec")
torch = pytest.importorskip("torch")

from sglang_prfaas.transport.device_memory import DeviceRows, TorchBuffer  # noqa: E402
from sglang_prfaas.transport.memory import HostBuffer, RankMemory  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SLOTS, ITEM_BYTES = 24, 96

on_each_device = pytest.mark.parametrize("device", DEVICES)
with_and_without = pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kv_pack"])


def some_items(item_bytes: int = ITEM_BYTES) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (SLOTS, item_bytes), dtype=np.uint8)


def buffer(items: np.ndarray, device: str, *, kernels: bool) -> TorchBuffer:
    """With a copy of `items`."""
    made = TorchBuffer(torch.from_numpy(items.copy()).to(device))
    made._rows = DeviceRows(made.items, kernels=kernels)
    return made


@on_each_device
@with_and_without
@pytest.mark.parametrize("locked", [False, True], ids=["pageable", "staging"])
def test_bytes_are_gathered_as_from_the_host(device: str, kernels: bool, locked: bool) -> None:
    items = some_items()
    host = HostBuffer(items.ctypes.data, items.nbytes, ITEM_BYTES)
    ours = buffer(items, device, kernels=kernels)
    slots = np.random.default_rng(4).permutation(SLOTS)[:9].astype(np.int64)
    for offset, length in [(0, 9 * ITEM_BYTES), (ITEM_BYTES, 3 * ITEM_BYTES), (40, 17), (90, 200), (500, 364)]:
        got = RankMemory([[ours]]).staging(length) if locked else np.empty(length, np.uint8)
        want = np.empty(length, np.uint8)
        ours.gather(slots, 0, offset, got)
        host.gather(slots, 0, offset, want)
        assert (got == want).all()
        assert ours.views(slots, 0, offset, length) == []


@on_each_device
@with_and_without
def test_bytes_are_scattered_as_to_the_host(device: str, kernels: bool) -> None:
    items = some_items()
    host = HostBuffer(items.ctypes.data, items.nbytes, ITEM_BYTES)
    ours = buffer(items, device, kernels=kernels)
    slots = np.random.default_rng(5).permutation(SLOTS)[:9].astype(np.int64)
    for offset, length in [(0, 9 * ITEM_BYTES), (2 * ITEM_BYTES, ITEM_BYTES), (40, 17), (90, 200)]:
        data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
        ours.scatter(slots, 0, offset, data)
        host.scatter(slots, 0, offset, data)
        assert (ours.items.cpu().numpy() == items).all()


@on_each_device
@with_and_without
def test_whole_items_stay_on_the_device(device: str, kernels: bool) -> None:
    items = some_items()
    slots = np.array([7, 0, 23, 11], np.int64)
    rows = buffer(items, device, kernels=kernels).rows(slots, 2, 3 * ITEM_BYTES, 2 * ITEM_BYTES)
    assert rows.device.type == device
    assert (rows.cpu().numpy() == items[slots[1:3]]).all()


@on_each_device
@pytest.mark.parametrize("kernels_there", [False, True])
def test_the_kernels_are_used_where_they_are_of_use(
    device: str, kernels_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels_there:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    whole = DeviceRows(torch.zeros(4, 64, dtype=torch.uint8, device=device))
    odd = DeviceRows(torch.zeros(4, 63, dtype=torch.uint8, device=device))
    assert (whole._table is not None) == (device == "cuda" and kernels_there)
    assert odd._table is None


@on_each_device
def test_staging_is_page_locked_where_a_device_is_to_copy_to_it(device: str) -> None:
    memory = RankMemory([[TorchBuffer(torch.zeros(2, 64, dtype=torch.uint8, device=device))]])
    staging = memory.staging(1000)
    assert staging.shape == (1000,)
    assert staging.dtype == np.uint8
    assert torch.from_numpy(staging).is_pinned() == (device == "cuda")
