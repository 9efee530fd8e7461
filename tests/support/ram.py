"""Folders in memory for tests that make whole cache directories: 800 folders each, which a disk is slow to remove; and
small disks, for tests that fill them.

Where there is no /dev/shm it is the usual temporary folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MEMORY = "/dev/shm"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@contextmanager
def ram_folder() -> Iterator[Path]:
    """A new folder with a short path, removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="orc-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def small_disk(target: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory, mounted at `target`."""
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)
