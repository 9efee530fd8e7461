"""TensorBatches: batches of a table by slices, or by one gather for many of them; never row by row.

Owns: the order of rows, cutting them into batches, and the choice between memory and stream. Leaves to others: reading
files (tables), what is larger than memory (streamed), copies to a GPU (device).

`DataLoader(TensorDataset(...))` takes rows one by one and joins them again: 7 us a row. A slice of 1,024 rows takes
5 us in all, and one gather for 16 batches is quicker than 16 gathers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from orchestra.errors import UsageError
from orchestra.torch.device import prefetch_to_device
from orchestra.torch.shares import Share
from orchestra.torch.streamed import RowStream
from orchestra.torch.tables import check_columns, is_path, kind_of, read_array, read_table, to_matrix

Source = torch.Tensor | np.ndarray[Any, Any] | str | os.PathLike[str]

# Rows gathered in one go: 16 batches of 1,024 rows of 28 floats are 1.8 MB, which a core's cache still holds when they
# are used. More is no faster, and keeps more memory for as long as one of the batches is used.
_GATHER_BYTES = 2 << 20
_NUMPY_TYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.complex64, torch.complex128),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
}
# torch.randperm draws 32 bits for each row up to 2^32 / 20 rows, and 64 above.
_NARROW_DRAWS_MAX = 200_000_000
_INT32_MAX = 2**31 - 1


class TensorBatches:
    """Batches of tensors of one length, in the place of `DataLoader(TensorDataset(*tensors), ...)`.

    Sources are tensors, numpy arrays (also memory-mapped), npy files (mapped where they lie on this machine), or
    tables: the path of a Parquet, Arrow or CSV file, or a list of such paths that are one table. A table gives the
    matrix of its `features` (all columns but the target if None; of several files those of the first, which the others
    need in any order), as `dtype`, and behind it the `target` column if one is named. Paths that begin with
    `orchestra:` lie in the namespace.

    Every iteration is an epoch and yields lists of tensors. With the same generator, or torch's own seed, they are the
    same batches as DataLoader's, also in later epochs. Unshuffled batches are views: writing into one changes the
    table. `device`: batches are copied there ahead of their use, beside what computes.

    `buffer_rows`: tables are not loaded but read by row groups, about so many rows at a time. Shuffling then takes row
    groups in random order and rows in random order from the buffer: every row once an epoch, and rows that come
    together are from groups drawn at random. The order is then orchestra's own, not DataLoader's.

    `rank`, `world_size`: in training on several processes each takes its share of every epoch, as with
    DistributedSampler: as many rows and batches as every other rank (rows that do not divide come twice, or are left
    out with `drop_last`), and together all of them. Shuffling then needs a generator, seeded alike on every rank;
    epochs need no `set_epoch`. `batch_size` is a rank's. With `buffer_rows` a rank reads its share alone.
    """

    def __init__(
        self,
        *sources: Source | Sequence[str | os.PathLike[str]],
        batch_size: int = 1,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        features: Sequence[str] | None = None,
        target: str | None = None,
        dtype: torch.dtype = torch.float32,
        buffer_rows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        config: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size: expected at least 1, got {batch_size}")
        if not sources:
            raise UsageError("expected at least one tensor, array or path")
        self._share = Share(rank, world_size, drop_last)
        if shuffle and generator is None and not self._share.is_whole:
            raise UsageError("shuffle on several ranks: give each a generator= seeded alike, else orders differ")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.drop_last = drop_last
        self.device = None if device is None else torch.device(device)
        columns = _Columns(features, target, dtype, config)
        self._given = 0  # batches of the epoch under way
        self._passed_over = 0  # of the next one, which goes on where a loaded state was taken
        self._began: torch.Tensor | None = None  # the generator's state as the epoch under way began
        self._resumed: torch.Tensor | None = None  # and as the one to be resumed did
        self._rows: _Held | RowStream
        if buffer_rows is None:
            self._rows = _Held(_load(sources, columns))
        else:
            self._rows = _stream(sources, columns, buffer_rows)

    def __len__(self) -> int:
        return -(-self._share.given_count(self.row_count, self.batch_size) // self.batch_size)

    @property
    def row_count(self) -> int:
        """Rows in an epoch of all ranks, those that `drop_last` drops included."""
        return self._rows.row_count

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What batches are cut from. Raises UsageError if it is streamed."""
        if isinstance(self._rows, RowStream):
            raise UsageError("a table that is read with buffer_rows is not in memory")
        return self._rows.tensors

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        if self._resumed is not None and self.generator is not None:
            self.generator.set_state(self._resumed)
        first, self._passed_over, self._resumed = self._passed_over, 0, None
        self._began = None if self.generator is None else self.generator.get_state()
        batches = self._batches(first)
        self._given = first
        for batch in batches if self.device is None else prefetch_to_device(batches, self.device):
            self._given += 1
            yield batch
        self._given, self._began = 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return where this rank is in its epoch: how many batches were given, and the generator as the epoch began.

        Raises UsageError if they are shuffled without a generator: then nobody can draw that order again.
        """
        if self.shuffle and self.generator is None:
            raise UsageError("state of shuffled batches: give a generator=, which can draw an order again")
        began = self._resumed if self._resumed is not None else self._began
        if began is None and self.generator is not None:
            began = self.generator.get_state()
        return {**self._identity(), "batches": self._given, "generator": began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration give the rest of that epoch, batch for batch; epochs after it are whole again.

        What is passed over is not gathered; with `buffer_rows` it is read. Raises UsageError unless the state was taken
        of as many rows, in batches as large, on the same rank of as many.
        """
        mine = self._identity()
        for name, value in mine.items():
            if state.get(name) != value:
                raise UsageError(f"the state was taken with {name} {state.get(name)!r}, here it is {value!r}")
        self._given = self._passed_over = int(state["batches"])
        self._resumed = state["generator"]

    def _identity(self) -> dict[str, Any]:
        share = self._share
        return {
            "rows": self.row_count,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "rank": share.rank,
            "world_size": share.world_size,
        }

    def _batches(self, first: int) -> Iterator[list[torch.Tensor]]:
        # DataLoader draws a number for its workers before anything else; drawn here too, so that what follows is alike.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        yield from self._rows.batches(self.batch_size, self.shuffle, self.generator, self._share, first)


class _Held:
    """Tensors in memory (or mapped), of one length."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
        if len(lengths) != 1 or any(not tensor.ndim for tensor in tensors):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UsageError(f"tensors must have one number of rows; their shapes are {shapes}")
        self.tensors = tuple(tensors)
        self.row_count = lengths.pop()

    def batches(
        self, size: int, shuffle: bool, generator: torch.Generator | None, share: Share, first: int
    ) -> Iterator[list[torch.Tensor]]:
        """Yield the batches of an epoch of that share, from batch number `first` on."""
        begin = first * size
        stop = share.given_count(self.row_count, size)
        if not shuffle and share.is_whole:
            yield from _cut([tensor[begin:stop] for tensor in self.tensors], size)
            return
        order = permutation(self.row_count, generator) if shuffle else torch.arange(self.row_count)
        if not share.is_whole:
            order = share.taken_from(order)
        row_bytes = sum(tensor[:1].nbytes for tensor in self.tensors)
        step = size * max(1, _GATHER_BYTES // max(1, row_bytes * size))
        for start in range(begin, stop, step):
            chosen = order[start : min(start + step, stop)]
            yield from _cut([_gathered(tensor, chosen) for tensor in self.tensors], size)
        if shuffle:
            finish_permutation(self.row_count, generator)


def _gathered(tensor: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return those rows of the tensor."""
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype in _NUMPY_TYPES and not tensor.is_conj():
        # One thread, row by row with memcpy: as quick as torch's two, and on a machine that is busy with other things
        # (a model, workers) three times as quick, where torch's threads wait for one another.
        return torch.from_numpy(np.take(tensor.detach().numpy(), chosen.numpy(), axis=0))
    return tensor.index_select(0, chosen.to(tensor.device))


def _cut(tensors: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Yield the rows in batches; the last may be shorter."""
    if len(tensors[0]):
        yield from map(list, zip(*(torch.split(tensor, size) for tensor in tensors), strict=True))


def permutation(count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Return the order in which torch's RandomSampler would go through `count` rows now."""
    if generator is None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator()
        generator.manual_seed(seed)
    # The same numbers in half the memory, which takes a quarter off drawing and gathering.
    return torch.randperm(count, generator=generator, dtype=torch.int32 if count <= _INT32_MAX else torch.int64)


def finish_permutation(count: int, generator: torch.Generator | None) -> None:
    """Leave the caller's generator as RandomSampler leaves it: it draws one more permutation and throws it away."""
    if generator is None or count < 2:
        return
    if count > _NARROW_DRAWS_MAX:
        torch.randperm(count, generator=generator)
    else:
        # The same number of draws of 32 bits without moving anything: 5 ns a row instead of 40.
        torch.empty(count - 1, dtype=torch.uint8).random_(generator=generator)


class _Columns:
    """What a table's columns become."""

    def __init__(
        self, features: Sequence[str] | None, target: str | None, dtype: torch.dtype, config: str | None
    ) -> None:
        if dtype not in _NUMPY_TYPES:
            raise UsageError(f"dtype: expected a torch type that numpy has, such as torch.float32, got {dtype}")
        self.features = features
        self.target = target
        self.dtype = dtype
        self.config = config

    def needed(self) -> list[str] | None:
        """Return the columns to be read, None for all."""
        if self.features is None:
            return None
        return [*self.features, *([] if self.target is None else [self.target])]

    def among(self, found: Sequence[str], path: str) -> _Columns:
        """Return the same with every feature named, going by the columns of that file. Raises UsageError."""
        if self.features is not None:
            return self
        check_columns(found, [] if self.target is None else [self.target], path)
        return _Columns([name for name in found if name != self.target], self.target, self.dtype, self.config)

    def tensors(self, table: Any) -> list[torch.Tensor]:
        """Return the matrix of features, and the target behind it."""
        dtype: Any = torch.empty(0, dtype=self.dtype).numpy().dtype
        features = self.among(table.column_names, "the table").features or ()
        found = [torch.from_numpy(to_matrix(table, features, dtype))]
        if self.target is not None:
            found.append(torch.from_numpy(to_matrix(table, [self.target], dtype)[:, 0]))
        return found


def _load(sources: Sequence[Any], columns: _Columns) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for source in sources:
        if isinstance(source, torch.Tensor):
            tensors.append(source)
        elif isinstance(source, np.ndarray):
            tensors.append(torch.from_numpy(source))
        elif is_path(source) and kind_of(str(source)) == "npy":
            tensors.append(torch.from_numpy(read_array(str(source), columns.config)))
        else:
            tensors += _load_table(_paths(source), columns)
    return tensors


def _load_table(paths: Sequence[str], columns: _Columns) -> list[torch.Tensor]:
    parts = []
    for path in paths:
        table = read_table(path, columns.needed(), columns.config)
        columns = columns.among(table.column_names, path)
        parts.append(columns.tensors(table))
    return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]


def _stream(sources: Sequence[Any], columns: _Columns, buffer_rows: int) -> RowStream:
    if len(sources) != 1:
        raise UsageError("buffer_rows: expected one table (a path, or a list of paths), not several sources")
    paths = _paths(sources[0])
    stream = RowStream(paths, columns.needed(), columns.tensors, buffer_rows=buffer_rows, config=columns.config)
    columns.among(stream.columns, paths[0])  # now, and not with the first batch
    return stream


def _paths(source: Any) -> list[str]:
    """Return the files of one table."""
    if is_path(source):
        return [str(source)]
    if isinstance(source, Sequence) and source and all(is_path(one) for one in source):
        return [str(one) for one in source]
    raise UsageError(f"expected a tensor, a numpy array, a path or a list of paths, got {type(source).__name__}")
