"""Copies between HiCache's pools on a CPU, against plain loops."""

from __future__ import annotations

import torch

from sglang_prfaas.sglang_plugin.cpu_platform import hicache

LAYERS, PAGE_TOKENS, TOKENS = 3, 4, 32


def device_layers(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(TOKENS, *shape) for _ in range(LAYERS)]


def test_pages_go_to_the_host_and_back() -> None:
    k, v = device_layers(2, 8), device_layers(2, 8)
    host_k, host_v = (torch.full((6, LAYERS, PAGE_TOKENS, 2, 8), torch.nan) for _ in range(2))
    device = torch.tensor([8, 9, 10, 11, 28, 29, 30, 31])
    host = torch.tensor([20, 21, 22, 23, 4, 5, 6, 7])
    hicache.transfer_kv_all_layer_direct_lf_pf([*k, *v], [host_k, host_v], device, host, PAGE_TOKENS)
    for layer in range(LAYERS):
        for on_device, on_host in zip(device.tolist(), host.tolist(), strict=True):
            page, offset = divmod(on_host, PAGE_TOKENS)
            assert torch.equal(host_k[page, layer, offset], k[layer][on_device])
            assert torch.equal(host_v[page, layer, offset], v[layer][on_device])
    assert torch.isnan(host_k[[0, 2, 3, 4]]).all()

    back = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])
    for layer in range(LAYERS):
        new_k, new_v = torch.zeros(TOKENS, 2, 8), torch.zeros(TOKENS, 2, 8)
        hicache.transfer_kv_per_layer_direct_pf_lf([host_k, host_v], [new_k, new_v], host, back, layer, PAGE_TOKENS)
        assert torch.equal(new_k[back], k[layer][device])
        assert torch.equal(new_v[back], v[layer][device])
        assert not new_k[4:12].any()


def test_states_are_pages_of_one_slot() -> None:
    layers = device_layers(5)
    host = torch.zeros(7, LAYERS, 1, 5)
    hicache.transfer_kv_all_layer_direct_lf_pf(layers, [host], torch.tensor([3]), torch.tensor([6]), 1)
    back = torch.zeros(TOKENS, 5)
    hicache.transfer_kv_per_layer_direct_pf_lf([host], [back], torch.tensor([6]), torch.tensor([9]), 2, 1)
    assert torch.equal(back[9], layers[2][3])
    assert not host[:6].any()


def test_layers_go_token_by_token() -> None:
    source, destination = device_layers(4), device_layers(4)
    hicache.transfer_kv_direct(source, destination, torch.tensor([1, 5]), torch.tensor([7, 2]), 1)
    for one, other in zip(source, destination, strict=True):
        assert torch.equal(other[[7, 2]], one[[1, 5]])
