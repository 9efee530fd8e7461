"""Folders in memory for tests that make whole cache directories: 800 folders each, which a disk is slow to remove.

Where there is no /dev/shm it is the usual temporary folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY = "/dev/shm"


@contextmanager
def ram_folder() -> Iterator[Path]:
    """A new folder with a short path, removed in the end."""
    folder = Path(tempfile.mkdtemp(prefix="orc-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
