"""Cubes from many tables, every step of the ladder: from reading CSV files to ColumnCubes, in cubes per second.

    python examples/speed_cubing.py --tables 20 --size 200 --cube 50        # small
    python examples/speed_cubing.py --plot cubes.png                        # 100 tables of 1000 x 1000, cubes of 100^3

A cube is the first `--cube` rows of as many random columns of every table. Each step does all that the step before
does, in a better way: CSV, Parquet (only the columns needed), tables kept in memory, one numpy array, threads,
ColumnCubes. The last two run with each number of workers. Needs room for CSV files of the size asked for (2 GB for the
full one).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import pyarrow.parquet

from orchestra.torch import ColumnCubes

Cubes = Iterator[Any]


class Step(NamedTuple):
    """One rung: its name, the workers it runs with, and what makes its cubes."""

    name: str
    workers: int
    make: Callable[[], Cubes]


class Tables:
    """The tables in every form that the ladder needs."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.cube = options.cube
        self.seed = options.seed
        shape = (options.tables, options.size, options.size)
        self.array = np.random.default_rng(options.seed).random(shape)
        self.names = [f"c{number}" for number in range(options.size)]
        self.frames = [pandas.DataFrame(table, columns=self.names) for table in self.array]
        self.paths = [folder / f"table-{number}" for number in range(options.tables)]
        for path, frame in zip(self.paths, self.frames, strict=True):
            frame.to_csv(path.with_suffix(".csv"), index=False)
            frame.to_parquet(path.with_suffix(".parquet"))

    def drawn(self) -> Iterator[list[int]]:
        """Yield random columns for one cube after another."""
        generator = np.random.default_rng(self.seed)
        while True:
            yield generator.choice(len(self.names), self.cube, replace=False).tolist()

    def from_csv(self) -> Cubes:
        """Read every CSV file for every cube."""
        for chosen in self.drawn():
            yield np.stack([pandas.read_csv(p.with_suffix(".csv")).iloc[: self.cube, chosen] for p in self.paths])

    def from_parquet(self) -> Cubes:
        """Read the columns needed of every Parquet file."""
        for chosen in self.drawn():
            names = [self.names[number] for number in chosen]
            tables = (pyarrow.parquet.read_table(p.with_suffix(".parquet"), columns=names) for p in self.paths)
            yield np.stack([np.stack([column.to_numpy() for column in t[: self.cube].columns], 1) for t in tables])

    def from_frames(self) -> Cubes:
        """Take them out of data frames in memory."""
        for chosen in self.drawn():
            yield np.stack([frame.iloc[: self.cube, chosen] for frame in self.frames])

    def from_array(self) -> Cubes:
        """Take them out of one array in one expression."""
        for chosen in self.drawn():
            yield self.array[:, : self.cube, chosen]

    def by_threads(self, workers: int) -> Cubes:
        """The same, several cubes at a time."""
        with ThreadPoolExecutor(workers) as executor:
            drawn = self.drawn()
            while True:
                yield from executor.map(lambda c: self.array[:, : self.cube, c], itertools.islice(drawn, workers * 4))

    def by_column_cubes(self, workers: int) -> Cubes:
        """orchestra.torch.ColumnCubes."""
        return iter(ColumnCubes(self.array, self.cube, self.cube, seed=self.seed, threads=workers))

    def ladder(self, workers: list[int]) -> Iterator[Step]:
        """Yield the steps from the slowest to the fastest."""
        yield Step("CSV files", 1, self.from_csv)
        yield Step("Parquet files", 1, self.from_parquet)
        yield Step("data frames in memory", 1, self.from_frames)
        yield Step("numpy array", 1, self.from_array)
        for count in workers:
            yield Step("numpy array, threads", count, partial(self.by_threads, count))
        for count in workers:
            yield Step("ColumnCubes", count, partial(self.by_column_cubes, count))


def cubes_per_second(make: Callable[[], Cubes], seconds: float) -> float:
    """Return how many cubes come in a second, after the first."""
    cubes = make()
    next(cubes)
    made = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or not made:
        next(cubes)
        made += 1
    return made / passed


def plot(rates: dict[Step, float], file: str) -> None:
    """Draw cubes/s over workers, on a logarithmic scale."""
    try:
        import matplotlib.pyplot as pyplot
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = pyplot.subplots()
    for name in dict.fromkeys(step.name for step in rates):
        points = [(step.workers, rate) for step, rate in rates.items() if step.name == name]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="workers", ylabel="cubes/s", yscale="log")
    axes.legend()
    figure.savefig(file)
    print(f"wrote {file}")


def main() -> None:
    """Make the tables, climb the ladder, print the table."""
    parser = argparse.ArgumentParser(description="Cubes per second from many tables, in every way.")
    parser.add_argument("--tables", type=int, default=100)
    parser.add_argument("--size", type=int, default=1000, help="rows and columns of each table (default: 1000)")
    parser.add_argument("--cube", type=int, default=100, help="rows and columns of a cube (default: 100)")
    parser.add_argument("--workers", default="1,2", help="numbers of threads to try (default: 1,2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each step (default: 2)")
    parser.add_argument("--plot", metavar="FILE", help="draw the rates into this picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    workers = [int(word) for word in options.workers.split(",")]
    rates: dict[Step, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tables = Tables(Path(folder), options)
        megabytes = options.tables * options.cube**2 * 8 / 1e6
        print(f"{'step':24} {'workers':>7} {'cubes/s':>10} {'MB/s':>10}")
        for step in tables.ladder(workers):
            rate = rates[step] = cubes_per_second(step.make, options.seconds)
            print(f"{step.name:24} {step.workers:7} {rate:10.2f} {rate * megabytes:10.0f}", flush=True)
    if options.plot:
        plot(rates, options.plot)


if __name__ == "__main__":
    main()
