"""What does the folder cost? Native files, orchestra's mount, and others' FUSE file systems, in one run.

    python benchmarks/fuse.py [--quick] [--record] [--only WORDS] [--works WORDS]

Works: one large file in 1 MiB reads, in random 4 KiB reads and through mmap; many small files, warm and read for the
first time (in the cache directory, not in the kernel's page cache of the mount); stat of primed entries; a huge folder
listed. Loopbacks and bindfs show the native folder again; rclone, s3fs-fuse and orchestra read the same bytes from the
origin, and have read everything once before. Needs root, and for all rows: bindfs, rclone, s3fs, `pip install mfusepy
pyfuse3` (with Debian's libfuse3-dev). Owns: turns and verdicts. Leaves to others: method (common), who
(fuse_contestants), what is read (fuse_works).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from common import (
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
from contestants import Contestant, Native, RcloneMount, S3fsFuse, cpu_seconds
from fuse_contestants import (
    AutoMount,
    Bindfs,
    FolderMount,
    Loopback,
    Mfusepy,
    PagecacheMount,
    Pyfuse3,
    SmallFilesMount,
    SmallFolios,
    TwoWorkers,
    available,
    make_native,
    root_of,
)
from fuse_works import (
    ASKED_AT_ONCE,
    READERS,
    Action,
    Sizes,
    forget_small,
    large_name,
    list_all,
    longest_pause_s,
    mapped,
    prime,
    random_reads,
    read_in_again,
    read_once,
    sequential,
    small_files,
    small_files_asked,
    small_files_beside,
    stat_all,
)

from orchestra.units import MIB

# 20,000 random reads of a warm file take 50 ms, which a single interruption changes by a tenth.
_TURN_S = 0.5
# Turns of native files and orchestra's mounts alone, for each turn of everybody: the speed of this machine's memory
# swings by 2x from one second to the next, and only pairs of turns next to one another tell the two apart.
_PAIRS = 3
# Pages that were pushed out and read again, above which a turn was not of warm files.
_REFAULTS_MAX_BYTES = 16 * MIB


# -- turns -----------------------------------------------------------------------------------------------------------


def turns(
    contestants: Sequence[Contestant],
    action: Action,
    sizes: Sizes,
    count: int,
    *,
    before: Callable[[Path, Sizes], None] | None = None,
) -> tuple[dict[str, Timings], float]:
    """Let each do the work `count` times, forwards and then backwards; return the timings and what a turn did.

    Work that may be done again (nothing has to come `before` it) is warm: everybody does it once untimed, a turn goes
    on until _TURN_S have passed (one time is noted), and native files and orchestra's mounts have _PAIRS more turns.
    """
    timings = {contestant.name: Timings() for contestant in contestants}
    rounds = [list(contestants) for _ in range(count)]
    if before is None:
        for contestant in contestants:
            action(root_of(contestant), sizes)
        pair: list[Contestant] = [one for one in contestants if isinstance(one, (Native, SmallFolios, FolderMount))]
        rounds += [pair for _ in range(count * _PAIRS)]
    amount = 0.0
    for turn, those in enumerate(rounds):
        for contestant in those if turn % 2 == 0 else reversed(those):
            folder = root_of(contestant)
            if before is not None and not isinstance(contestant, Native):
                before(folder, sizes)
            serving = cpu_seconds(contestant.serving())
            own = _own_cpu_s()
            began = time.perf_counter()
            amount = action(folder, sizes)
            times = 1
            while before is None and time.perf_counter() - began < _TURN_S:
                action(folder, sizes)
                times += 1
            row = timings[contestant.name]
            row.seconds.append((time.perf_counter() - began) / times)
            row.reader_cpu_s.append((_own_cpu_s() - own) / times)
            row.serving_cpu_s.append((cpu_seconds(contestant.serving()) - serving) / times)
    return timings, amount


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def ratio(timings: dict[str, Timings], one: type[Contestant], other: type[Contestant]) -> float | None:
    """Return how much faster a contestant is than another, None if one of them is not there.

    The median of the turns' own ratios, of the turns that both had (see _PAIRS).
    """
    if one.name not in timings or other.name not in timings:
        return None
    pairs = zip(timings[one.name].seconds, timings[other.name].seconds, strict=False)
    return statistics.median(theirs / ours for ours, theirs in pairs)


@dataclass(frozen=True, slots=True)
class PageCache:
    """What the kernel did to cached pages since boot."""

    drops: int  # times that somebody had it drop all; nothing here does
    refault_bytes: int  # pages pushed out for want of memory, and read again

    @classmethod
    def now(cls) -> PageCache:
        counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        drops = int(counts["drop_pagecache"]) + int(counts["drop_slab"])
        return cls(drops, int(counts["workingset_refault_file"]) * os.sysconf("SC_PAGE_SIZE"))

    def complaints(self, earlier: PageCache) -> list[str]:
        """Return what says that files were not warm."""
        lines = []
        if self.drops > earlier.drops:
            lines.append(f"- NOT WARM: caches were dropped {self.drops - earlier.drops} times by somebody")
        refaults = self.refault_bytes - earlier.refault_bytes
        if refaults > _REFAULTS_MAX_BYTES:
            lines.append(f"- NOT WARM: {refaults / MIB:.0f} MiB of pages were pushed out and read again meanwhile")
        return lines


class Report:
    """Runs works and publishes their tables."""

    def __init__(self, who: Sequence[Contestant], sizes: Sizes, options: argparse.Namespace, state: str) -> None:
        self.who = list(who)
        self.sizes = sizes
        self.options = options
        self.state = state
        self.page_cache = PageCache.now()

    def of(self, *kinds: type[Contestant]) -> list[Contestant]:
        """The contestants of these kinds, and the floor."""
        return [one for one in self.who if isinstance(one, (Native, *kinds))]

    def but(self, *kinds: type[Contestant]) -> list[Contestant]:
        """The contestants that are not of these kinds."""
        return [one for one in self.who if not isinstance(one, kinds)]

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
        now = PageCache.now()
        lines = [*lines, *now.complaints(self.page_cache)]
        self.page_cache = now
        publish(f"FUSE: {title}", [*table, "", *lines], self.options, self.state)

    # -- the works ------------------------------------------------------------------------------------------------

    def large(self) -> None:
        """One large file, three ways."""
        works: tuple[tuple[str, Action, str, float], ...] = (
            ("sequential, 1 MiB reads", sequential, "MiB/s", 0.95),
            ("random 4 KiB reads", random_reads, "reads/s", 0.9),
            ("mmap", mapped, "MiB/s", 0.9),
        )
        who = self.but(TwoWorkers, SmallFilesMount, SmallFolios)
        files = [root_of(one) / large_name() for one in self.of()]
        files += [one.cached_file(self.sizes.large) for one in self.who if type(one) is AutoMount]
        for title, action, unit, target in works:
            if not self.is_wanted(title):
                continue
            for file in files:
                read_in_again(file)
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
        """Many small files, warm."""
        count, sizes = self.options.turns, self.sizes
        if self.is_wanted("small warm"):
            who = self.but(TwoWorkers)
            result = turns(who, small_files, sizes, count)
            lines = _verdicts(
                ("mount (pagecache) / native", ratio(result[0], PagecacheMount, Native), 0.95),
                ("mount (pagecache) / native in folios of 4 KiB", ratio(result[0], PagecacheMount, SmallFolios), 0.95),
                ("mount (auto) of small files / native", ratio(result[0], SmallFilesMount, Native), 0.6),
                ("mount (auto) that shows a large file, too / native", ratio(result[0], AutoMount, Native), 0.6),
            )
            self.publish(f"{sizes.small_count} files of 110 kB, warm", result, who, "files/s", lines)

    def first(self) -> None:
        """Small files that the cache directory has, and the kernel's page cache of the mount has not."""
        who = self.of(AutoMount, SmallFilesMount, PagecacheMount, Loopback)
        for action, how in ((small_files, "one reader"), (small_files_beside, f"{READERS} readers")):
            if not self.is_wanted(f"small first, {how}"):
                continue
            result = turns(who, action, self.sizes, self.options.turns, before=forget_small)
            lines = []
            for kind, what in ((SmallFilesMount, " of small files"), (AutoMount, " that shows a large file, too")):
                slowest = _of_the_best_binding(result[0], kind)
                lines += _verdicts((f"mount (auto, one worker){what} / the best Python binding", slowest, 2))
            in_c = _of_the_best_binding(result[0], Bindfs)
            lines += [f"- bindfs (in C) / the best Python binding: {in_c:.2f}"] if in_c is not None else []
            title = f"{self.sizes.small_count} files of 110 kB, first read, {how}"
            self.publish(title, result, who, "files/s", lines)

    def workers(self) -> None:
        """First reads by one worker and by two, asked for by a reader that does as little as it can."""
        if not self.is_wanted("workers"):
            return
        who = self.of(SmallFilesMount, TwoWorkers)
        two = [one for one in who if isinstance(one, TwoWorkers)]
        before = [cpu_seconds([pid]) for one in two for pid in one.workers_now()]
        result = turns(who, small_files_asked, self.sizes, self.options.turns, before=forget_small)
        after = [cpu_seconds([pid]) for one in two for pid in one.workers_now()]
        lines = _verdicts(("two workers / one", ratio(result[0], TwoWorkers, SmallFilesMount), 1.6))
        if two and SmallFilesMount.name in result[0]:
            shares = [end - begin for begin, end in zip(before, after, strict=True)]
            lines += _scaling(result[0], self.sizes.small_count, [share / sum(shares) for share in shares])
        self.publish(f"first read, {ASKED_AT_ONCE} asked for at a time, workers", result, who, "files/s", lines)

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
            lines += [
                f"- peak memory of {one.name}: {one.peak_memory()}" for one in who if isinstance(one, FolderMount)
            ]
            self.publish(f"readdir of {sizes.listed_count} entries", result, who, "entries/s", lines)

    def pauses(self) -> None:
        """What a reader sees of a worker, and of a worker and the daemon, that are killed."""
        mounts = [one for one in self.who if type(one) is AutoMount]
        if not mounts or not self.is_wanted("pauses"):
            return
        (one,) = mounts
        folder = root_of(one)
        worker_s = longest_pause_s(folder, self.sizes, one.workers_now)
        both_s = longest_pause_s(folder, self.sizes, lambda: [*one.workers_now(), one.daemon_pid])
        lines = [
            f"Longest read of a page that the kernel has not: {worker_s:.3f} s with the worker killed, {both_s:.3f} s "
            "with worker and daemon killed; no read failed.",
            "",
            *_verdicts(
                ("2 s / pause of a killed worker", 2 / worker_s, 1),
                ("2 s / pause of a killed worker and daemon", 2 / both_s, 1),
            ),
        ]
        publish("FUSE: kill -9 under a reader", lines, self.options, self.state)


def _verdicts(*figures: tuple[str, float | None, float]) -> list[str]:
    return [verdict(name, reached, target) for name, reached, target in figures if reached is not None]


def _of_the_best_binding(timings: dict[str, Timings], kind: type[Contestant]) -> float | None:
    ratios = [ratio(timings, kind, binding) for binding in (Pyfuse3, Mfusepy)]
    return min((value for value in ratios if value is not None), default=None)


def _scaling(timings: dict[str, Timings], count: int, shares: list[float]) -> list[str]:
    """What two workers would do with a core each and one for the reader, by CPU seconds, and what these cores allow."""
    one, two = timings[SmallFilesMount.name], timings[TwoWorkers.name]
    reader, single, double = (
        statistics.median(cpu_s) * 1e6 / count for cpu_s in (two.reader_cpu_s, one.serving_cpu_s, two.serving_cpu_s)
    )
    cores = os.cpu_count() or 1
    allowed = max(single, reader, (single + reader) / cores) / max(double / 2, reader, (double + reader) / cores)
    return [
        verdict("files per CPU second of two workers / of one, times two", 2 * single / max(double, 1e-9), 1.6),
        f"- CPU us a file: reader {reader:.0f}, one worker {single:.0f}, two {double:.0f} (shares "
        f"{' and '.join(f'{share:.2f}' for share in shares)}); {cores} cores for all three allow {allowed:.2f}",
    ]


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
        everyone: list[Contestant] = [native, SmallFolios(folder, "", sizes.small_count)]
        auto = AutoMount(folder, origin.url)
        everyone += [auto, *(kind(auto) for kind in (SmallFilesMount, PagecacheMount, TwoWorkers))]
        everyone += [kind(folder, origin.url, native.root) for kind in (Pyfuse3, Mfusepy, Bindfs)]
        everyone += [RcloneMount(folder, origin.url), S3fsFuse(folder, origin.url)]
        who = available(everyone, options.only)
        for one in who:
            one.start()
            stack.callback(one.close)
            if not isinstance(
                one, (Native, SmallFolios, SmallFilesMount, TwoWorkers)
            ):  # see that it is right; these met none
                command = ["cmp", str(root_of(one) / large_name()), str(native.root / large_name())]
                subprocess.run(command, check=True)
            if not isinstance(one, (Native, SmallFolios)):
                read_once(root_of(one), sizes)
        report = Report(who, sizes, options, state)
        report.large()
        report.small()
        report.first()
        report.workers()
        report.names()
        report.pauses()


if __name__ == "__main__":
    main()
