"""What does the folder cost? Native files, orchestra's mount, and others' FUSE file systems, in one run.

    python benchmarks/fuse.py [--quick] [--record] [--only WORDS] [--works WORDS]

Works: one large file in 1 MiB reads, in random 4 KiB reads and through mmap; many small files, warm and read for the
first time (in the cache directory, not in the kernel's page cache of the mount); stat of primed entries; a huge folder
listed. Loopbacks and bindfs show the native folder again; rclone, s3fs-fuse and orchestra read the same bytes from the
origin, and have read everything once before. Needs root, and for all rows: bindfs, rclone, s3fs, `pip install mfusepy
pyfuse3` (with Debian's libfuse3-dev). Owns: works and verdicts. Leaves to others: method (common), who (contestants).
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common import (
    HERE,
    Timings,
    common_arguments,
    machine_state,
    publish,
    rate_table,
    refuse_a_busy_machine,
    running_origin,
    verdict,
    workspace,
)
from contestants import (
    Contestant,
    Native,
    OrchestraMount,
    PeerMount,
    RcloneMount,
    S3fsFuse,
    cpu_seconds,
)
from origin import BUCKET
from synthetic import dataset_keys, expected_bytes

from orchestra.units import MIB

SMALL_SIZE = 110_000
RANDOM_READS = 20_000
# Threads that read at a time when one worker is compared with two.
READERS = 4


class FolderMount(OrchestraMount):
    """orchestra's mount of the bucket."""

    workers = 1

    def orchestra(self, *arguments: str) -> str:
        if arguments[:2] == ("fuse", "mount"):
            arguments = (*arguments[:2], "--workers", str(self.workers), *arguments[2:])
        return super().orchestra(*arguments)

    @property
    def root(self) -> Path:
        return self.mountpoint / BUCKET


class AutoMount(FolderMount):
    name = "orchestra mount (auto)"


class PagecacheMount(FolderMount):
    name = "orchestra mount (pagecache)"
    mode = "pagecache"


class TwoWorkers(FolderMount):
    name = "orchestra mount (2 workers)"
    workers = 2


class Loopback(PeerMount):
    """A FUSE file system that shows the native folder again."""

    script = ""

    def __init__(self, workspace: Path, origin_url: str, native: Path) -> None:
        super().__init__(workspace, origin_url)
        self.native = native

    def command(self) -> list[str]:
        return [sys.executable, str(HERE / self.script), str(self.native), str(self.mountpoint)]


class Pyfuse3(Loopback):
    name = "loopback, pyfuse3"
    script = "loopback_pyfuse3.py"


class Mfusepy(Loopback):
    name = "loopback, mfusepy"
    script = "loopback_mfusepy.py"


class Bindfs(Loopback):
    name = "bindfs"

    def command(self) -> list[str]:
        options = "ro,kernel_cache,entry_timeout=3600,attr_timeout=3600"
        return ["bindfs", "-f", "-o", options, str(self.native), str(self.mountpoint)]


def root_of(contestant: Contestant) -> Path:
    """Return the folder in which a contestant shows the data."""
    if isinstance(contestant, (Native, FolderMount)):
        return Path(contestant.root)
    assert isinstance(contestant, PeerMount)
    return contestant.mountpoint


# -- works: each takes the folder and returns how much it did --------------------------------------------------------


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


def small_files_beside(root: Path, sizes: Sizes) -> float:
    """The same, READERS at a time, with a buffer each; files."""
    names = [f"{root}/{name}" for name in dataset_keys("small", sizes.small_count)]

    def read(part: Sequence[str]) -> int:
        buffer = bytearray(SMALL_SIZE + 1)
        done = 0
        for name in part:
            fd = os.open(name, os.O_RDONLY)
            done += os.readv(fd, [buffer])
            os.close(fd)
        return done

    with ThreadPoolExecutor(READERS) as pool:
        done = sum(pool.map(read, [names[index::READERS] for index in range(READERS)]))
    assert done == sizes.small_count * SMALL_SIZE, f"{done} bytes of small files in {root}"
    return sizes.small_count


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


# -- turns -----------------------------------------------------------------------------------------------------------


def turns(
    contestants: Sequence[Contestant],
    action: Action,
    sizes: Sizes,
    count: int,
    *,
    before: Callable[[Path, Sizes], None] | None = None,
) -> tuple[dict[str, Timings], float]:
    """Let each do the work `count` times, forwards and then backwards; return the timings and what a turn did."""
    timings = {contestant.name: Timings() for contestant in contestants}
    amount = 0.0
    for turn in range(count):
        for contestant in contestants if turn % 2 == 0 else reversed(contestants):
            folder = root_of(contestant)
            if before is not None and not isinstance(contestant, Native):
                before(folder, sizes)
            serving = cpu_seconds(contestant.serving())
            own = os.times()
            began = time.perf_counter()
            amount = action(folder, sizes)
            row = timings[contestant.name]
            row.seconds.append(time.perf_counter() - began)
            now = os.times()
            row.reader_cpu_s.append(now.user + now.system - own.user - own.system)
            row.serving_cpu_s.append(cpu_seconds(contestant.serving()) - serving)
    return timings, amount


def make_native(root: Path, sizes: Sizes) -> None:
    """Write the same files to the local disk."""
    for name, count, size in (("big", 1, sizes.large), ("small", sizes.small_count, SMALL_SIZE)):
        for key in dataset_keys(name, count):
            path = root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for start in range(0, size, 4 * MIB):
                    file.write(expected_bytes(key, start, min(size, start + 4 * MIB)))
    for index in range(sizes.stat_count):
        if index % 10_000 == 0:
            (root / "stat" / str(index // 10_000)).mkdir(parents=True)
        os.mknod(f"{root}/stat/{index // 10_000}/{index:06}")
    (root / "listed").mkdir()
    for index in range(sizes.listed_count):
        os.mknod(f"{root}/listed/{index:07}")


def available(contestants: Sequence[Contestant], only: str) -> list[Contestant]:
    """Return who is asked for and installed; say who is not."""
    programs: dict[type[Contestant], str] = {Bindfs: "bindfs", RcloneMount: "rclone", S3fsFuse: "s3fs"}
    modules: dict[type[Contestant], str] = {Pyfuse3: "pyfuse3", Mfusepy: "mfusepy"}
    words = [word.strip() for word in only.split(",") if word.strip()]
    found: list[Contestant] = []
    for one in contestants:
        missing = (type(one) in programs and not shutil.which(programs[type(one)])) or (
            type(one) in modules and importlib.util.find_spec(modules[type(one)]) is None
        )
        if missing:
            print(f"{one.name} is not installed and left out", file=sys.stderr)
        elif isinstance(one, Native) or not words or any(word in one.name for word in words):
            found.append(one)
    return found


def ratio(timings: dict[str, Timings], one: type[Contestant], other: type[Contestant]) -> float | None:
    """Return how much faster a contestant is than another, None if one of them is not there."""
    if one.name not in timings or other.name not in timings:
        return None
    return timings[other.name].median_s / timings[one.name].median_s


class Report:
    """Runs works and publishes their tables."""

    def __init__(self, who: Sequence[Contestant], sizes: Sizes, options: argparse.Namespace, state: str) -> None:
        self.who = list(who)
        self.sizes = sizes
        self.options = options
        self.state = state

    def of(self, *kinds: type[Contestant]) -> list[Contestant]:
        """The contestants of these kinds, and the floor."""
        return [one for one in self.who if isinstance(one, (Native, *kinds))]

    def is_wanted(self, work: str) -> bool:
        """Whether --works names it."""
        words = [word.strip() for word in self.options.works.split(",") if word.strip()]
        return not words or any(word in work for word in words)

    def publish(
        self,
        title: str,
        result: tuple[dict[str, Timings], float],
        who: Sequence[Contestant],
        unit: str,
        lines: list[str],
    ) -> None:
        """Print a table with its verdicts."""
        timings, amount = result
        cpu_per = "s/GiB" if unit == "MiB/s" else "us/file"
        table = rate_table(timings, who, amount=amount, unit=unit, cpu_per=cpu_per, base=Native.name)
        publish(f"FUSE: {title}", [*table, "", *lines], self.options, self.state)

    # -- the works ------------------------------------------------------------------------------------------------

    def large(self) -> None:
        """One large file, three ways."""
        works: tuple[tuple[str, Action, str, float], ...] = (
            ("sequential, 1 MiB reads", sequential, "MiB/s", 0.95),
            ("random 4 KiB reads", random_reads, "reads/s", 0.9),
            ("mmap", mapped, "MiB/s", 0.9),
        )
        who = [one for one in self.who if not isinstance(one, TwoWorkers)]
        for title, action, unit, target in works:
            if not self.is_wanted(title):
                continue
            result = turns(who, action, self.sizes, self.options.turns)
            lines = _verdicts(
                (f"mount (auto, passthrough) / native, {title}", ratio(result[0], AutoMount, Native), target)
            )
            if action is sequential and AutoMount.name in result[0]:
                native, ours = result[0][Native.name], result[0][AutoMount.name]
                cost = min(ours.reader_cpu_s) + min(ours.serving_cpu_s)
                lines += _verdicts(
                    ("native CPU / ours (1/1.1 = 0.91)", min(native.reader_cpu_s) / max(cost, 1e-9), 0.91)
                )
            self.publish(f"large file, {title}, warm", result, who, unit, lines)

    def small(self) -> None:
        """Many small files, warm and first reads."""
        count, sizes = self.options.turns, self.sizes
        who = [one for one in self.who if not isinstance(one, TwoWorkers)]
        if self.is_wanted("small warm"):
            result = turns(who, small_files, sizes, count)
            lines = _verdicts(
                ("mount (pagecache) / native", ratio(result[0], PagecacheMount, Native), 0.95),
                ("mount (auto) / native", ratio(result[0], AutoMount, Native), 0.6),
            )
            self.publish(f"{sizes.small_count} files of 110 kB, warm", result, who, "files/s", lines)
        if self.is_wanted("small first"):
            who = self.of(AutoMount, PagecacheMount, Loopback)
            result = turns(who, small_files, sizes, count, before=forget_small)
            bindings = [ratio(result[0], AutoMount, kind) for kind in (Pyfuse3, Mfusepy)]
            slowest = min((value for value in bindings if value is not None), default=None)
            lines = _verdicts(("mount (auto, one worker) / the best Python binding", slowest, 2))
            self.publish(f"{sizes.small_count} files of 110 kB, first read", result, who, "files/s", lines)
        if self.is_wanted("workers"):
            who = self.of(AutoMount, TwoWorkers)
            result = turns(who, small_files_beside, sizes, count, before=forget_small)
            lines = _verdicts(("two workers / one", ratio(result[0], TwoWorkers, AutoMount), 1.6))
            self.publish(f"first read, {READERS} readers at a time, workers", result, who, "files/s", lines)

    def names(self) -> None:
        """Names and attributes."""
        sizes = self.sizes
        if self.is_wanted("stat"):
            who = self.of(AutoMount, Loopback)
            for one in who:
                prime(root_of(one), sizes)
            result = turns(who, stat_all, sizes, self.options.turns)
            lines = _verdicts(("mount (auto) / native", ratio(result[0], AutoMount, Native), 0.9))
            self.publish(f"stat of {sizes.stat_count} primed entries", result, who, "entries/s", lines)
        if self.is_wanted("readdir"):
            who = self.of(AutoMount)
            for one in who:
                list_all(root_of(one), sizes)
            result = turns(who, list_all, sizes, self.options.turns)
            lines = _verdicts(("mount (auto) / native", ratio(result[0], AutoMount, Native), 0.3))
            self.publish(f"readdir of {sizes.listed_count} entries", result, who, "entries/s", lines)


def _verdicts(*figures: tuple[str, float | None, float]) -> list[str]:
    return [verdict(name, reached, target) for name, reached, target in figures if reached is not None]


def main() -> None:
    """Run the works and publish the tables."""
    parser = common_arguments("FUSE mounts against native files and others' mounts.")
    parser.add_argument("--works", default="", metavar="WORDS", help="works whose names hold one of these")
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    sizes = Sizes(64 * MIB, 300, 5_000, 20_000) if options.quick else Sizes(1024 * MIB, 5_000, 100_000, 1_000_000)
    with workspace() as folder, ExitStack() as stack:
        native = Native(folder, "", folder / "native")
        make_native(native.root, sizes)
        origin = stack.enter_context(running_origin("--folder", str(native.root)))
        everyone: list[Contestant] = [native]
        everyone += [kind(folder, origin.url) for kind in (AutoMount, PagecacheMount, TwoWorkers)]
        everyone += [kind(folder, origin.url, native.root) for kind in (Pyfuse3, Mfusepy, Bindfs)]
        everyone += [RcloneMount(folder, origin.url), S3fsFuse(folder, origin.url)]
        who = available(everyone, options.only)
        for one in who:
            one.start()
            stack.callback(one.close)
            if not isinstance(one, Native):  # read everything once, and see that it is right
                command = ["cmp", str(root_of(one) / large_name()), str(native.root / large_name())]
                subprocess.run(command, check=True)
                small_files(root_of(one), sizes)
        report = Report(who, sizes, options, state)
        report.large()
        report.small()
        report.names()


if __name__ == "__main__":
    main()
