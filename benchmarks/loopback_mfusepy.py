"""A folder shown again through FUSE by mfusepy (ctypes over libfuse), the least that reads: a contestant of fuse.py.

python benchmarks/loopback_mfusepy.py FOLDER MOUNTPOINT
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mfusepy


class Loopback(mfusepy.Operations):  # type: ignore[misc]
    """Passes reads on to the folder."""

    use_ns = True

    def __init__(self, root: str) -> None:
        self.root = root

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Attributes of a name."""
        found = os.lstat(self.root + path)
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
        times = {name: getattr(found, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        """Names of a folder."""
        return [".", "..", *os.listdir(self.root + path)]

    def open(self, path: str, flags: int) -> int:
        """Open a file."""
        return os.open(self.root + path, flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Bytes of a file."""
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> int:
        """Close a file."""
        os.close(fh)
        return 0


if __name__ == "__main__":
    options = {"kernel_cache": True, "entry_timeout": 3600, "attr_timeout": 3600, "ro": True}
    mfusepy.FUSE(Loopback(sys.argv[1]), sys.argv[2], foreground=True, **options)
