"""Ids of LoRA adapters: of what is in their files, wherever these are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sglang_prfaas.sglang_plugin.adapter_ids import deterministic_id


def sglangs(name: str, path: str) -> str:
    return f"{name} at {path}"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "red"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 4}')
    (directory / "adapter_model.safetensors").write_bytes(bytes(100_000))
    (directory / "README.md").write_text("trained on Monday")
    return directory


def test_the_same_files_have_the_same_id_under_any_path(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "elsewhere")
    (copy / "README.md").write_text("copied on Tuesday")
    assert deterministic_id(sglangs, "red", str(adapter)) == deterministic_id(sglangs, "red", str(copy))


def test_two_names_of_one_adapter_are_two(adapter: Path) -> None:
    """SGLang keeps adapters by id."""
    assert deterministic_id(sglangs, "red", str(adapter)) != deterministic_id(sglangs, "rouge", str(adapter))


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_byte_is_another_adapter(adapter: Path, file: str) -> None:
    before = deterministic_id(sglangs, "red", str(adapter))
    data = bytearray((adapter / file).read_bytes())
    data[-2] ^= 1
    (adapter / file).write_bytes(data)
    assert deterministic_id(sglangs, "red", str(adapter)) != before


def test_a_name_on_a_hub_keeps_sglangs_id() -> None:
    assert deterministic_id(sglangs, "red", "someone/red-adapter") == "red at someone/red-adapter"
