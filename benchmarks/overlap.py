"""How much of fetching hides behind computing in the first epoch? Compute is a sleep; the store is far and narrow.

    python benchmarks/overlap.py [--quick] [--record] [--only orchestra] [--peers DIR]

Overlap efficiency is max(T_compute, T_io) / T_epoch: 1 when nothing that could be done at the same time was done after
another. T_io is what the bare store client takes for the bytes with 128 requests at a time; T_compute is 0.5, 1 and 2
times that; T_epoch begins with the call of `iter(loader)`. Files are read in a shuffled order by the same DataLoader,
whoever serves them; libraries with shards of their own stream those, of the same samples. Every run begins with nothing
cached, names listed.

litdata, mosaicml-streaming and webdataset ask for packages that we do not want beside ours. They take part if they can
be imported from --peers (or $BENCH_PEERS), a folder made by `pip install --no-deps --target`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from blind import Setting, blind_limit
from common import (
    HERE,
    OriginProcess,
    common_arguments,
    drop_page_cache,
    machine_state,
    publish,
    refuse_a_busy_machine,
    running_origin,
    verdict,
    workspace,
)
from contestants import KEY, SECRET, BareClient, Contestant, OrchestraMount, RcloneMount, S3fsPython, clean_environment
from origin import BUCKET
from reader import Work
from synthetic import dataset_keys

LATENCY_MS = 50
RATIOS = (0.5, 1.0, 2.0)
DATASET = "train"
FILE_SIZE = 500_000
# Four that read a file at a time take two thirds of the link, which leaves something to do for whoever fetches ahead.
# Without knowing the order nobody can then come near 1 at T_compute = T_io: what is missed comes at two thirds of the
# link's rate, whatever comes beside it (blind.py). Eight fill the link by themselves.
WORKERS = 4
WORKERS_WIDE = 8
BATCH = 8
# Samples in a shard of the libraries that have shards: 25 MB of 500 kB samples.
SHARD_SAMPLES = 50
RUN_TIMEOUT_S = 300


class Trainer(Contestant):
    """Somebody who serves a dataset to the training process."""

    library = ""
    names: Sequence[str] = ()
    # Peers are there for the first epoch, once; of ours, two are compared with what is wanted.
    epochs = 1
    turns_max = 1
    workers = WORKERS
    ratios: Sequence[float] = RATIOS

    def surroundings(self) -> Mapping[str, str]:
        """Return the environment of the training process."""
        return clean_environment()

    def check(self) -> None:
        """End with a sentence unless the training was served as the contestant's name says."""

    def training(self) -> tuple[str, dict[str, Any]]:
        """Return the trainer's kind and its arguments."""
        method, setup = self.reader_setup()
        assert method == "folder", "others say what they need"
        return "folder", setup


class DatasetMount(OrchestraMount, Trainer):
    """orchestra as a folder with prefetch = "dataset"; nothing in the script knows."""

    name = 'orchestra mount, prefetch = "dataset"'
    mount_settings = 'prefetch = "dataset"'
    epochs = 2
    turns_max = 99

    def surroundings(self) -> Mapping[str, str]:
        return self.environment  # with the folder in which its mount says what it shows

    def check(self) -> None:
        (run,) = self.status()["prefetch"]["dataset"]
        if run["state"] not in ("loading", "complete") or not run["bytes_done"]:
            raise SystemExit(f"dataset prefetch ended as {run}")

    def status(self) -> dict[str, Any]:
        """Return what the daemon says of itself."""
        return dict(json.loads(self.orchestra("daemon", "status", "--json")))


class OnDemandMount(DatasetMount):
    """The same without prefetch, for comparison."""

    name = 'orchestra mount, prefetch = "none"'
    mount_settings = 'prefetch = "none"'
    epochs = turns_max = 1

    def check(self) -> None:
        if self.status()["prefetch"]["dataset"]:
            raise SystemExit("something was fetched ahead")


class PlannedMount(OnDemandMount):
    """The same with one line in the script: orchestra.torch.PlannedSampler."""

    name = "orchestra mount, PlannedSampler"
    epochs = 2
    turns_max = 99

    def training(self) -> tuple[str, dict[str, Any]]:
        _, setup = super().training()
        return "planned", {**setup, "config": str(self.config)}


class Wide(Trainer):
    """Before its class of a contestant: as many workers as fill the store's link by themselves."""

    workers = WORKERS_WIDE
    epochs = turns_max = 1
    ratios = (1.0,)


class PlannedMountWide(Wide, PlannedMount):
    name = f"{PlannedMount.name}, {WORKERS_WIDE} workers"


class DatasetMountWide(Wide, DatasetMount):
    name = f"{DatasetMount.name}, {WORKERS_WIDE} workers"


class LocalFolder(Trainer):
    """The files on this machine's disk from the start: what a DataLoader's own hand-over costs."""

    name = "local folder"
    epochs = 2

    def training(self) -> tuple[str, dict[str, Any]]:
        return "folder", {"folder": str(self.folder)}

    def list_folders(self, folders: Sequence[str]) -> None:
        data = os.urandom(FILE_SIZE)
        for name in self.names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


class RcloneTrainer(RcloneMount, Trainer):
    """rclone mount."""


class S3fsTrainer(S3fsPython, Trainer):
    """The DataLoader's workers read with s3fs."""

    name = "torch DataLoader on s3fs"

    def training(self) -> tuple[str, dict[str, Any]]:
        return "fsspec", {"folder": BUCKET, "protocol": "s3", "options": self.options()}


class ShardTrainer(Trainer):
    """A library that streams its own shards, made beforehand below `shards` and served by the same origin."""

    shards = Path()

    def training(self) -> tuple[str, dict[str, Any]]:
        shards = sorted(path.name for path in (self.shards / self.library).iterdir())
        return self.library, {
            "url": f"{self.origin_url}/{BUCKET}/{self.library}",
            "uri": f"s3://{BUCKET}/{self.library}",
            "cache": str(self.folder / "cache"),
            "shards": shards,
            "storage_options": {
                "endpoint_url": self.origin_url,
                "aws_access_key_id": KEY,
                "aws_secret_access_key": SECRET,
            },
        }


class WebDataset(ShardTrainer):
    """webdataset over HTTP."""

    name = "webdataset (tar over HTTP)"
    library = "webdataset"


class LitData(ShardTrainer):
    """litdata."""

    name = "litdata"
    library = "litdata"


class MosaicStreaming(ShardTrainer):
    """mosaicml-streaming."""

    name = "mosaicml-streaming"
    library = "streaming"


def trainer(
    request: dict[str, Any], peers: str, origin_url: str = "", environment: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Run the training process; None, with its last words on standard error, if it fails."""
    environment = dict(environment or clean_environment())
    if peers:
        environment["PYTHONPATH"] = peers
    environment |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}
    environment |= {"S3_ENDPOINT_URL": origin_url, "AWS_ENDPOINT_URL": origin_url} if origin_url else {}
    command = [sys.executable, str(HERE / "trainer.py")]
    try:
        ended = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, env=environment, timeout=RUN_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        print(f"the trainer did not end within {RUN_TIMEOUT_S} s", file=sys.stderr)
        return None
    if ended.returncode:
        print("\n".join(ended.stderr.strip().splitlines()[-3:]), file=sys.stderr)
        return None
    return dict(json.loads(ended.stdout.strip().splitlines()[-1]))


def packed(kinds: Sequence[type[ShardTrainer]], options: argparse.Namespace, size: int) -> list[type[ShardTrainer]]:
    """Make the shards; return those whose library can."""
    able = []
    for kind in kinds:
        setup = {"library": kind.library, "target": str(ShardTrainer.shards / kind.library), "shard": SHARD_SAMPLES}
        if trainer({"pack": setup | {"count": options.files, "size": size}}, options.peers) is not None:
            able.append(kind)
    return able


class Course:
    """The runs of one invocation."""

    def __init__(self, folder: Path, origin: OriginProcess, options: argparse.Namespace, size: int) -> None:
        self.folder = folder
        self.origin = origin
        self.peers = options.peers
        self.size = size
        self.names = dataset_keys(DATASET, options.files)
        self.runs = 0

    def io_seconds(self) -> float:
        """Return how long the bare client takes for all bytes."""
        bare = BareClient(self.folder / "bare", self.origin.url)
        try:
            return min(float(bare.read(Work(self.names, self.size, 128))["seconds"]) for _ in range(2))
        finally:
            bare.close()

    def epoch(self, kind: type[Trainer], compute_s: float) -> dict[str, Any] | None:
        """Let a contestant serve its epochs, beginning with nothing."""
        self.runs += 1
        contestant = kind(self.folder / str(self.runs), self.origin.url)
        contestant.names = self.names
        with ExitStack() as stack:
            contestant.start()
            stack.callback(contestant.close)
            contestant.list_folders(sorted({name.rsplit("/", 1)[0] for name in self.names}))
            drop_page_cache()
            method, setup = contestant.training()
            steps = -(-len(self.names) // BATCH)
            train = {"names": self.names, "size": self.size, "workers": kind.workers, "batch": BATCH}
            train["epochs"] = kind.epochs
            request = {"kind": method, "setup": setup, "train": train | {"step_s": compute_s / steps}}
            answer = trainer(request, self.peers, self.origin.url, contestant.surroundings())
            contestant.check()
            return answer


def table(results: dict[str, dict[float, list[Any]]], io_s: float) -> list[str]:
    """Return the Markdown table: efficiency per ratio (median turn), stalls of the second epoch."""
    heads = " | ".join(f"T_compute = {ratio:g} T_io" for ratio in RATIOS)
    rows = [f"| | {heads} | waiting in epoch 2, of it |", f"|---|{'---:|' * len(RATIOS)}---:|"]
    for name, by_ratio in results.items():
        cells: list[str] = []
        stalls: list[str] = []
        for ratio in RATIOS:
            runs = [run for run in by_ratio[ratio] if run is not None]
            cells.append(f"{efficiency(runs, ratio, io_s):.2f}" if runs else "failed" if by_ratio[ratio] else "-")
            if runs and len(runs[0]["waits_s"]) > 1:
                stalls.append(f"{100 * stall_share(runs):.1f}")
        stall = f"{' / '.join(stalls)} %" if stalls else "-"
        rows.append(f"| {name} | {' | '.join(cells)} | {stall} |")
    return rows


def efficiency(runs: Sequence[dict[str, Any]], ratio: float, io_s: float) -> float:
    """Return max(T_compute, T_io) / T_epoch of the first epoch."""
    return max(1.0, ratio) * io_s / float(statistics.median(run["epochs_s"][0] for run in runs))


def stall_share(runs: Sequence[dict[str, Any]]) -> float:
    """Return which part of the second epoch was waiting."""
    return float(statistics.median(run["waits_s"][1] / run["epochs_s"][1] for run in runs))


def verdicts(
    name: str, wanted: float, runs_by_ratio: dict[float, list[Any]], local: dict[float, list[Any]], io_s: float
) -> list[str]:
    """Return the lines that compare with the figures wanted, and with the waiting of a local folder's training."""
    lines = []
    for ratio in RATIOS:
        runs = [run for run in runs_by_ratio[ratio] if run is not None]
        if not runs:
            continue
        lines.append(verdict(f"{name}, {ratio:g} T_io", efficiency(runs, ratio, io_s), wanted))
        if len(runs[0]["waits_s"]) > 1:
            epoch_2, without = f"{name}, epoch 2 without waiting", 1 - stall_share(runs)
            lines.append(verdict(f"{epoch_2}, {ratio:g} T_io", without, 0.99))
            beside = [run for run in local.get(ratio, ()) if run is not None]
            if beside:
                beyond = min(1.0, without + stall_share(beside))
                lines.append(verdict(f"{epoch_2} beyond a local folder's, {ratio:g} T_io", beyond, 0.99))
    return lines


def is_wanted(kind: type[Trainer], only: str) -> bool:
    """Whether --only names the contestant."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    return not words or any(word in kind.name for word in words)


def all_runs(
    course: Course, kinds: Sequence[type[Trainer]], turns: int, io_s: float
) -> dict[str, dict[float, list[Any]]]:
    """Let everyone train at every ratio, forwards and backwards; None stands for a run that failed."""
    results: dict[str, dict[float, list[Any]]] = {kind.name: {ratio: [] for ratio in RATIOS} for kind in kinds}
    for turn in range(turns):
        running = [kind for kind in kinds if turn < kind.turns_max]
        for ratio in RATIOS:
            for kind in running if turn % 2 == 0 else reversed(running):
                if ratio not in kind.ratios:
                    continue
                run = course.epoch(kind, ratio * io_s)
                results[kind.name][ratio].append(run)
                print(f"  {kind.name}, {ratio:g}: {run and run['epochs_s']}", file=sys.stderr)
    return results


def main() -> None:
    """Run all and publish the table."""
    parser = common_arguments("Overlap of fetching and computing in the first epoch, orchestra beside peers.")
    parser.add_argument("--peers", default=os.environ.get("BENCH_PEERS", ""), help="folder of libraries to import")
    parser.add_argument("--bandwidth", default="50MB", help="of the origin in all (default: 50MB a second)")
    parser.add_argument("--files", type=int, default=900, help="of 500 kB (default: 900)")
    parser.set_defaults(turns=1)
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    if options.quick:
        options.turns, options.files = 1, 200
    kinds = [
        kind
        for kind in (
            PlannedMount,
            DatasetMount,
            OnDemandMount,
            PlannedMountWide,
            DatasetMountWide,
            LocalFolder,
            S3fsTrainer,
            RcloneTrainer,
        )
        if is_wanted(kind, options.only)
    ]
    libraries = [kind for kind in (WebDataset, LitData, MosaicStreaming) if is_wanted(kind, options.only)]
    with workspace() as folder:
        ShardTrainer.shards = folder / "shards"
        ShardTrainer.shards.mkdir()
        able = packed(libraries, options, FILE_SIZE)
        absent = [kind.name for kind in libraries if kind not in able]
        datasets = ["--dataset", f"{DATASET}:{options.files}x{FILE_SIZE}", "--folder", str(ShardTrainer.shards)]
        with running_origin(*datasets, "--latency-ms", str(LATENCY_MS), "--cap", options.bandwidth) as origin:
            course = Course(folder, origin, options, FILE_SIZE)
            io_s = course.io_seconds()
            results = all_runs(course, [*kinds, *able], options.turns, io_s)
    lines = table(results, io_s)
    lines += ["", f"- T_io: {io_s:.2f} s; {WORKERS} workers where nothing else is said, batches of {BATCH}"]
    lines += [f"- not taking part (not importable from --peers): {', '.join(absent)}"] if absent else []
    for workers, ratios in ((WORKERS, RATIOS), (WORKERS_WIDE, DatasetMountWide.ratios)):
        setting = Setting(options.files, workers, BATCH, LATENCY_MS / 1000, io_s, io_s)
        limits = (f"{blind_limit(replace(setting, compute_s=one * io_s)):.2f} at {one:g} T_io" for one in ratios)
        lines.append(f"- at most, blind to the order and perfect otherwise, {workers} workers: {', '.join(limits)}")
    for kind, wanted in (
        (PlannedMount, 0.95),
        (DatasetMount, 0.85),
        (PlannedMountWide, 0.95),
        (DatasetMountWide, 0.85),
    ):
        if kind.name in results:
            lines += verdicts(kind.name, wanted, results[kind.name], results.get(LocalFolder.name, {}), io_s)
    publish(f"Overlap: {options.files} files of 500 kB, {LATENCY_MS} ms, {options.bandwidth}/s", lines, options, state)


if __name__ == "__main__":
    main()
