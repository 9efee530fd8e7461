"""A table larger than memory: row groups read ahead by a thread, shuffled within a bounded buffer.

Owns: the order of row groups, the buffer, reading one buffer ahead. Leaves to others: the files (tables), what columns
become (batches).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from orchestra.client.locations import open_binary
from orchestra.errors import UsageError
from orchestra.torch.shares import Share
from orchestra.torch.tables import arrow, kind_of, open_parquet, readable


@dataclass(frozen=True, slots=True)
class _Group:
    """One row group of one Parquet file."""

    path: str
    index: int
    row_count: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows [start, stop) of a row group."""

    group: _Group
    start: int
    stop: int


class RowStream:
    """The rows of Parquet files, group by group. About `buffer_rows` rows are held, twice while the next are read."""

    def __init__(
        self,
        paths: Sequence[str],
        columns: Sequence[str] | None,
        convert: Callable[[Any], list[torch.Tensor]],
        *,
        buffer_rows: int,
        config: str | None,
    ) -> None:
        if buffer_rows < 1:
            raise UsageError(f"buffer_rows: expected at least 1, got {buffer_rows}")
        for path in paths:
            if kind_of(path) != "parquet":
                raise UsageError(f"{path}: only Parquet files can be read with buffer_rows, by their row groups")
        self._columns = None if columns is None else list(columns)
        self._convert = convert
        self._buffer_rows = buffer_rows
        self._config = config
        self._groups = [group for path in paths for group in self._groups_of(path)]
        self.row_count = sum(group.row_count for group in self._groups)

    @property
    def columns(self) -> Sequence[str]:
        """What is read of every file."""
        return self._columns or ()

    def batches(
        self, size: int, shuffle: bool, generator: torch.Generator | None, share: Share, first: int
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the batches of an epoch of that share, from batch number `first` on; every one but the last has `size`
        rows. Those before are read all the same."""
        return itertools.islice(self._all_batches(size, shuffle, generator, share), first, None)

    def _all_batches(
        self, size: int, shuffle: bool, generator: torch.Generator | None, share: Share
    ) -> Iterator[list[torch.Tensor]]:
        rest: list[torch.Tensor] | None = None
        left = share.given_count(self.row_count, size)
        for buffer in self._buffers(shuffle, generator, share):
            held = buffer if rest is None else [torch.cat(pair) for pair in zip(rest, buffer, strict=True)]
            whole = min(len(held[0]) // size * size, left)
            for start in range(0, whole, size):
                yield [tensor[start : min(start + size, whole)] for tensor in held]
            left -= whole
            # A copy, so that less than a batch does not keep a buffer alive.
            rest = [tensor[whole:].clone() for tensor in held]
        if rest is not None and left:
            yield [tensor[:left] for tensor in rest]

    def _buffers(self, shuffle: bool, generator: torch.Generator | None, share: Share) -> Iterator[list[torch.Tensor]]:
        """Yield buffers of rows, each being read while the one before it is used."""
        order = list(range(len(self._groups)))
        if shuffle:
            order = torch.randperm(len(order), generator=generator).tolist()
            if not share.is_whole:
                # Ranks' buffers differ in length, so drawing from the common generator would make it differ by rank.
                seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())
                generator = torch.Generator().manual_seed(seed + share.rank)
        pieces = _pieces([self._groups[number] for number in order], *share.span(self.row_count))
        runs = _runs(pieces, self._buffer_rows)
        with ThreadPoolExecutor(1, thread_name_prefix="orchestra-rows") as executor:
            ahead = executor.submit(self._read, runs[0]) if runs else None
            for number in range(len(runs)):
                assert ahead is not None
                buffer = ahead.result()
                if number + 1 < len(runs):
                    ahead = executor.submit(self._read, runs[number + 1])
                if shuffle:
                    chosen = torch.randperm(len(buffer[0]), generator=generator)
                    buffer = [tensor.index_select(0, chosen) for tensor in buffer]
                yield buffer

    def _read(self, pieces: Sequence[_Piece]) -> list[torch.Tensor]:
        tables = []
        for piece in pieces:
            group = piece.group
            with open_binary(group.path, self._config) as file, readable(group.path):
                parquet = open_parquet(file, group.path, self._columns)
                table = parquet.read_row_group(group.index, columns=self._columns).select(self._columns)
                tables.append(table.slice(piece.start, piece.stop - piece.start))
        # A column may be of whole numbers in one file and of fractions in the next.
        return self._convert(arrow().concat_tables(tables, promote_options="permissive"))

    def _groups_of(self, path: str) -> Iterator[_Group]:
        with open_binary(path, self._config) as file, readable(path):
            parquet = open_parquet(file, path, self._columns)
            if self._columns is None:
                self._columns = parquet.schema_arrow.names  # the other files need them as well
            metadata = parquet.metadata
            for index in range(metadata.num_row_groups):
                yield _Group(path, index, metadata.row_group(index).num_rows)


def _pieces(groups: Sequence[_Group], start: int, stop: int) -> list[_Piece]:
    """Return the rows [start, stop) of the groups one after the other, which begin anew where they end."""
    pieces = []
    at = 0
    for group in itertools.cycle(groups):
        if at >= stop:
            break
        first, last = max(start - at, 0), min(stop - at, group.row_count)
        if first < last:
            pieces.append(_Piece(group, first, last))
        at += group.row_count
    return pieces


def _runs(pieces: Sequence[_Piece], row_count: int) -> list[list[_Piece]]:
    """Return the pieces in runs of at most `row_count` rows; one that is larger is a run of its own."""
    runs: list[list[_Piece]] = []
    filled = 0
    for piece in pieces:
        rows = piece.stop - piece.start
        if not runs or filled + rows > row_count:
            runs.append([])
            filled = 0
        runs[-1].append(piece)
        filled += rows
    return runs
