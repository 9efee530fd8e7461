"""Cubes out of many tables: the same random columns of every table, stacked, as fast as memory can be copied.

Owns: the layout that makes a cube a copy of long runs, which columns a cube has, memory that is used again. Leaves to
others: reading files (tables).

`frames[:, :rows, chosen]` fetches a cache line of 64 bytes for every value of 8, since neighbours in memory are other
columns. Here the part of the tables that can be in a cube at all lies turned round, (columns, tables, rows): a column
of all tables is one run of memory (80 KB for 100 tables of 100 rows), so a cube is as many long copies as it has
columns. What is handed out has the shape (tables, rows, columns), and in memory the same order as numpy's own answer to
that expression: rows are next to one another.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from orchestra.errors import UsageError
from orchestra.torch.tables import NUMBERS, column_values, first_rows, is_path, kind_of, read_array

Array = np.ndarray[Any, Any]

# Above this more threads copy no faster: two or three fill the memory's bandwidth of one socket.
_THREADS_MAX = 8
# Cubes that a thread has ready before they are asked for: one, so that it never waits for the reader.
_AHEAD_PER_THREAD = 1
# Handing a task to a thread and its result back costs 50 us, in which 500 kB are copied: small cubes go several a task.
_TASK_BYTES = 4 << 20
_TASK_CUBES_MAX = 16
_LARGE_PAGE_BYTES = 2 << 20


class ColumnCubes(IterableDataset[Any]):
    """An endless (or `count` long) series of cubes of shape (tables, rows, columns).

    `frames`: an array of shape (tables, rows, columns), or data frames, or paths of Parquet, Arrow, CSV or npy files.
    Every cube has the first `rows` rows of every table and `columns` columns drawn without repetition, the same for all
    tables (by their place: names are not looked at). Cube i follows from `seed`, `epoch` and i alone: it is the same in
    any process, with any number of threads and of DataLoader workers, who make every n-th each and together give the
    series in its order.

    `out`: "numpy" or "torch". A cube is the caller's own: memory is used again only when nothing refers to it.
    `dtype`: what values are converted to once, at the start; None keeps what the tables have. `threads`: how many cubes
    are made at a time; None takes one per core, and one in a DataLoader worker. For workers use
    `DataLoader(cubes, batch_size=None, num_workers=...)`.
    """

    def __init__(
        self,
        frames: Any,
        rows: int = 100,
        columns: int = 100,
        *,
        seed: int = 0,
        out: Literal["numpy", "torch"] = "numpy",
        count: int | None = None,
        dtype: Any = None,
        threads: int | None = None,
        config: str | None = None,
    ) -> None:
        if out not in ("numpy", "torch"):
            raise UsageError(f'out: expected "numpy" or "torch", got {out!r}')
        for name, value, least in (("seed", seed, 0), ("count", count, 0), ("threads", threads, 1)):
            if value is not None and value < least:
                raise UsageError(f"{name}: expected at least {least}, got {value}")
        packed = _pack(frames, rows, dtype, config)
        if not 0 < columns <= len(packed):
            raise UsageError(f"columns: expected 1 to {len(packed)}, as many as the tables have, got {columns}")
        # A tensor, so that workers made by spawn share it instead of getting a copy each.
        self._packed = torch.from_numpy(packed)
        self.columns = columns
        self.seed = seed
        self.count = count
        self.epoch = 0
        self._out = out
        self._threads = threads
        self._resume_at = 0
        self._next = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tables, rows, columns) of every cube."""
        _, tables, rows = self._packed.shape
        return tables, rows, self.columns

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration another series; without it, every iteration gives the same cubes."""
        self.epoch = epoch
        self._resume_at = 0

    def state_dict(self) -> dict[str, int]:
        """Return where the series is, for `load_state_dict`. Meant for iteration without DataLoader workers."""
        return {"seed": self.seed, "epoch": self.epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the cube after the last one that was handed out when `state` was taken."""
        self.seed, self.epoch, self._resume_at = state["seed"], state["epoch"], state["next"]
        self._next = self._resume_at

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the series is endless; give count for a length")
        return self.count

    def chosen_columns(self, index: int) -> Array:
        """Return which columns cube `index` of this epoch has, in their order in the cube."""
        return self._draws().columns_of(index)

    def cube(self, index: int) -> Any:
        """Return cube `index` of this epoch."""
        return self._make(self.chosen_columns(index), _Shelf())

    def _draws(self) -> _Draws:
        return _Draws(self.seed, self.epoch, len(self._packed), self.columns)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        begin, self._resume_at = self._resume_at, 0
        threads = self._threads or (1 if worker is not None else min(_THREADS_MAX, len(os.sched_getaffinity(0))))
        shelf = _Shelf()
        draws = self._draws()
        chosen = (draws.columns_of(index) for index in _indices(begin + first, self.count, step))
        cubes: Iterator[Any] = (self._make(columns, shelf) for columns in chosen)
        if threads > 1:
            cubes = self._made_by_threads(chosen, threads, shelf)
        self._next = begin
        for cube in cubes:
            self._next += step
            yield cube

    def _made_by_threads(self, chosen: Iterator[Array], threads: int, shelf: _Shelf) -> Iterator[Any]:
        """Yield the cubes in order, `threads` tasks of them being made while one is used."""
        executor = ThreadPoolExecutor(threads, thread_name_prefix="orchestra-cubes")
        waiting: deque[Future[list[Any]]] = deque()
        tables, rows, columns = self.shape
        cube_bytes = tables * rows * columns * self._packed.itemsize
        together = min(_TASK_CUBES_MAX, max(1, _TASK_BYTES // cube_bytes))
        try:
            while task := list(islice(chosen, together)):
                waiting.append(executor.submit(self._make_all, task, shelf))
                if len(waiting) > threads * _AHEAD_PER_THREAD:
                    yield from _emptied(waiting.popleft().result())
            while waiting:
                yield from _emptied(waiting.popleft().result())
        finally:
            executor.shutdown(cancel_futures=True)

    def _make_all(self, chosen: list[Array], shelf: _Shelf) -> list[Any]:
        return [self._make(columns, shelf) for columns in chosen]

    def _make(self, columns: Array, shelf: _Shelf) -> Any:
        packed = self._packed.numpy()
        memory = shelf.take((self.columns, *packed.shape[1:]), packed.dtype)
        # "clip" writes straight into `out`; "raise" would go by a buffer. The indices are in range.
        packed.take(columns, axis=0, out=memory, mode="clip")
        cube = memory.transpose(1, 2, 0)
        return torch.from_numpy(cube) if self._out == "torch" else cube


class _Draws:
    """Which columns cubes have. A block of cubes has its own random numbers, and a run of blocks is drawn at a time:
    3 us a cube; a block at a time takes 9, a cube at a time 40."""

    BLOCK = 64
    # Shuffling a run of 256 cubes of 1,000 columns takes 1 MB, which a core's own caches hold.
    RUN_BLOCKS = 4
    RUN_COLUMNS_MAX = 4000

    def __init__(self, seed: int, epoch: int, count: int, wanted: int) -> None:
        self._seed = seed
        self._epoch = epoch
        self._count = count
        self._wanted = wanted
        self._run_size = self.BLOCK * (self.RUN_BLOCKS if count <= self.RUN_COLUMNS_MAX else 1)
        self._run = -1
        self._drawn = np.empty((0, 0), np.intp)

    def columns_of(self, index: int) -> Array:
        """Return the columns of cube `index`."""
        run, place = divmod(index, self._run_size)
        if run != self._run:
            self._drawn = self._draw(run)
            self._run = run
        columns: Array = self._drawn[place]
        return columns

    def _draw(self, run: int) -> Array:
        """Shuffle the first columns of a row for each cube (Fisher and Yates), all rows at once."""
        size = self._run_size
        blocks = size // self.BLOCK
        chance = np.hstack([self._chance(run * blocks + number) for number in range(blocks)])
        steps = np.arange(self._wanted)
        # A row of `order` is a column of the cubes' places: what a step reads and writes lies together.
        order = np.repeat(np.arange(self._count, dtype=np.int32)[:, None], size, axis=1).reshape(-1)
        cubes = np.arange(size)
        partners = ((chance * (self._count - steps)[:, None]).astype(np.intp) + steps[:, None]) * size + cubes
        for step in range(self._wanted):
            swapped = partners[step]
            first = order[step * size : (step + 1) * size]
            kept = order[swapped]
            order[swapped] = first
            first[:] = kept
        return np.ascontiguousarray(order.reshape(self._count, size)[: self._wanted].T, dtype=np.intp)

    def _chance(self, block: int) -> Array:
        # Philox is a function of key and counter: a block needs no draw of those before it.
        bits = np.random.Philox(key=self._seed, counter=[0, 0, block, self._epoch])
        return np.random.Generator(bits).random((self._wanted, self.BLOCK))


class _Shelf:
    """Memory that came back. A fresh cube of 8 MB costs 2,000 page faults, as much time as filling it."""

    # More than is made ahead at a time would only be kept.
    KEPT_MAX = 64

    def __init__(self) -> None:
        self._free: list[Array] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array that nobody else refers to; it comes back when nobody refers to it any more."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = _on_large_pages(shape, dtype)
        return np.asarray(_Lease(memory, self._free))


def _on_large_pages(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return memory for a cube; a large one begins with a page of 2 MiB, if the kernel has some: numpy asks for them
    above 4 MiB, and filling takes 5 % less time than on a thousand pages of 4 KiB."""
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes < _LARGE_PAGE_BYTES:
        return np.empty(shape, dtype)
    whole = np.empty(size_bytes + 2 * _LARGE_PAGE_BYTES, np.uint8)
    start = -whole.ctypes.data % _LARGE_PAGE_BYTES
    return whole[start : start + size_bytes].view(dtype).reshape(shape)


class _Lease:
    """Owner of what was lent: numpy and torch keep it alive as long as any view of the memory lives."""

    __slots__ = ("__array_interface__", "_free", "_memory")

    def __init__(self, memory: Array, free: list[Array]) -> None:
        self._memory = memory
        self._free = free
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        if len(self._free) < _Shelf.KEPT_MAX:
            self._free.append(self._memory)


def _emptied(cubes: list[Any]) -> Iterator[Any]:
    """Yield the cubes, each forgotten when it is given: its memory comes back as soon as the user has done with it."""
    cubes.reverse()
    while cubes:
        yield cubes.pop()


def _indices(begin: int, stop: int | None, step: int) -> Iterator[int]:
    index = begin
    while stop is None or index < stop:
        yield index
        index += step


def _pack(frames: Any, rows: int, dtype: Any, config: str | None) -> Array:
    """Return what cubes are made of, as (columns, tables, rows)."""
    if rows < 1:
        raise UsageError(f"rows: expected at least 1, got {rows}")
    if is_path(frames) and kind_of(str(frames)) == "npy":
        frames = read_array(str(frames), config)
    if isinstance(frames, (np.ndarray, torch.Tensor)):
        array = frames.numpy(force=True) if isinstance(frames, torch.Tensor) else frames
        if array.ndim != 3 or not len(array) or array.dtype.kind not in NUMBERS:
            got = f"{array.shape} of {array.dtype}"
            raise UsageError(f"frames: expected an array of numbers of shape (tables, rows, columns), got {got}")
        _check_rows(array.shape[1], rows, "every table")
        return np.ascontiguousarray(array[:, :rows, :].transpose(2, 0, 1), dtype)
    frames = [frames] if is_path(frames) else frames
    is_one_frame = hasattr(frames, "columns")  # a list of it would be its columns' names
    if is_one_frame or isinstance(frames, Mapping) or not isinstance(frames, Iterable):
        kind = type(frames).__name__
        raise UsageError(f"frames: expected an array of shape (tables, rows, columns) or a list of tables, got {kind}")
    tables = list(frames)
    if not tables:
        raise UsageError("frames: expected at least one table, got none")
    packed: Array | None = None
    for number, table in enumerate(tables):
        columns = _columns(table, rows, f"table {number}", config)
        if packed is None:
            packed = np.empty((len(columns), len(tables), rows), dtype or columns.dtype)
        if len(columns) != len(packed):
            raise UsageError(f"table {number} has {len(columns)} columns, table 0 has {len(packed)}")
        if dtype is None:  # whole numbers in one table and fractions in the next are fractions in all, as in np.stack
            packed = packed.astype(np.result_type(packed, columns), copy=False)
        packed[:, number] = columns
    assert packed is not None
    return packed


def _columns(table: Any, rows: int, name: str, config: str | None) -> Array:
    """Return the first rows of one table (a path, a data frame, an array) as (columns, rows)."""
    if is_path(table) and kind_of(str(table)) == "npy":
        table = read_array(str(table), config)
    if is_path(table):
        found = first_rows(str(table), rows, config)
        _check_rows(found.num_rows, rows, str(table))
        return np.stack([column_values(found, column) for column in found.column_names])
    values = np.asarray(table[:rows])
    if values.ndim != 2 or values.dtype.kind not in NUMBERS:
        raise UsageError(f"{name}: expected rows and columns of numbers, got shape {values.shape} of {values.dtype}")
    _check_rows(len(values), rows, name)
    return values.T


def _check_rows(found: int, rows: int, name: str) -> None:
    if found < rows:
        raise UsageError(f"rows: expected at most {found}, as many as {name} has, got {rows}")
