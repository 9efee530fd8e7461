"""Copies objects out of the namespace into local files, whole or not at all.

Owns: the temporary name, the rename, the check of the length. Leaves to others: which files, and how many at a time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestra.client.contract import Client, Handle
from orchestra.errors import StoreError
from orchestra.units import MIB
from orchestra.values import Entry

# One block: large enough that a call costs nothing beside the copy, small enough to start writing early.
PIECE_SIZE_BYTES = 4 * MIB


def read_pieces(handle: Handle) -> Iterator[memoryview]:
    """Yield the object's bytes in order, in pieces; a piece is valid until the next is asked for.

    Raises what `Handle.readinto` raises, and StoreError if the object ends early.
    """
    size_bytes = handle.entry.size_bytes
    buffer = memoryview(bytearray(min(PIECE_SIZE_BYTES, size_bytes)))
    offset = 0
    while offset < size_bytes:
        read_bytes = handle.readinto(offset, buffer[: size_bytes - offset])
        if read_bytes == 0:
            raise StoreError(f"{handle.entry.path} ended after {offset} of {size_bytes} bytes")
        yield buffer[:read_bytes]
        offset += read_bytes


def export_file(
    client: Client, entry: Entry, target: str | Path, progress: Callable[[int], object] | None = None
) -> None:
    """Write the bytes of exactly `entry.version` to the local file `target`, replacing it in one step.

    After an error nothing is left behind and an existing `target` is as it was, unless it is no regular file (a pipe,
    /dev/null), which is written to directly. `progress` is called with the bytes of each piece. Raises what the client
    raises, and plain OSError for the local side.
    """
    final = Path(os.path.realpath(target))
    handle = client.open(entry.path, entry=entry)
    try:
        if final.exists() and not stat.S_ISREG(final.stat().st_mode):
            _write(handle, final, progress)
            return
        temporary = final.with_name(f".orchestra-{os.urandom(8).hex()}.part")
        try:
            _write(handle, temporary, progress, create=True)
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)
    finally:
        handle.close()


def _write(handle: Handle, path: Path, progress: Callable[[int], object] | None, *, create: bool = False) -> None:
    with path.open("xb" if create else "wb") as file:
        for piece in read_pieces(handle):
            file.write(piece)
            if progress is not None:
                progress(len(piece))
