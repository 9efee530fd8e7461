"""A folder shown again through FUSE by pyfuse3 (Cython over libfuse, trio), the least that reads: for fuse.py.

python benchmarks/loopback_pyfuse3.py FOLDER MOUNTPOINT
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import pyfuse3
import trio

_TIMEOUT_S = 3600


class Loopback(pyfuse3.Operations):
    """Passes reads on to the folder; an inode is a number for a path, kept for good."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.paths = {pyfuse3.ROOT_INODE: root}
        self.inodes = {root: pyfuse3.ROOT_INODE}

    def _attributes(self, path: str) -> Any:
        try:
            found = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        entry = pyfuse3.EntryAttributes()
        inode = self.inodes.setdefault(path, len(self.inodes) + 1)
        self.paths[inode] = path
        entry.st_ino = inode
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size"):
            setattr(entry, name, getattr(found, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(found, name))
        entry.entry_timeout = entry.attr_timeout = _TIMEOUT_S
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        """A name."""
        return self._attributes(f"{self.paths[parent_inode]}/{os.fsdecode(name)}")

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        """Attributes."""
        return self._attributes(self.paths[inode])

    async def opendir(self, inode: int, ctx: Any) -> int:
        """A folder."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """Names of a folder."""
        folder = self.paths[fh]
        for index, name in enumerate(sorted(os.listdir(folder))[start_id:], start_id + 1):
            attributes = self._attributes(f"{folder}/{name}")
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, index):
                return

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """Open a file."""
        return pyfuse3.FileInfo(fh=os.open(self.paths[inode], flags), keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of a file."""
        return os.pread(fh, size, off)

    async def release(self, fh: int) -> None:
        """Close a file."""
        os.close(fh)


if __name__ == "__main__":
    pyfuse3.init(Loopback(sys.argv[1]), sys.argv[2], {"fsname=loopback", "ro"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)
