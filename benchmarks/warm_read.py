"""How fast is what is on this node already? Against native files, in the same run: mounts, fsspec, peers.

    python benchmarks/warm_read.py [--quick] [--record]

Two works: one large object from beginning to end in 1 MiB reads; thousands of small files, each opened, read, closed.
Everyone has read everything once before (that pass checks every byte), so what is timed is the second pass and later.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from common import (
    Timings,
    check,
    chosen,
    common_arguments,
    machine_state,
    publish,
    rate_table,
    refuse_a_busy_machine,
    running_origin,
    started,
    take_turns,
    verdict,
    workspace,
)
from contestants import (
    BlockCache,
    Contestant,
    FileCache,
    Native,
    OrchestraFsspec,
    OrchestraMount,
    OrchestraPagecacheMount,
    RcloneMount,
    S3fsFuse,
    S3fsPython,
    SimpleCache,
)
from reader import Work
from synthetic import dataset_keys, expected_bytes

from orchestra.units import MIB

SMALL_SIZE = 110_000


def fill(contestants: Sequence[Contestant], work: Work) -> None:
    """Let everyone read everything once, and check every byte."""
    for contestant in contestants:
        answer = contestant.read(replace(work, check=True))
        check(contestant, replace(work, check=True), answer)


def large(
    folder: Path, url: str, options: argparse.Namespace, size: int
) -> tuple[dict[str, Timings], list[Contestant]]:
    """Read one large object; the floor is the very file of orchestra's cache directory that holds it."""
    name = dataset_keys("big", 1)[0]
    work = Work([name], size)
    mount = OrchestraMount(folder, url)
    floor = Native(folder, url, folder / "floor")
    others: list[Contestant] = [
        OrchestraPagecacheMount(folder, url),
        OrchestraFsspec(folder, url),
        RcloneMount(folder, url),
        S3fsFuse(folder, url),
        FileCache(folder, url),
        SimpleCache(folder, url),
        BlockCache(folder, url),
        S3fsPython(folder, url),
    ]
    contestants = chosen([mount, *others], options.only, [mount.name])
    with ExitStack() as stack:
        started(stack, contestants)
        fill(contestants, work)
        link = floor.root / name
        link.parent.mkdir(parents=True)
        link.symlink_to(mount.cached_file(size))
        stack.callback(floor.close)
        everyone = [floor, *contestants]
        return take_turns(everyone, [work] * options.turns, cold=False), everyone


def small(
    folder: Path, url: str, options: argparse.Namespace, count: int
) -> tuple[dict[str, Timings], list[Contestant]]:
    """Read many small files; the floor is a folder of the same files."""
    names = dataset_keys("small", count)
    work = Work(names, SMALL_SIZE)
    floor = Native(folder, url, folder / "small-floor")
    for name in names:
        path = floor.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(expected_bytes(name, 0, SMALL_SIZE))
    contestants = chosen(
        [
            floor,
            OrchestraMount(folder, url),
            OrchestraPagecacheMount(folder, url),
            OrchestraFsspec(folder, url),
            RcloneMount(folder, url),
            S3fsFuse(folder, url),
            FileCache(folder, url),
            SimpleCache(folder, url),
            S3fsPython(folder, url),
        ],
        options.only,
        [floor.name],
    )
    with ExitStack() as stack:
        started(stack, contestants)
        fill(contestants, work)
        return take_turns(contestants, [work] * options.turns, cold=False), contestants


def ratio(timings: dict[str, Timings], contestant: type[Contestant], base: type[Contestant]) -> float:
    """Return how much faster a contestant is than another."""
    return timings[base.name].median_s / timings[contestant.name].median_s


def main() -> None:
    """Run both works and publish the tables."""
    options = common_arguments("Warm reads against native files and peers.").parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    size, count = (64 * MIB, 300) if options.quick else (1024 * MIB, 5000)
    datasets = ["--dataset", f"big:1x{size}", "--dataset", f"small:{count}x{SMALL_SIZE}"]
    with workspace() as folder, running_origin(*datasets) as origin:
        timings, who = large(folder / "large", origin.url, options, size)
        lines = rate_table(timings, who, amount=size / MIB, unit="MiB/s", cpu_per="s/GiB", base=Native.name)
        wanted = [
            verdict("mount (auto) / the file in the cache directory", ratio(timings, OrchestraMount, Native), 0.9)
        ]
        publish(f"Warm: one object of {size // MIB} MiB, 1 MiB reads", [*lines, "", *wanted], options, state)
        timings, who = small(folder / "small", origin.url, options, count)
        lines = rate_table(timings, who, amount=count, unit="files/s", cpu_per="us/file", base=Native.name)
        wanted = [verdict("mount (auto) / native", ratio(timings, OrchestraMount, Native), 0.5)]
        if OrchestraPagecacheMount.name in timings:
            wanted.append(verdict("mount (pagecache) / native", ratio(timings, OrchestraPagecacheMount, Native), 0.9))
        if OrchestraFsspec.name in timings and S3fsPython.name in timings:
            wanted.append(verdict("fsspec cat_file / s3fs", ratio(timings, OrchestraFsspec, S3fsPython), 20))
        publish(f"Warm: {count} files of 110 kB, opened, read, closed", [*lines, "", *wanted], options, state)


if __name__ == "__main__":
    main()
