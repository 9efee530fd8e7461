"""A tiny process that detaches a mount when the process serving it dies, so that nobody meets a dead mount.

Run as a script (`python -I -S watcher.py FOLDER`) with its standard input a pipe whose other end only the server holds:
the pipe ends when the server does, even by SIGKILL. It imports nothing of orchestra, holds no /dev/fuse descriptor, and
touches only a mount that answers "not connected", so it can never detach a living one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8


def detach_if_dead(folder: str) -> bool:
    """Detach `folder` lazily if it is a FUSE mount without a process; return whether it was."""
    try:
        os.statvfs(folder)  # stat could be answered from the kernel's cache
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            return False
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.umount2(os.fsencode(folder), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0)
    return subprocess.run(["fusermount3", "-u", "-z", "-q", "--", folder], check=False).returncode == 0


def main() -> None:
    """Wait for the pipe to end, then look."""
    while os.read(0, 1):
        pass
    detach_if_dead(sys.argv[1])


if __name__ == "__main__":
    main()
