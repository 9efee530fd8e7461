"""Small documents of the daemon that must survive it: mounts that were added, pins, jobs.

Owns: how one is replaced. Leaves to others: what is in it, where it lies, and what a failure means.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_document(path: Path, document: bytes) -> None:
    """Write to a new file readable by the owner alone, synced, then renamed: there is the old one or the whole new one.

    Raises OSError.
    """
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(document)
        file.flush()
        os.fsync(fd)
    temporary.rename(path)
