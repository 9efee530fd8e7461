"""What the tests on a real mount share: the condition, and mounts that end with their test."""

from __future__ import annotations

import os
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


def read_count(server: Server) -> int:
    """How many READ requests have reached the process."""
    return server.counters().get("READ", 0)
