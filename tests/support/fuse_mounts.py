"""What the tests on a real mount share: the condition, and mounts that end with their test."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fuse_server import Server

needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="mounting needs root and /dev/fuse"
)
MakeServer = Callable[..., Server]


@contextmanager
def servers(tmp_path: Path) -> Iterator[MakeServer]:
    """Give a function that mounts a folder; everything it mounted is unmounted at the end, whatever happened."""
    with ExitStack() as stack:

        def make(folder: Path, name: str = "mnt", **options: Any) -> Server:
            target = tmp_path / name
            target.mkdir()
            server = Server(folder, target, **options)
            stack.callback(server.close)
            return server

        yield make


@contextmanager
def device_for_everybody() -> Iterator[None]:
    """Let every user open /dev/fuse in the block, as udev has it; one test at a time, as each puts the mode back."""
    lock_path = Path(tempfile.gettempdir(), f"orchestra-tests-device-{os.geteuid()}.lock")
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mode = os.stat("/dev/fuse").st_mode
        os.chmod("/dev/fuse", 0o666)
        try:
            yield
        finally:
            os.chmod("/dev/fuse", mode)


def read_count(server: Server) -> int:
    """How many READ requests have reached the process."""
    return server.counters().get("READ", 0)
