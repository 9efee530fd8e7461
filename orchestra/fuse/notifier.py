"""A tiny process that passes notifications on to the kernel, and may wait for it.

Run as a script (`python -I -S notifier.py DEVICE_FD`) with its standard input a socket of whole messages: each is
written to the device, and answered with one byte when the kernel has taken it. The kernel takes the lock of the
directory that a notification is about, and a look-up that waits for a worker holds it: a process that writes one can
then not even be killed. So no worker does it: a worker that is killed must be gone, for the next to have the look-up
sent again. It ends with the other side of the socket. It imports nothing of orchestra.
"""

from __future__ import annotations

import contextlib
import os
import sys

MESSAGE_BYTES_MAX = 8192
_DESCRIPTORS_MAX = 2**31 - 1


def main() -> None:
    """Pass messages on until there are no more."""
    device_fd = int(sys.argv[1])
    # What else the worker had: above all the pipe that tells the watcher when all who serve are dead.
    os.closerange(3, device_fd)
    os.closerange(device_fd + 1, _DESCRIPTORS_MAX)
    try:
        while message := os.read(0, MESSAGE_BYTES_MAX):
            with contextlib.suppress(OSError):  # the kernel does not know the name, or the mount is gone
                os.write(device_fd, message)
            os.write(0, b".")
    except (ConnectionError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    main()
