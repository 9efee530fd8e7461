"""What a daemon that was killed left: what lies in extents/, the truth that accounts are brought in line with, and what
was ready to be put there.

Owns: telling files of ours from halves and strangers, and whole ones from unfinished. Leaves to others: what is done
about the former (store).
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import REMOVED_SUFFIX, CacheLayout, is_extent_name
from orchestra.blocks.reader import OPEN_FLAGS, read_seal


@dataclass(slots=True)
class FoundFiles:
    """Sizes on disk by extent name; paths that lost their other half; paths that no cache ever wrote."""

    sizes: dict[str, int] = field(default_factory=dict)
    halves: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def find_files(layout: CacheLayout) -> FoundFiles:
    """Walk over all of extents/."""
    found = FoundFiles()
    for number in range(256):
        _find_in(f"{layout.prefix}/extents/{number:02x}", found)
    return found


def _find_in(folder: str, found: FoundFiles) -> None:
    with os.scandir(folder) as entries:
        files = {entry.name: entry for entry in entries}
    for file_name, entry in files.items():
        stem, _, suffix = file_name.rpartition(".")
        partner = {"ext": f"{stem}.map", "map": f"{stem}.ext", "seal": stem}.get(suffix)
        name = stem if suffix in ("ext", "map", "seal") else file_name
        if not is_extent_name(name) or not entry.is_file(follow_symlinks=False):
            found.strangers.append(entry.path)
        elif partner is not None and partner not in files:
            found.halves.append(entry.path)
        elif suffix not in ("map", "seal"):
            found.sizes[name] = entry.stat(follow_symlinks=False).st_blocks * 512


def adopt_ready(layout: CacheLayout, geometry: Geometry) -> int:
    """Put those small objects in their places that were ready in tmp/, waiting for a daemon that is no more; return how
    many. A load has up to some hundred there, and would fetch them again.

    The seal is written last and names object, size and checksum: such a file is whole, and is checked as any other.
    What was removed (freed, evicted, found damaged) lies there under a name that says so, and does not come back.
    """
    count = 0
    for entry in os.scandir(layout.tmp):
        if entry.name.endswith(REMOVED_SUFFIX):
            continue
        try:
            fd = os.open(entry.path, OPEN_FLAGS)
        except OSError:
            continue
        try:
            seal, info = read_seal(entry.path, fd), os.fstat(fd)
        finally:
            os.close(fd)
        if seal is None or not stat.S_ISREG(info.st_mode) or info.st_size != seal.size_bytes:
            continue
        if geometry.is_small(seal.size_bytes):
            with contextlib.suppress(OSError):  # then it is fetched again
                os.rename(entry.path, layout.small_file(seal.digest.hex()))
                count += 1
    return count
