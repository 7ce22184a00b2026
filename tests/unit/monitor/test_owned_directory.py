"""Directories that do not outlive their owner for long."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_prfaas.monitor.owned_directory import OwnedDirectory, new_path, remove_abandoned

OWNER = """
import sys
from pathlib import Path
from sglang_prfaas.monitor.owned_directory import OwnedDirectory
owned = OwnedDirectory(Path(sys.argv[1]))
(owned.path / "links").write_text("x")
(owned.path / "deeper").mkdir()
(owned.path / "deeper" / "file").write_text("x")
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sglang_prfaas.monitor.owned_directory._OTHERWISE", str(tmp_path))
    return tmp_path


def test_made_and_removed(temporary: Path) -> None:
    path = new_path("metrics")
    assert path.name.startswith("prfaas-metrics-")
    owned = OwnedDirectory(path)
    assert path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileExistsError):
        OwnedDirectory(path)
    (path / "socket").touch()
    owned.remove()
    owned.remove()
    assert not list(temporary.iterdir())


def test_a_path_is_short_enough_for_sockets(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_path().parent == temporary
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 80)
    assert new_path("metrics").parent == temporary


def test_what_a_killed_owner_left_is_removed_and_nothing_else(temporary: Path) -> None:
    left, own = temporary / "prfaas-left", OwnedDirectory(temporary / "prfaas-own")
    (temporary / "prfaas-without-a-lock").mkdir()
    (temporary / "prfaas-link").symlink_to(own.path)
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"made\n"
        assert remove_abandoned() == []
        assert (left / "links").exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert remove_abandoned() == [left]
    assert sorted(path.name for path in temporary.iterdir()) == ["prfaas-link", "prfaas-own", "prfaas-without-a-lock"]
    assert remove_abandoned() == []
    own.remove()
    assert not own.path.exists()


def test_children_have_no_part_in_the_lock(temporary: Path) -> None:
    """Servers that still end while their launcher is gone do not keep its directories."""
    owned = OwnedDirectory(temporary / "prfaas-own")
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        lock, owned._lock = owned._lock, None
        assert lock is not None
        os.close(lock)
        assert remove_abandoned() == [owned.path]
        assert child.poll() is None


def test_many_who_remove_at_once_remove_each_once(temporary: Path) -> None:
    for number in range(50):
        owned = OwnedDirectory(temporary / f"prfaas-{number}")
        (owned.path / "links").touch()
        assert owned._lock is not None
        os.close(owned._lock)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_remove_in, [(str(temporary),)] * 2)
    assert not list(temporary.iterdir())


def _remove_in(directory: str) -> None:
    import tempfile

    tempfile.tempdir = directory
    remove_abandoned()


def test_what_cannot_be_deleted_is_found_again(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owned = OwnedDirectory(temporary / "prfaas-own")
    (owned.path / "deeper").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        owned.remove()
        assert owned.path.exists()
    assert remove_abandoned() == [owned.path]
