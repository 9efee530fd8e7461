"""A tiny process that detaches a mount when the process serving it dies, so that nobody meets a dead mount.

Run as a script (`python -I -S watcher.py FOLDER DEVICE`) with its standard input a pipe whose other end only those
who serve hold: the pipe ends when the last of them does, even by SIGKILL. A byte on it says that all is in order. It
imports nothing of orchestra, holds no /dev/fuse descriptor, and detaches only a mount that answers "not connected".

By the mount's DEVICE ("major:minor") it first aborts the connection: who tells the kernel of changes (notifier.py) may
wait for an answer that nobody is left to give, and keep the mount from being dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys

_CONNECTIONS = "/sys/fs/fuse/connections"
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


def abort(folder: str, device: str) -> None:
    """End the connection of the mount of that device on `folder`, if that is what is mounted there."""
    with open("/proc/self/mountinfo", "rb") as table:  # noqa: PTH123 - pathlib is not loaded here
        rows = [line.split(b" ") for line in table]
    # A number is not used again while its mount is there.
    shown = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes((byte,)) for byte in os.fsencode(folder))
    if any(row[2] == device.encode() and row[4] == shown for row in rows):
        with contextlib.suppress(OSError), open(f"{_CONNECTIONS}/{device.split(':')[1]}/abort", "wb") as control:  # noqa: PTH123
            control.write(b"1")


def main() -> None:
    """Wait for the pipe to end, then look."""
    if os.read(0, 1):
        return
    folder, device = sys.argv[1:]
    abort(folder, device)
    detach_if_dead(folder)


if __name__ == "__main__":
    main()
