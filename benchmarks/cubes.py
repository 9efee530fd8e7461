"""How near do cubes out of many tables come to copying memory? 100 tables of 1000 x 1000, cubes of 100 x 100 x 100.

    python benchmarks/cubes.py [--quick] [--record]

Contestants take turns: `frames[:, :100, columns]` by one thread and by as many as there are cores, ColumnCubes
likewise, data frames in memory, and the limit: copying as many bytes as a cube has, from places as far apart, into as
many buffers as ColumnCubes uses, by as many threads. Cubes are compared with numpy's before any is timed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pandas
from common import common_arguments, machine_state, publish, refuse_a_busy_machine, verdict

from orchestra.torch import ColumnCubes

BASE = "frames[:, :rows, columns]"
OURS = "ColumnCubes"
LIMIT = "memory copy (the limit)"


class Contestant(NamedTuple):
    """A row of the table: what makes its cubes, how many make a turn."""

    name: str
    dtype: str
    threads: int
    make: Callable[[], Iterator[Any]]
    share: float = 1.0  # of a turn's cubes: the slow ones make fewer

    @property
    def row(self) -> str:
        """The name, with what else tells it apart."""
        return f"{self.name}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Cubing:
    """The tables, and every way to cubes."""

    def __init__(self, tables: int, size: int, cube: int, dtype: str) -> None:
        self.cube = cube
        self.dtype = dtype
        self.array = np.random.default_rng(0).random((tables, size, size)).astype(dtype)
        self.bytes_each = tables * cube * cube * self.array.itemsize
        self.packed = np.random.default_rng(1).random((size, tables * cube)).astype(dtype)

    def chosen(self) -> Iterator[Any]:
        """Yield the columns of one cube after another."""
        generator = np.random.default_rng(2)
        while True:
            yield generator.choice(self.array.shape[2], self.cube, replace=False)

    def by_numpy(self, threads: int) -> Iterator[Any]:
        """The expression, by so many threads."""
        if threads == 1:
            return (self.array[:, : self.cube, columns] for columns in self.chosen())
        return in_threads(lambda columns: self.array[:, : self.cube, columns], self.chosen(), threads)

    def by_frames(self) -> Iterator[Any]:
        """Data frames in memory, stacked."""
        frames = [pandas.DataFrame(table) for table in self.array]
        return (np.stack([frame.iloc[: self.cube, columns] for frame in frames]) for columns in self.chosen())

    def by_copying(self, threads: int) -> Iterator[Any]:
        """Whole copies of a cube's bytes from random places: what no layout can beat."""
        buffers = [np.empty(self.bytes_each, np.uint8) for _ in range(threads + 2)]
        source = self.packed.reshape(-1).view(np.uint8)
        last = len(source) - self.bytes_each
        generator = np.random.default_rng(3)
        places = ((int(generator.integers(last)) // 4096 * 4096, buffers[n % len(buffers)]) for n in itertools.count())

        def copy(job: tuple[int, Any]) -> Any:
            np.copyto(job[1], source[job[0] : job[0] + self.bytes_each])
            return job[1]

        return map(copy, places) if threads == 1 else in_threads(copy, places, threads)

    def contestants(self, threads: list[int]) -> Iterator[Contestant]:
        """Yield the rows for this type of number."""
        yield Contestant("data frames in memory", self.dtype, 1, self.by_frames, 0.02)
        for count in threads:
            yield Contestant(BASE, self.dtype, count, lambda count=count: self.by_numpy(count), 0.1)  # type: ignore[misc]
        for count in threads:
            cubes = ColumnCubes(self.array, self.cube, self.cube, threads=count)
            yield Contestant(OURS, self.dtype, count, cubes.__iter__)
        for count in threads:
            yield Contestant(LIMIT, self.dtype, count, lambda count=count: self.by_copying(count))  # type: ignore[misc]


def in_threads(make: Callable[[Any], Any], jobs: Iterator[Any], threads: int) -> Iterator[Any]:
    """Yield results in order, `threads` of them being made while one is used."""
    with ThreadPoolExecutor(threads) as executor:
        waiting = deque(executor.submit(make, job) for job in itertools.islice(jobs, threads))
        while True:
            waiting.append(executor.submit(make, next(jobs)))
            yield waiting.popleft().result()


def check(cubing: Cubing) -> None:
    """End with a sentence unless ColumnCubes gives what numpy gives."""
    cubes = ColumnCubes(cubing.array, cubing.cube, cubing.cube)
    for index, cube in enumerate(itertools.islice(cubes, 20)):
        if not np.array_equal(cube, cubing.array[:, : cubing.cube, cubes.chosen_columns(index)]):
            raise SystemExit(f"cube {index} of {cubing.dtype} is wrong")


def take_turn(contestant: Contestant, count: int) -> float:
    """Return cubes/s over so many cubes, after two that warm up."""
    cubes = contestant.make()
    for _ in range(2):
        next(cubes)
    wanted = max(2, int(count * contestant.share))
    began = time.perf_counter()
    for _ in itertools.islice(cubes, wanted):
        pass
    return wanted / (time.perf_counter() - began)


def take_turns(contestants: list[Contestant], turns: int, count: int) -> dict[str, list[float]]:
    """Let all take turns, forwards and then backwards."""
    rates: dict[str, list[float]] = {contestant.row: [] for contestant in contestants}
    for turn in range(turns):
        for contestant in contestants if turn % 2 == 0 else reversed(contestants):
            rates[contestant.row].append(take_turn(contestant, count))
            print(f"  {contestant.row}: {rates[contestant.row][-1]:.1f} cubes/s", file=sys.stderr)
    return rates


def table(contestants: list[Contestant], rates: dict[str, list[float]], megabytes: dict[str, float]) -> list[str]:
    """Return a Markdown table of the medians."""
    lines = ["| | cubes/s | MB/s | of numpy | turns |", "|---|---:|---:|---:|---|"]
    for contestant in contestants:
        rate = statistics.median(rates[contestant.row])
        base = statistics.median(rates[f"{BASE}, {contestant.dtype}, 1 thread"])
        turns = " ".join(f"{one:.3g}" for one in rates[contestant.row])
        cells = [f"{rate:.4g}", f"{rate * megabytes[contestant.dtype]:.0f}", f"{rate / base:.2f}", turns]
        lines.append(f"| {contestant.row} | {' | '.join(cells)} |")
    return lines


def share(rates: dict[str, list[float]], one: str, other: str, dtype: str, threads: list[int]) -> float:
    """Return the median, over the turns, of the ratio of two contestants, each with its best number of threads: both
    may use all cores, and neither is held back by threads that do not pay."""

    def best(name: str) -> list[float]:
        rows = [rates[Contestant(name, dtype, count, iter).row] for count in threads]  # type: ignore[arg-type]
        return max(rows, key=statistics.median)

    return statistics.median(a / b for a, b in zip(best(one), best(other), strict=True))


def main() -> None:
    """Measure and print."""
    options: argparse.Namespace = common_arguments(__doc__.partition("\n")[0]).parse_args()
    refuse_a_busy_machine(options.force)
    state = machine_state()
    tables, size, cube, count = (20, 200, 50, 50) if options.quick else (100, 1000, 100, 400)
    threads = sorted({1, len(os.sched_getaffinity(0))})
    all_of_them: list[Contestant] = []
    megabytes: dict[str, float] = {}
    for dtype in ("float64", "float32"):
        cubing = Cubing(tables, size, cube, dtype)
        check(cubing)
        megabytes[dtype] = cubing.bytes_each / 1e6
        all_of_them += cubing.contestants(threads)
    words = [word for word in options.only.split(",") if word]
    kept = [c for c in all_of_them if not words or any(word in c.row for word in (*words, BASE, OURS, LIMIT))]
    rates = take_turns(kept, options.turns, count)
    wanted = []
    for dtype in megabytes:
        limit = share(rates, LIMIT, BASE, dtype, threads)
        wanted += [
            verdict(f"{dtype}: ColumnCubes / {BASE}, same cores", share(rates, OURS, BASE, dtype, threads), 10),
            f"- {dtype}: a memory copy is at {limit:.2f} there{': memory is the limit' * (limit < 10)}",
            verdict(f"{dtype}: ColumnCubes / memory copy, same cores", share(rates, OURS, LIMIT, dtype, threads), 0.8),
        ]
    title = f"Cubes of {tables} x {cube} x {cube} from tables of {size} x {size}"
    note = "Published for float64 and 100^3, other machines: 76 (numpy), 355 (12 threads), 2,027 (80 vCPUs) cubes/s."
    publish(title, [*table(kept, rates, megabytes), "", note, "", *wanted], options, state)


if __name__ == "__main__":
    main()
