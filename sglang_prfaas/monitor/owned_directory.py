"""Directories for as long as a process: sockets and metrics of a site, below the system's temporary directory.

Whoever makes one holds a lock in it (flock), which the kernel takes away with the process, however that ends. So what
is left behind by a process that was killed can be told from what is in use, and the next site to start removes it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "prfaas-"
_LOCK = ".owner"
_MAX_PATH_BYTES = 90
"""The path of a Unix socket in it has at most 107."""
_OTHERWISE = "/tmp"


def new_path(purpose: str = "") -> Path:
    """A path for a directory that is yet to be made; short enough for sockets in it, wherever temporary files are."""
    name = f"{_PREFIX}{purpose}{'-' if purpose else ''}{secrets.token_hex(6)}"
    path = Path(tempfile.gettempdir(), name)
    return path if len(os.fsencode(path)) <= _MAX_PATH_BYTES else Path(_OTHERWISE, name)


class OwnedDirectory:
    """A directory of mode 0700, this process's until `remove`."""

    def __init__(self, path: Path) -> None:
        """path: of `new_path`. Raises OSError, also where it is there already."""
        if path.exists():
            raise FileExistsError(f"{path} is there already")
        self.path = path
        # It has its name once it is locked: nobody ever sees it without an owner.
        unnamed = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
        unnamed.mkdir(mode=0o700)
        try:
            self._lock: int | None = _open_lock(unnamed, os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(path)
        except BaseException:
            shutil.rmtree(unnamed, ignore_errors=True)
            raise

    def remove(self) -> None:
        """Delete it with all that is in it; what cannot be deleted is left to `remove_abandoned`. Idempotent."""
        if self._lock is not None:
            with suppress(OSError):
                _delete(self.path)
            os.close(self._lock)
            self._lock = None


def remove_abandoned() -> list[Path]:
    """Delete what owners that are gone have left of this user's directories. Returns their paths."""
    found = []
    for parent in dict.fromkeys((Path(tempfile.gettempdir()), Path(_OTHERWISE))):
        for path in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError):
                if _is_own(path) and _remove_if_abandoned(path):
                    found.append(path)
    return found


def _is_own(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _remove_if_abandoned(path: Path) -> bool:
    """Raises OSError where it has no lock, or one that is held."""
    lock = _open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _delete(path)
    finally:
        os.close(lock)
    return not path.exists()


def _open_lock(directory: Path, flags: int = 0) -> int:
    return os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _delete(directory: Path) -> None:
    """Its lock goes last: what cannot be deleted yet is found again."""
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != _LOCK:
            Path(entry.path).unlink(missing_ok=True)
    if os.listdir(directory) == [_LOCK]:
        (directory / _LOCK).unlink()
        with suppress(OSError):  # somebody has put something there just now
            directory.rmdir()
