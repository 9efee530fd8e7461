"""What benchmarks/fuse.py has done: each work takes a folder and returns how much it did.

Owns: the works and their sizes. Leaves to others: who does them, turns, tables (fuse.py).
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from synthetic import dataset_keys

from orchestra.units import MIB

SMALL_SIZE = 110_000
RANDOM_READS = 20_000
# Threads that read at a time when one worker is compared with two.
READERS = 4
# Threads that read everything once before anything is timed: rclone and s3fs-fuse take minutes one file at a time.
_PRIMERS = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is."""

    large: int
    small_count: int
    stat_count: int
    listed_count: int


Action = Callable[[Path, Sizes], float]
_BUFFER = memoryview(bytearray(1 << 20))


def large_name() -> str:
    """Return the large file's name."""
    return dataset_keys("big", 1)[0]


def sequential(root: Path, sizes: Sizes) -> float:
    """One file in 1 MiB reads; MiB."""
    fd = os.open(root / large_name(), os.O_RDONLY)
    done = 0
    while count := os.readv(fd, [_BUFFER]):
        done += count
    os.close(fd)
    return done / MIB


def random_reads(root: Path, sizes: Sizes) -> float:
    """4 KiB at random places; reads."""
    fd = os.open(root / large_name(), os.O_RDONLY)
    chance = random.Random(7)
    small = _BUFFER[:4096]
    for _ in range(RANDOM_READS):
        os.preadv(fd, [small], chance.randrange(sizes.large // 4096) * 4096)
    os.close(fd)
    return RANDOM_READS


def mapped(root: Path, sizes: Sizes) -> float:
    """One file through mmap; MiB."""
    fd = os.open(root / large_name(), os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
        seen = memoryview(view)
        for at in range(0, sizes.large, len(_BUFFER)):
            part = seen[at : at + len(_BUFFER)]
            _BUFFER[: len(part)] = part
            part.release()
        seen.release()
    os.close(fd)
    return sizes.large / MIB


def _whole(path: str) -> int:
    fd = os.open(path, os.O_RDONLY)
    done = 0
    while count := os.readv(fd, [_BUFFER]):
        done += count
    os.close(fd)
    return done


def small_files(root: Path, sizes: Sizes) -> float:
    """Each opened, read, closed; files."""
    done = sum(_whole(f"{root}/{name}") for name in dataset_keys("small", sizes.small_count))
    assert done == sizes.small_count * SMALL_SIZE, f"{done} bytes of small files in {root}"
    return sizes.small_count


def small_files_beside(root: Path, sizes: Sizes, readers: int = READERS) -> float:
    """The same, `readers` at a time, with a buffer each; files."""
    names = [f"{root}/{name}" for name in dataset_keys("small", sizes.small_count)]

    def read(part: Sequence[str]) -> int:
        buffer = bytearray(SMALL_SIZE + 1)
        done = 0
        for name in part:
            fd = os.open(name, os.O_RDONLY)
            done += os.readv(fd, [buffer])
            os.close(fd)
        return done

    with ThreadPoolExecutor(readers) as pool:
        done = sum(pool.map(read, [names[index::readers] for index in range(readers)]))
    assert done == sizes.small_count * SMALL_SIZE, f"{done} bytes of small files in {root}"
    return sizes.small_count


def read_once(root: Path, sizes: Sizes) -> None:
    """Have every small file brought here."""
    small_files_beside(root, sizes, _PRIMERS)


def forget_small(root: Path, sizes: Sizes) -> None:
    """Drop the kernel's pages of the files as the mount shows them, not those that they are made from."""
    for name in dataset_keys("small", sizes.small_count):
        fd = os.open(root / name, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def stat_all(root: Path, sizes: Sizes) -> float:
    """stat of every file of a folder that was listed; entries."""
    for index in range(sizes.stat_count):
        os.stat(f"{root}/stat/{index // 10_000}/{index:06}")
    return sizes.stat_count


def prime(root: Path, sizes: Sizes) -> None:
    """List the folders with attributes, as `ls -l` does."""
    for folder in range((sizes.stat_count + 9_999) // 10_000):
        for entry in os.scandir(f"{root}/stat/{folder}"):
            entry.stat()


def list_all(root: Path, sizes: Sizes) -> float:
    """Names of one huge folder; entries."""
    with os.scandir(root / "listed") as names:
        count = sum(1 for _ in names)
    assert count == sizes.listed_count, f"{count} names in {root}/listed"
    return count
