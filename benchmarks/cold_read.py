"""How near does a first read come to what the store and its client allow? Origin with injected latency, peers beside.

    python benchmarks/cold_read.py [--quick] [--record]

Two works: many readers at a time of small files, where latency is everything; one large object, from beginning to end
and in parallel ranges. Each turn reads objects that nobody has read, with the page cache emptied; names were listed
before, untimed. The limit of small files is the lower of concurrency / latency and what the bare client reached.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from common import (
    OriginProcess,
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
    BareClient,
    Contestant,
    OrchestraFsspec,
    OrchestraMount,
    OrchestraPagecacheMount,
    RcloneMount,
    S3fsFuse,
    S3fsPython,
    SimpleCache,
)
from reader import Work
from synthetic import FOLDER_SIZE, dataset_keys

from orchestra.units import MIB

LATENCY_MS = 50
SMALL_SIZE = 110_000
READERS = 64
# Enough that a 50 ms request and the copy of 4 MiB keep a connection each busy without waiting for one another.
RANGES = 16


class Sequential(OrchestraMount):
    name = "orchestra mount, one reader from start to end"


class SequentialRclone(RcloneMount):
    name = "rclone mount, one reader from start to end"


class SequentialS3fsFuse(S3fsFuse):
    name = "s3fs-fuse, one reader from start to end"


def small(
    folder: Path, origin: OriginProcess, options: argparse.Namespace, count: int
) -> tuple[dict[str, Timings], list[Contestant]]:
    """Read `count` small files per turn, READERS at a time."""
    names = dataset_keys("small", count * (options.turns + 1))
    slices = [names[at : at + count] for at in range(0, len(names), count)]
    contestants = chosen(
        [
            BareClient(folder, origin.url),
            OrchestraMount(folder, origin.url),
            OrchestraPagecacheMount(folder, origin.url),
            OrchestraFsspec(folder, origin.url),
            RcloneMount(folder, origin.url),
            S3fsFuse(folder, origin.url),
            S3fsPython(folder, origin.url),
            SimpleCache(folder, origin.url),  # filecache fails with many threads: "cannot unpack non-iterable bool"
        ],
        options.only,
        [BareClient.name],
    )
    with ExitStack() as stack:
        started(stack, contestants)
        folders = sorted({name.rsplit("/", 1)[0] for name in names})
        for contestant in contestants:
            contestant.list_folders(folders)
        prove_bytes(contestants, Work(slices[0][: max(FOLDER_SIZE, READERS)], SMALL_SIZE, READERS))
        origin.set(latency_ms=LATENCY_MS)
        works = [Work(part, SMALL_SIZE, READERS) for part in slices[1:]]
        return take_turns(contestants, works, cold=True), contestants


def large(
    folder: Path, origin: OriginProcess, options: argparse.Namespace, size: int
) -> tuple[dict[str, Timings], list[Contestant]]:
    """Read one large object per turn: by one reader, and in RANGES parallel ranges."""
    names = dataset_keys("big", options.turns + 1)
    ranged: list[Contestant] = [BareClient(folder, origin.url), OrchestraMount(folder, origin.url)]
    ranged += [OrchestraFsspec(folder, origin.url), RcloneMount(folder, origin.url), S3fsFuse(folder, origin.url)]
    ranged += [S3fsPython(folder, origin.url)]
    one_reader: list[Contestant] = [Sequential(folder, origin.url), SequentialRclone(folder, origin.url)]
    one_reader += [SequentialS3fsFuse(folder, origin.url)]
    ranged = chosen(ranged, options.only, [BareClient.name])
    one_reader = chosen(one_reader, options.only, [])
    with ExitStack() as stack:
        started(stack, [*ranged, *one_reader])
        for contestant in [*ranged, *one_reader]:
            contestant.list_folders(["big/00"])
        first = Work(names[:1], size, RANGES, ranges=True)
        prove_bytes(ranged, first)
        prove_bytes(one_reader, replace(first, concurrency=1, ranges=False))
        origin.set(latency_ms=LATENCY_MS, bandwidth=options.bandwidth)
        works = [replace(first, names=[name]) for name in names[1:]]
        timings: dict[str, Timings] = {contestant.name: Timings() for contestant in [*ranged, *one_reader]}
        for work in works:  # one turn of the ranged, one of the single readers, each in both directions over the turns
            for group, job in ((ranged, work), (one_reader, replace(work, concurrency=1, ranges=False))):
                for name, row in take_turns(group, [job], cold=True).items():
                    timings[name].seconds += row.seconds
                    timings[name].reader_cpu_s += row.reader_cpu_s
                    timings[name].serving_cpu_s += row.serving_cpu_s
            ranged.reverse()
            one_reader.reverse()
        return timings, [*ranged, *one_reader]


def prove_bytes(contestants: Sequence[Contestant], work: Work) -> None:
    """Let everyone read objects that no turn will read, without latency, and check every byte."""
    for contestant in contestants:
        proof = replace(work, check=True)
        check(contestant, proof, contestant.read(proof))


def rate_of(timings: dict[str, Timings], contestant: type[Contestant], amount: float) -> float:
    """Return a contestant's rate."""
    return amount / timings[contestant.name].median_s


def main() -> None:
    """Run both works and publish the tables."""
    parser = common_arguments("Cold reads against the bare store client and peers.")
    parser.add_argument("--bandwidth", default="90MB", help="per connection, for the large object (default: 90MB)")
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    if options.quick:
        options.turns = min(options.turns, 2)
    size, count = (64_000_000, 256) if options.quick else (300_000_000, 1280)
    datasets = ["--dataset", f"big:{options.turns + 1}x{size}"]
    datasets += ["--dataset", f"small:{count * (options.turns + 1)}x{SMALL_SIZE}"]
    with workspace() as folder, running_origin(*datasets) as origin:
        timings, who = small(folder / "small", origin, options, count)
        lines = rate_table(
            timings, who, amount=count, unit="files/s", cpu_per="us/file", base=BareClient.name, cold=True
        )
        limit = min(READERS * 1000 / LATENCY_MS, rate_of(timings, BareClient, count))
        best = max(rate_of(timings, kind, count) for kind in (OrchestraMount, OrchestraFsspec) if kind.name in timings)
        reached = rate_of(timings, OrchestraMount, count) if OrchestraMount.name in timings else best
        lines += ["", f"- limit: {limit:.0f} files/s", verdict("mount (auto) / limit", reached / limit, 0.8)]
        publish(f"Cold: {READERS} readers of 110 kB files, {LATENCY_MS} ms first byte", lines, options, state)
        origin.set(latency_ms=0)
        timings, who = large(folder / "large", origin, options, size)
        lines = rate_table(
            timings, who, amount=size / MIB, unit="MiB/s", cpu_per="s/GiB", base=BareClient.name, cold=True
        )
        wanted = []
        for kind in (OrchestraMount, Sequential, OrchestraFsspec):
            if kind.name in timings:
                bare = timings[BareClient.name].seconds
                share = statistics.median(b / o for b, o in zip(bare, timings[kind.name].seconds, strict=True))
                wanted.append(verdict(f"{kind.name} / bare client in {RANGES} ranges", share, 0.9))
        origin_is = f"{LATENCY_MS} ms first byte, {options.bandwidth}/s a connection"
        title = f"Cold: one object of {size // 1_000_000} MB, {origin_is}; by {RANGES} readers unless said"
        publish(title, [*lines, "", *wanted], options, state)


if __name__ == "__main__":
    main()
