"""The made-up objects of the benchmarks' origin: their names, and the bytes that follow from a name.

Owns: the pattern and the catalogue. Leaves to others: serving it (origin.py). Readers check what they read against it.
"""

from __future__ import annotations

import argparse
import bisect
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestra.units import parse_size_bytes

# A prime just below 8 MiB: no two blocks of a power-of-two size in one object are alike, so swapped blocks show.
PERIOD = 8_388_593
# Bodies up to this size go out with their head in one sendmsg; above it, sendfile saves the copy.
INLINE_BODY_BYTES = 128 * 1024
FOLDER_SIZE = 100
PATTERN = random.Random(20261120).randbytes(PERIOD)
PATTERN_TWICE = memoryview(PATTERN + PATTERN[:INLINE_BODY_BYTES])


def pattern_offset(key: str) -> int:
    """Return where in the pattern the object of this key begins."""
    return zlib.crc32(key.encode()) % PERIOD


def expected_bytes(key: str, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of the made-up object `key`; the caller knows its size."""
    parts = []
    at = (pattern_offset(key) + start) % PERIOD
    left = stop - start
    while left > 0:
        step = min(left, PERIOD - at)
        parts.append(PATTERN[at : at + step])
        left -= step
        at = 0
    return b"".join(parts)


def dataset_keys(name: str, count: int) -> list[str]:
    """Return the keys of dataset `name` in listing order."""
    width = max(4, len(str(count - 1)))
    folder_width = max(2, len(str((count - 1) // FOLDER_SIZE)))
    return [f"{name}/{i // FOLDER_SIZE:0{folder_width}d}/{i:0{width}d}.bin" for i in range(count)]


def parse_dataset(text: str) -> tuple[str, int, int]:
    """Return name, count and size in bytes of NAME:COUNTxSIZE."""
    match = re.fullmatch(r"([\w.-]+):(\d+)x(\w+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected NAME:COUNTxSIZE such as small:5000x110kB, got {text!r}")
    return match[1], int(match[2]), parse_size_bytes(match[3])


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object: made up (`path` None) or a file."""

    key: str
    size: int
    etag: str
    path: str | None = None


class Catalogue:
    """The bucket's objects, in key order."""

    def __init__(self, datasets: Sequence[tuple[str, int, int]], folder: Path | None) -> None:
        self.objects: dict[str, StoredObject] = {}
        for name, count, size in datasets:
            for key in dataset_keys(name, count):
                # The "-1" of a multipart upload: otherwise clients take the tag for the MD5 of the bytes.
                self.objects[key] = StoredObject(key, size, f'"{zlib.crc32(key.encode()):08x}{size:024x}-1"')
        if folder is not None:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                status = path.stat()
                etag = f'"{status.st_mtime_ns:016x}{status.st_size:016x}-1"'
                key = path.relative_to(folder).as_posix()
                self.objects[key] = StoredObject(key, status.st_size, etag, str(path))
        self.keys = sorted(self.objects)

    def page(self, prefix: str, delimiter: str, after: str, limit: int) -> tuple[list[str], list[str], str | None]:
        """Return keys, common prefixes and, if there is more, the name after which the next page begins."""
        keys: list[str] = []
        prefixes: list[str] = []
        index = bisect.bisect_left(self.keys, prefix) if after < prefix else bisect.bisect_right(self.keys, after)
        if delimiter and after.endswith(delimiter) and after > prefix:
            index = bisect.bisect_left(self.keys, after[:-1] + chr(ord(delimiter) + 1))
        last = ""
        while index < len(self.keys) and self.keys[index].startswith(prefix):
            if len(keys) + len(prefixes) >= limit:
                return keys, prefixes, last
            key = self.keys[index]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                keys.append(key)
                last = key
                index += 1
            else:
                last = key[: cut + 1]
                prefixes.append(last)
                index = bisect.bisect_left(self.keys, key[:cut] + chr(ord(delimiter) + 1), index)
        return keys, prefixes, None
