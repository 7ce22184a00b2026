from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_prfaas.store.fingerprint import model_fingerprint
from sglang_prfaas.store.identity import ComponentIdentity, ModelIdentity, namespace, object_name, shard_of

MODEL = ModelIdentity(model="m", fingerprint="f", dtype="bfloat16", kv_cache_dtype="auto", page_tokens=64)
KV = ComponentIdentity(name="kv", dtype="torch.bfloat16", page_bytes=4096, layout="page_first", shard="tp0of2")


def test_names_hold_component_and_page() -> None:
    name = object_name(namespace(MODEL, KV), "ab12")
    digest, component, page = name.split("/")
    assert (len(digest), component, page) == (32, "kv", "ab12")
    assert namespace(MODEL, KV) == namespace(MODEL, KV)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"fingerprint": "g"},
        {"revision": "r"},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"page_tokens": 16},
    ],
)
def test_what_changes_values_changes_names(change: dict[str, Any]) -> None:
    assert namespace(msgspec.structs.replace(MODEL, **change), KV) != namespace(MODEL, KV)


@pytest.mark.parametrize(
    "change", [{"dtype": "torch.uint8"}, {"page_bytes": 2048}, {"layout": "layer_first"}, {"shard": "tp1of2"}]
)
def test_what_changes_bytes_changes_names(change: dict[str, Any]) -> None:
    assert namespace(MODEL, msgspec.structs.replace(KV, **change)) != namespace(MODEL, KV)


def test_replicated_shards_are_one_for_all_ranks() -> None:
    one, two = (shard_of(replicated=True, tp=tp, pp=(0, 1), cp=(0, 1)) for tp in ((0, 1), (3, 4)))
    assert one == two == "all"
    assert shard_of(replicated=True, tp=(0, 4), pp=(1, 2), cp=(0, 1)) == "pp1of2"
    assert shard_of(replicated=False, tp=(1, 2), pp=(0, 1), cp=(0, 2)) == "tp1of2-cp0of2"


def test_fingerprint_follows_config_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    before = model_fingerprint(str(tmp_path))
    assert before == model_fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("of no meaning")
    assert before == model_fingerprint(str(tmp_path))
    with weights.open("r+b") as file:
        file.seek(512 << 10)
        file.write(b"x")
    changed = model_fingerprint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"rope": 1}')
    assert len({before, changed, model_fingerprint(str(tmp_path))}) == 3


def test_a_name_on_a_hub_has_no_fingerprint() -> None:
    assert model_fingerprint("owner/no-such-directory") == ""
