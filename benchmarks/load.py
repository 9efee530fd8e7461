"""How near does `orchestra load` come to what latency, bandwidth and the store's client allow? Copying tools beside.

    python benchmarks/load.py [--quick] [--record] [--only rclone]

Two works: 20,000 objects of 50 kB at 50 ms to the first byte, and 4 GiB in objects of 64 MiB at a fixed bandwidth. Each
turn is of objects that nobody has, with the page cache emptied, from the start of the command to its end. Then the
daemon is killed half way through the small ones, and the origin counts what it has to send again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import (
    OriginProcess,
    Timings,
    chosen,
    common_arguments,
    drop_page_cache,
    machine_state,
    publish,
    rate_table,
    refuse_a_busy_machine,
    running_origin,
    started,
    verdict,
    workspace,
)
from contestants import KEY, SECRET, BareClient, Contestant, OrchestraNode, clean_environment, cpu_seconds
from origin import BUCKET
from reader import Work
from synthetic import dataset_keys

from orchestra.units import GIB, MIB

LATENCY_MS = 50
SMALL_SIZE = 50_000
LARGE_SIZE = 64 * MIB
# What orchestra has in flight to one store by default, and what the others are told to have.
CONCURRENCY = 128


class Copier(Contestant):
    """Something that brings a whole dataset to this machine."""

    def command(self, dataset: str, target: Path) -> list[str]:
        """Return the command that copies `dataset` into the folder `target`."""
        raise NotImplementedError

    def bring(self, dataset: str) -> dict[str, Any]:
        """Run it; return seconds, its CPU seconds and the bytes that came."""
        target = self.folder / dataset
        before = os.times()
        began = time.perf_counter()
        ended = subprocess.run(
            self.command(dataset, target), env=clean_environment(), capture_output=True, text=True, timeout=600
        )
        seconds = time.perf_counter() - began
        if ended.returncode:
            raise SystemExit(f"{self.name} failed: {ended.stderr[-500:]}")
        after = os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        byte_count = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        shutil.rmtree(target)
        return {"seconds": seconds, "cpu_s": cpu_s, "serving_cpu_s": 0.0, "byte_count": byte_count}


class RcloneCopy(Copier):
    """rclone copy with as many transfers at a time."""

    name = f"rclone copy --transfers {CONCURRENCY}"

    def command(self, dataset: str, target: Path) -> list[str]:
        config = self.folder / "rclone.conf"
        config.write_text(
            f"[bench]\ntype = s3\nprovider = Other\nendpoint = {self.origin_url}\n"
            f"access_key_id = {KEY}\nsecret_access_key = {SECRET}\nforce_path_style = true\n"
        )
        options = ["--transfers", str(CONCURRENCY), "--checkers", "16", "--ignore-checksum"]
        return ["rclone", "--config", str(config), "copy", f"bench:{BUCKET}/{dataset}", str(target), *options]


class S3fsGet(Copier):
    """s3fs (fsspec), get(recursive=True) with as many at a time."""

    name = "s3fs get"

    def command(self, dataset: str, target: Path) -> list[str]:
        options = {"key": KEY, "secret": SECRET, "endpoint_url": self.origin_url}
        pool = f"config_kwargs={{'max_pool_connections': {CONCURRENCY}}}"
        program = (
            f"import s3fs; fs = s3fs.S3FileSystem(**{options!r}, {pool});"
            f"fs.get('{BUCKET}/{dataset}', {str(target)!r}, recursive=True, batch_size={CONCURRENCY})"
        )
        return [sys.executable, "-c", program]


class OrchestraLoad(OrchestraNode):
    """orchestra load --wait."""

    name = "orchestra load"

    def bring(self, dataset: str) -> dict[str, Any]:
        """Load it; return what a copier does."""
        before, cpu_before = os.times(), cpu_seconds(self.serving())
        began = time.perf_counter()
        job = json.loads(self.orchestra("load", "--wait", "--json", f"/{BUCKET}/{dataset}"))
        seconds = time.perf_counter() - began
        after = os.times()
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        serving_cpu_s = cpu_seconds(self.serving()) - cpu_before
        return {"seconds": seconds, "cpu_s": cpu_s, "serving_cpu_s": serving_cpu_s, "byte_count": job["bytes_done"]}


class BareReader(BareClient):
    """The bare store client, reading everything and keeping nothing."""

    count, size = 0, 0

    def bring(self, dataset: str) -> dict[str, Any]:
        """Read it all."""
        return self.read(Work(dataset_keys(dataset, self.count), self.size, CONCURRENCY))


def take_turns(contestants: Sequence[Any], datasets: Sequence[str], byte_count: int) -> dict[str, Timings]:
    """Let every contestant bring every dataset, forwards and backwards."""
    timings = {contestant.name: Timings() for contestant in contestants}
    for turn, dataset in enumerate(datasets):
        for contestant in contestants if turn % 2 == 0 else reversed(contestants):
            drop_page_cache()
            answer = contestant.bring(dataset)
            if answer["byte_count"] != byte_count:
                raise SystemExit(f"{contestant.name} brought {answer['byte_count']} bytes instead of {byte_count}")
            row = timings[contestant.name]
            row.seconds.append(answer["seconds"])
            row.reader_cpu_s.append(answer["cpu_s"])
            row.serving_cpu_s.append(answer["serving_cpu_s"])
            print(f"  {contestant.name}: {answer['seconds']:.2f} s", file=sys.stderr)
    return timings


def small(folder: Path, options: argparse.Namespace, state: str, count: int) -> None:
    """Many small objects: latency, requests in flight and CPU."""
    datasets = [f"small{turn}" for turn in range(options.turns)]
    arguments = [word for name in datasets for word in ("--dataset", f"{name}:{count}x{SMALL_SIZE}")]
    with running_origin(*arguments, "--latency-ms", str(LATENCY_MS)) as origin, ExitStack() as stack:
        BareReader.count, BareReader.size = count, SMALL_SIZE
        everyone = [kind(folder, origin.url) for kind in (BareReader, OrchestraLoad, RcloneCopy, S3fsGet)]
        contestants = chosen(everyone, options.only, [BareReader.name, OrchestraLoad.name])
        started(stack, contestants)
        timings = take_turns(contestants, datasets, count * SMALL_SIZE)
        lines = rate_table(
            timings, contestants, amount=count, unit="files/s", cpu_per="us/file", base=BareReader.name, cold=True
        )
        bare, ours = (count / timings[kind.name].median_s for kind in (BareReader, OrchestraLoad))
        limit = min(CONCURRENCY * 1000 / LATENCY_MS, bare)
        lines += [
            "",
            f"- limit: {limit:.0f} files/s, the lower of {CONCURRENCY} at {LATENCY_MS} ms and the bare client",
        ]
        lines.append(verdict("orchestra load / limit", ours / limit, 0.85))
        publish(f"Load: {count} objects of 50 kB, {LATENCY_MS} ms first byte", lines, options, state)


def large(folder: Path, options: argparse.Namespace, state: str, count: int) -> None:
    """Few large objects: bandwidth."""
    bandwidth = float(options.bandwidth)
    turns = max(1, options.turns // 2)
    datasets = [f"large{turn}" for turn in range(turns)]
    arguments = [word for name in datasets for word in ("--dataset", f"{name}:{count}x{LARGE_SIZE}")]
    knobs = ["--latency-ms", str(LATENCY_MS), "--cap", f"{int(bandwidth)}MB"]
    with running_origin(*arguments, *knobs) as origin, ExitStack() as stack:
        everyone = [kind(folder, origin.url) for kind in (OrchestraLoad, RcloneCopy, S3fsGet)]
        contestants = chosen(everyone, options.only, [OrchestraLoad.name])
        started(stack, contestants)
        timings = take_turns(contestants, datasets, count * LARGE_SIZE)
        amount = count * LARGE_SIZE / 1e6
        lines = rate_table(
            timings, contestants, amount=amount, unit="MB/s", cpu_per="s/GiB", base=OrchestraLoad.name, cold=True
        )
        reached = amount / timings[OrchestraLoad.name].median_s / bandwidth
        lines += ["", verdict(f"orchestra load / the origin's {bandwidth:.0f} MB/s", reached, 0.9)]
        title = f"Load: {count * LARGE_SIZE / GIB:.1f} GiB in objects of 64 MiB, {bandwidth:.0f} MB/s in all"
        publish(title, lines, options, state)


def killed(folder: Path, options: argparse.Namespace, state: str, count: int) -> None:
    """kill -9 half way, and what the next daemon fetches again."""
    with running_origin("--dataset", f"half:{count}x{SMALL_SIZE}", "--latency-ms", str(LATENCY_MS)) as origin:
        node = OrchestraLoad(folder, origin.url)
        node.start()
        try:
            job = json.loads(node.orchestra("load", "--json", f"/{BUCKET}/half"))
            had = wait_for_gets(origin, count // 2)
            os.kill(node.daemon_pid, signal.SIGKILL)
            ended = json.loads(node.orchestra("job", "wait", "--json", job["id"]))
            stats = origin.call("/__stats", "GET")
        finally:
            node.close()
    again, requests = stats["bodies_sent_again"], stats["requests"]["GET"]
    lines = [
        f"- killed after {had} of {count} objects; the next daemon ended the same job: {ended['state']}, "
        f"{ended['files_done']} files",
        f"- requests in all: {requests}; objects sent to their end twice: {again} ({again / had:.2%} of what it had)",
        verdict("share of what it had that was not sent again", 1 - again / had, 0.99),
    ]
    publish(f"Load: {count} objects of 50 kB, daemon killed half way", lines, options, state)


def wait_for_gets(origin: OriginProcess, count: int) -> int:
    """Return how many objects were asked for, when they are at least so many."""
    while (asked := int(origin.call("/__stats", "GET")["requests"].get("GET", 0))) < count:
        time.sleep(0.02)
    return asked


def main() -> None:
    """Run all works and publish the tables."""
    parser = common_arguments("orchestra load against the bare store client, rclone copy and s3fs get.")
    parser.add_argument("--bandwidth", default="400", help="of the origin for large objects, in MB/s (default: 400)")
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    if options.quick:
        options.turns = min(options.turns, 2)
    small_count, large_count = (2_000, 8) if options.quick else (20_000, 64)
    with workspace() as folder:
        small(folder / "small", options, state, small_count)
        large(folder / "large", options, state, large_count)
        killed(folder / "killed", options, state, small_count)


if __name__ == "__main__":
    main()
