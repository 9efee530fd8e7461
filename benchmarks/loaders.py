"""How fast do training batches come: rows of a table, and small files, against the usual loaders and the peers'?

    python benchmarks/loaders.py [--quick] [--record] [--part tables|files]

Tables: a table of HIGGS's shape (28 float32 features and a target) in memory, batches of 1,024 rows, by slices and
shuffled; a bare loop of slices or gathers is the floor. Files: 110 kB each from an S3 origin with 50 ms to the first
byte, two workers, batches of 32, cold and warm. Peers that are not installed are left out, and said so:
s3fs, s3torchconnector and webdataset from PyPI, mosaicml-streaming and litdata with --no-deps (they ask for CUDA).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import (
    common_arguments,
    drop_page_cache,
    machine_state,
    publish,
    refuse_a_busy_machine,
    running_origin,
    verdict,
    workspace,
)
from loader_contestants import (
    SIZE,
    ConnectorLoader,
    ConvertedLoader,
    LitDataLoader,
    LoaderFailedError,
    MosaicLoader,
    MountFileDataset,
    MountLoader,
    NativeLoader,
    OrchestraLoader,
    S3fsLoader,
    WebDatasetLoader,
    installed,
    write_files,
)
from synthetic import dataset_keys
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestra.torch import TensorBatches

BATCH = 1024
FEATURES = 28
LATENCY_MS = 50
# DataLoader needs 7 us a row, slices 5 ns: a turn of each takes part of a second with these shares of the table.
STANDARD_SHARE = 0.1
OURS = OrchestraLoader.name
TRAINING = "shuffled, training a logistic regression"
ALONE = "the model alone, on one batch"
WARM_TURNS = 2
WARM_EPOCHS = 3


class Tables:
    """The table, and every way to its batches; a way gives the batches of an epoch and the rows in it."""

    def __init__(self, rows: int) -> None:
        self.features = torch.randn(rows, FEATURES)
        self.target = (self.features[:, 0] + torch.randn(rows) > 0).float()
        self.rows = rows

    def standard(self, shuffle: bool) -> tuple[Iterable[Any], int]:
        """DataLoader(TensorDataset(...)) over a part of the table."""
        rows = int(self.rows * STANDARD_SHARE)
        dataset = TensorDataset(self.features[:rows], self.target[:rows])
        return DataLoader(dataset, batch_size=BATCH, shuffle=shuffle), rows

    def ours(self, shuffle: bool) -> tuple[Iterable[Any], int]:
        """TensorBatches over the whole table."""
        return TensorBatches(self.features, self.target, batch_size=BATCH, shuffle=shuffle), self.rows

    def bare(self, shuffle: bool) -> tuple[Iterable[Any], int]:
        """The loop that people write: slices, or one gather for each tensor and batch."""
        tensors = (self.features, self.target)

        def batches() -> Iterable[Any]:
            if not shuffle:
                for start in range(0, self.rows, BATCH):
                    yield [tensor[start : start + BATCH] for tensor in tensors]
                return
            order = torch.randperm(self.rows)
            for start in range(0, self.rows, BATCH):
                chosen = order[start : start + BATCH]
                yield [tensor.index_select(0, chosen) for tensor in tensors]

        return batches(), self.rows

    def nothing(self, shuffle: bool) -> tuple[Iterable[Any], int]:
        """One batch again and again: a loader that costs nothing."""
        batch = [self.features[:BATCH].clone(), self.target[:BATCH].clone()]
        return itertools.repeat(batch, self.rows // BATCH), self.rows // BATCH * BATCH


def idle(batches: Iterable[Any]) -> None:
    """Take the batches and do nothing with them."""
    for _ in batches:
        pass


def train(batches: Iterable[Any]) -> None:
    """A logistic regression: the smallest model that trains."""
    model = nn.Linear(FEATURES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for features, target in batches:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(features)[:, 0], target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def check_tables(tables: Tables) -> None:
    """End with a sentence unless TensorBatches gives DataLoader's batches."""
    for shuffle in (False, True):
        rows = min(tables.rows, 5000)
        tensors = (tables.features[:rows], tables.target[:rows])
        made = [torch.Generator().manual_seed(1) for _ in range(2)]
        ours = TensorBatches(*tensors, batch_size=BATCH, shuffle=shuffle, generator=made[0])
        theirs = DataLoader(TensorDataset(*tensors), batch_size=BATCH, shuffle=shuffle, generator=made[1])
        for mine, wanted in zip(ours, theirs, strict=True):
            if not all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True)):
                raise SystemExit("TensorBatches gave another batch than DataLoader")


def time_tables(tables: Tables, turns: int) -> dict[tuple[str, str], list[float]]:
    """Return rows/s of every turn for each work and way."""
    ways: dict[str, Callable[[bool], tuple[Iterable[Any], int]]] = {
        "DataLoader(TensorDataset)": tables.standard,
        "TensorBatches": tables.ours,
        "bare loop": tables.bare,
        ALONE: tables.nothing,
    }
    works: dict[str, tuple[bool, Callable[[Iterable[Any]], None]]] = {
        "in order": (False, idle),
        "shuffled": (True, idle),
        TRAINING: (True, train),
    }
    pairs = [(work, way) for work in works for way in ways if way != ALONE or work == TRAINING]
    rates: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for turn, work in itertools.product(range(turns), works):
        shuffle, consume = works[work]
        for way in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            if (work, way) not in rates:
                continue
            batches, rows = ways[way](shuffle)
            began = time.perf_counter()
            consume(batches)
            rates[work, way].append(rows / (time.perf_counter() - began))
            print(f"  {way}, {work}: {rates[work, way][-1]:.4g} rows/s", file=sys.stderr)
    return rates


def tables_part(options: argparse.Namespace, state: str) -> None:
    """Measure and publish the tables."""
    torch.set_num_threads(1)  # a model this small gains nothing from more, and loses much when a core is busy
    tables = Tables(100_000 if options.quick else 4_000_000)
    check_tables(tables)
    rates = time_tables(tables, options.turns)
    lines = [
        "| | loader | rows/s | of DataLoader | seconds per epoch of 11 M rows | turns |",
        "|---|---|---:|---:|---:|---|",
    ]
    for (work, way), found in rates.items():
        rate = statistics.median(found)
        standard_rate = statistics.median(rates[work, "DataLoader(TensorDataset)"])
        turns = " ".join(f"{one:.3g}" for one in found)
        lines.append(f"| {work} | {way} | {rate:.4g} | {rate / standard_rate:.1f} | {11e6 / rate:.2f} | {turns} |")

    def share(work: str, other: str, one: str = "TensorBatches") -> float:
        return statistics.median(a / b for a, b in zip(rates[work, one], rates[work, other], strict=True))

    def added_s(way: str) -> float:
        """Seconds that the loader adds to the training on a row."""
        both = zip(rates[TRAINING, way], rates[TRAINING, ALONE], strict=True)
        return max(1e-12, statistics.median(1 / with_it - 1 / alone for with_it, alone in both))

    standard = "DataLoader(TensorDataset)"
    limit = share(TRAINING, standard, ALONE)
    theirs_s, ours_s = added_s(standard), added_s("TensorBatches")
    wanted = [
        verdict("in order: TensorBatches / DataLoader", share("in order", standard), 50),
        verdict("shuffled: TensorBatches / DataLoader", share("shuffled", standard), 20),
        verdict("in order: TensorBatches / bare slices", share("in order", "bare loop"), 0.8),
        verdict("shuffled: TensorBatches / bare gathers", share("shuffled", "bare loop"), 0.8),
        verdict("an epoch with training: TensorBatches / DataLoader", share(TRAINING, standard), 20),
        f"- a loader that costs nothing would be at {limit:.2f} there{': the model is the limit' * (limit < 20)}",
        f"- TensorBatches is at {share(TRAINING, ALONE):.2f} of it",
        f"- what the loader adds to the model's time, an epoch of 11 M rows: DataLoader {theirs_s * 11e6:.2f} s,"
        f" TensorBatches {ours_s * 11e6:.2f} s",
        verdict("what the loader adds to an epoch, DataLoader / TensorBatches", theirs_s / ours_s, 20),
    ]
    title = f"Rows of a table, {FEATURES} features and a target, batches of {BATCH}"
    publish(title, [*lines, "", *wanted], options, state)


def take_turns(
    contestants: Sequence[Any], works: Sequence[Sequence[str]], *, cold: bool, epochs: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return files/s, and the loader's CPU microseconds a file, of every turn; cold turns load files that nobody has
    read, with the page cache emptied."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    cpus: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for turn, names in enumerate(works):
        for contestant in contestants if turn % 2 == 0 else reversed(contestants):
            if cold:
                drop_page_cache()
            whole = isinstance(contestant, ConvertedLoader)  # its shards are what they are
            share = contestant.cold_share if cold and contestant.cold_share is not None else contestant.share
            part = names if whole else names[: max(64, int(len(names) * share))]
            try:
                answer = contestant.load(part, epochs=epochs)
                rates[contestant.name].append(len(part) * epochs / answer["seconds"])
                cpus[contestant.name].append(answer["cpu_s"] / (len(part) * epochs) * 1e6)
            except LoaderFailedError as error:
                print(error, file=sys.stderr)
                rates[contestant.name].append(math.nan)
                cpus[contestant.name].append(math.nan)
            print(f"  {contestant.name}: {rates[contestant.name][-1]:.0f} files/s", file=sys.stderr)
    return rates, cpus


def median(values: Sequence[float]) -> float:
    """Return the median of the turns that succeeded, 0 if none did; a failed turn is a NaN."""
    done = [value for value in values if not math.isnan(value)]
    return statistics.median(done) if done else 0.0


def files_table(rates: dict[str, list[float]], cpus: dict[str, list[float]]) -> list[str]:
    """Return a Markdown table of the medians, the fastest first."""
    lines = ["| | files/s | MB/s | CPU of the loader, us a file | turns |", "|---|---:|---:|---:|---|"]
    medians = {name: median(found) for name, found in rates.items()}
    for name in sorted(rates, key=lambda one: -medians[one]):
        rate = medians[name]
        turns = " ".join(f"{one:.0f}" for one in rates[name])
        lines.append(f"| {name} | {rate:.0f} | {rate * SIZE / 1e6:.0f} | {median(cpus[name]):.0f} | {turns} |")
    return lines


def ahead(rates: dict[str, list[float]], others: Sequence[str]) -> list[str]:
    """Return a verdict for each of the others."""
    ours = rates[OURS]
    pairs = ((other, zip(ours, rates[other], strict=True)) for other in others if other in rates)
    return [verdict(f"{OURS} / {other}", median([a / b for a, b in both]), 1) for other, both in pairs]


def able(peers: Sequence[Any], names: Sequence[str], missing: list[str]) -> list[Any]:
    """Return the peers that load every byte, converted first where they need it; the others are named in `missing`."""
    found = []
    for peer in peers:
        try:
            if isinstance(peer, ConvertedLoader):
                peer.convert(names)
            peer.load(names, check=True)
            found.append(peer)
        except LoaderFailedError as error:
            print(error, file=sys.stderr)
            missing.append(f"{peer.name} (fails)")
    return found


def files_part(options: argparse.Namespace, state: str) -> None:
    """Measure and publish the files, cold and warm."""
    count = 128 if options.quick else 1600
    names = dataset_keys("small", count * (options.turns + 1))
    slices = [names[at : at + count] for at in range(0, len(names), count)]
    warm_names = slices[0]
    with (
        workspace() as folder,
        running_origin("--dataset", f"small:{len(names)}x{SIZE}") as origin,
        ExitStack() as stack,
    ):
        floor = NativeLoader(folder, origin.url, folder / "native")
        ours: list[Any] = [
            OrchestraLoader(folder, origin.url),
            MountLoader(folder, origin.url),
            MountFileDataset(folder, origin.url),
        ]
        remote: list[Any] = [S3fsLoader(folder, origin.url), ConnectorLoader(folder, origin.url)]
        converted: list[Any] = [kind(folder, origin.url) for kind in (WebDatasetLoader, MosaicLoader, LitDataLoader)]
        missing = [one.name for one in (*remote, *converted) if not installed(one.module)]
        remote, converted = ([one for one in group if installed(one.module)] for group in (remote, converted))
        write_files(Path(folder / "native"), warm_names)
        for contestant in (*ours, *remote, *converted):
            contestant.start()
            stack.callback(contestant.close)
        folders = sorted({name.rsplit("/", 1)[0] for name in names})
        for contestant in ours:
            contestant.list_folders(folders)
        for contestant in (floor, *ours):  # fills the caches, and proves the bytes
            contestant.load(warm_names, check=True)
        remote, converted = (able(group, warm_names, missing) for group in (remote, converted))
        origin.set(latency_ms=LATENCY_MS)
        cold, cold_cpus = take_turns([*ours, *remote], slices[1:], cold=True)
        warm, warm_cpus, far = warm_turns([floor, *ours, *converted], [ours[0], *remote], warm_names, options.turns)
    note = f"Left out, not installed unless said: {', '.join(missing)}." if missing else "All peers took part."
    said = f"{count} files of 110 kB, {LATENCY_MS} ms first byte, 2 workers, batches of 32"
    peers = [one.name for one in remote]
    publish(f"Loading cold: {said}", [*files_table(cold, cold_cpus), "", *ahead(cold, peers)], options, state)
    verdicts = [*ahead(far, peers), *ahead(warm, [one.name for one in converted])]
    how = (
        f"Turns: {options.turns} of 1 epoch for what goes to the store each time ({', '.join(peers) or 'none'}) and for"
        f" {OURS} in the ratios to them; else {WARM_TURNS * options.turns} of {WARM_EPOCHS} epochs, after one that is"
        " not counted."
    )
    same = (
        f"Every loader gives the same, tensors of 32 x {SIZE} bytes that DataLoader's own collation made in a worker,"
        " and nobody looks into them. FileDataset's come in memory that is used again (orchestra/torch/handover.py),"
        " the others' in memory that torch makes for each batch."
    )
    lines = [*files_table(warm, warm_cpus), "", how, same, note, "", *verdicts]
    publish(f"Loading warm: {said}", lines, options, state)


def warm_turns(
    near: Sequence[Any], far: Sequence[Any], names: Sequence[str], turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Return files/s and CPU of every turn, and files/s of the turns with those that go to the store each time: these
    take half a minute, the others a second, of which there are more, as they differ by little and turns by a fifth."""
    far_rates, far_cpus = take_turns(far, [names] * turns, cold=False)
    os.sync()  # what the conversions wrote
    take_turns(near, [names], cold=False)  # and every page that will be read is in memory
    rates, cpus = take_turns(near, [names] * (WARM_TURNS * turns), cold=False, epochs=WARM_EPOCHS)
    return {**far_rates, **rates}, {**far_cpus, **cpus}, far_rates


def main() -> None:
    """Run the parts that are asked for."""
    parser = common_arguments("Rows of tables and small files against DataLoader and the peers' loaders.")
    parser.add_argument("--part", choices=["all", "tables", "files"], default="all")
    options = parser.parse_args()
    refuse_a_busy_machine(options.force or options.quick)
    state = machine_state()
    if options.part in ("all", "tables"):
        tables_part(options, state)
    if options.part in ("all", "files"):
        files_part(options, state)


if __name__ == "__main__":
    main()
