"""What benchmarks/fuse.py has done: each work takes a folder and returns how much it did.

Owns: the works, their sizes, and what a reader sees of processes that are killed. Leaves to others: who does them,
turns, tables (fuse.py).
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from synthetic import dataset_keys

from orchestra.units import MIB

SMALL_SIZE = 110_000
RANDOM_READS = 20_000
# Files asked for at a time when one worker is compared with two.
ASKED_AT_ONCE = 64
# A killed worker costs its reader some 50 ms, a daemon a second.
_PAUSE_WATCHED_S = 5.0
# Threads that read at a time, as the processes of a loader do.
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


def small_files_asked(root: Path, sizes: Sizes) -> float:
    """Each brought into the page cache, ASKED_AT_ONCE at a time, and one byte of it read; files.

    The least that a reader can cost (it copies nothing), so that who serves is the limit for as long as may be.
    """
    names = [f"{root}/{name}" for name in dataset_keys("small", sizes.small_count)]
    for first in range(0, len(names), ASKED_AT_ONCE):
        descriptors = [os.open(name, os.O_RDONLY) for name in names[first : first + ASKED_AT_ONCE]]
        for fd in descriptors:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        for fd in descriptors:
            assert len(os.pread(fd, 2, SMALL_SIZE - 1)) == 1
            os.close(fd)
    return sizes.small_count


def small_files_beside(root: Path, sizes: Sizes, readers: int = READERS) -> float:
    """Each opened, read, closed, `readers` at a time, with a buffer each; files."""
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


def read_in_again(path: Path) -> None:
    """Have a file's pages come from the disk, as after a restart.

    How large the page cache's folios are depends on how a file was written (in parts of 4 MiB or of 64 KiB: mmap at
    16 or at 8 GB/s here), which must not differ between those that are compared.
    """
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    while os.readv(fd, [_BUFFER]):
        pass
    os.close(fd)


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


def longest_pause_s(folder: Path, sizes: Sizes, victims: Callable[[], list[int]]) -> float:
    """Read for some seconds, have `victims` killed after the first, and return how long the longest read took."""
    chance = random.Random(3)
    names = [f"{folder}/{name}" for name in dataset_keys("small", sizes.small_count)]
    killed = threading.Event()

    def kill() -> None:
        for pid in victims():
            os.kill(pid, signal.SIGKILL)
        killed.set()

    timer = threading.Timer(1.0, kill)
    timer.start()
    longest_s, end = 0.0, time.perf_counter() + _PAUSE_WATCHED_S
    while not killed.is_set() or time.perf_counter() < end:
        name = chance.choice(names)
        began = time.perf_counter()
        fd = os.open(name, os.O_RDONLY)
        assert len(os.read(fd, SMALL_SIZE + 1)) == SMALL_SIZE
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        longest_s = max(longest_s, time.perf_counter() - began)
    timer.join()
    return longest_s
