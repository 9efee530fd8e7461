"""What lies in extents/: the truth that accounts are brought in line with after an unclean stop.

Owns: telling files of ours from halves and strangers. Leaves to others: what is done about them (store).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from orchestra.blocks.layout import CacheLayout, is_extent_name


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
