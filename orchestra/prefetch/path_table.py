"""The paths of a data set, by index, small enough to keep ten million of them: how they travel and how they are held.

A group is 64 paths, joined with NUL and deflated: names that are numbered compress to a few bytes each, and finding one
inflates 4 KiB (9 us). A part is 1,024 groups, one message. The same bytes are sent and kept. No pickle, and nothing is
inflated to more than 64 paths can be.

Owns: packing, unpacking, what is missing. Leaves to others: what the paths are for (plan), sending them (client).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

import xxhash

from orchestra.errors import UsageError

PATHS_PER_GROUP = 64
GROUPS_PER_PART = 1024
PATHS_PER_PART = PATHS_PER_GROUP * GROUPS_PER_PART
# 64 Mi samples: their order takes 256 MiB of memory, their paths some hundred. Larger sets are read in larger files.
PATHS_MAX = 1 << 26
# Of the deflated paths of one table; names that do not compress at all reach it at about 8 million.
TABLE_BYTES_MAX = 512 * 1024 * 1024
# A path is at most 4,095 bytes (PATH_MAX).
_GROUP_BYTES_MAX = PATHS_PER_GROUP * 4096
_LENGTH = struct.Struct("<I")


def pack_paths(paths: Sequence[str]) -> Iterator[bytes]:
    """Yield the parts. Raises UsageError for a path with a NUL or a set that is too large."""
    if len(paths) > PATHS_MAX:
        raise UsageError(f"a plan is for at most {PATHS_MAX} samples, not {len(paths)}")
    for start in range(0, len(paths), PATHS_PER_PART):
        part = bytearray()
        for at in range(start, min(start + PATHS_PER_PART, len(paths)), PATHS_PER_GROUP):
            group = "\0".join(paths[at : at + PATHS_PER_GROUP])
            if group.count("\0") != min(PATHS_PER_GROUP, len(paths) - at) - 1:
                raise UsageError("a path holds a NUL byte")
            deflated = zlib.compress(group.encode("utf-8", "surrogateescape"), 1)
            part += _LENGTH.pack(len(deflated)) + deflated
        yield bytes(part)


def table_name(parts: Sequence[bytes]) -> str:
    """Return 32 hex digits that stand for these paths in this order."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(_LENGTH.pack(len(part)))
        state.update(part)
    return state.hexdigest()


class PathTable:
    """The receiving side; usable once `missing_parts` is empty."""

    def __init__(self, count: int) -> None:
        if not 0 < count <= PATHS_MAX:
            raise UsageError(f"a plan is for 1 to {PATHS_MAX} samples, not {count}")
        self.count = count
        self.size_bytes = 0
        self._parts: list[tuple[bytes, ...] | None] = [None] * -(-count // PATHS_PER_PART)

    def missing_parts(self) -> list[int]:
        """Indexes of the parts that have not come."""
        return [index for index, part in enumerate(self._parts) if part is None]

    def add_part(self, index: int, raw: bytes) -> None:
        """Take a part; one that came before is ignored. Raises UsageError if it is not what it should be."""
        if not 0 <= index < len(self._parts):
            raise UsageError(f"part {index} of {len(self._parts)} parts of paths")
        if self._parts[index] is not None:
            return
        if self.size_bytes + len(raw) > TABLE_BYTES_MAX:
            raise UsageError(f"the paths of a plan take over {TABLE_BYTES_MAX} bytes, deflated")
        groups = tuple(_split(raw))
        paths_count = min(PATHS_PER_PART, self.count - index * PATHS_PER_PART)
        if len(groups) != -(-paths_count // PATHS_PER_GROUP):
            raise UsageError(f"part {index} of a plan's paths has {len(groups)} groups")
        self._parts[index] = groups
        self.size_bytes += len(raw)

    def path(self, index: int) -> str:
        """Return the path of that sample. Raises UsageError if its group cannot be read."""
        part, at = divmod(index, PATHS_PER_PART)
        groups = self._parts[part]
        assert groups is not None, "a table is asked once it is whole"
        try:
            inflater = zlib.decompressobj()
            text = inflater.decompress(groups[at // PATHS_PER_GROUP], _GROUP_BYTES_MAX)
            return text.split(b"\0")[at % PATHS_PER_GROUP].decode("utf-8", "surrogateescape")
        except (zlib.error, IndexError) as error:
            raise UsageError(f"the path of sample {index} cannot be read") from error


def _split(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        if at + _LENGTH.size > len(raw):
            raise UsageError("a part of a plan's paths is cut short")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if at + length > len(raw):
            raise UsageError("a part of a plan's paths is cut short")
        yield raw[at : at + length]
        at += length
