"""One daemon owns one cache directory: a lock that the kernel releases whatever way the daemon ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

from orchestra.errors import CacheDirectoryError


class OwnerLock:
    """Held from construction to `release`. The file names the owner for people; the lock itself is what counts, so a
    file left by a dead daemon, or a pid used again, never keeps anybody out."""

    def __init__(self, path: Path, *, started: str) -> None:
        """Raises CacheDirectoryError naming the owner if another daemon has it."""
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(self._fd)
            os.close(self._fd)
            raise CacheDirectoryError(f"cache directory {path.parent} is in use by {owner}") from error
        with contextlib.suppress(OSError):  # no room for a name on a full disk: the lock is what counts
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "started": started}).encode(), 0)

    def is_in_place(self) -> bool:
        """Whether the locked file is still the one at its path: if not, the cache directory was removed or replaced,
        and another daemon may own what lies there now."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let the next daemon in."""
        os.close(self._fd)


def _owner(fd: int) -> str:
    try:
        body = json.loads(os.pread(fd, 4096, 0))
        return f"the daemon with pid {body['pid']}, started {body['started']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another daemon"
