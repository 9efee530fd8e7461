"""Tables and arrays out of files: Parquet, Arrow, CSV and npy, in the namespace or on this machine.

Owns: which reader a file's name asks for, columns to matrices, mapping what is on this machine instead of copying it.
Leaves to others: the bytes (client), batches and cubes (their modules). pyarrow is imported when a table is first read.
"""

from __future__ import annotations

import importlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from orchestra.client.locations import namespace_path, open_binary
from orchestra.client.shared import shared_client
from orchestra.errors import UsageError

_ARROW = (".arrow", ".feather", ".ipc")
_CSV = (".csv", ".csv.gz", ".csv.bz2")
_KINDS = {".parquet": "parquet", ".npy": "npy", **dict.fromkeys(_ARROW, "arrow"), **dict.fromkeys(_CSV, "csv")}
# numpy's kinds of numbers: booleans, whole numbers with and without a sign, fractions, complex ones.
NUMBERS = "biufc"
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2"}


def kind_of(path: str) -> str:
    """Return "parquet", "arrow", "csv" or "npy". Raises UsageError for any other name."""
    for ending, kind in _KINDS.items():
        if path.lower().endswith(ending):
            return kind
    raise UsageError(f"{path}: expected a file that ends in one of {', '.join(_KINDS)}")


def read_array(path: str, config: str | None = None) -> np.ndarray[Any, Any]:
    """Return what an npy file holds. What lies whole on this machine is mapped, private to the caller: writing into the
    array changes no file. Anything else is read. Raises UsageError for a file that is none, or holds no numbers."""
    inside = namespace_path(path)
    with open_binary(path, config) as file:
        try:
            version = np.lib.format.read_magic(file)
            is_first = version == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read_header(file)
            if dtype.hasobject:
                raise UsageError(f"{path}: holds Python objects, which are never loaded from a file")
            whole = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if inside is None else _map_object(inside, config)
            )
            array = np.frombuffer(whole, dtype, count=int(np.prod(shape)), offset=file.tell())
        except ValueError as error:
            raise UsageError(f"{path} cannot be read as npy: {error}") from error
    return array.reshape(shape, order="F" if is_fortran else "C")


def _map_object(path: str, config: str | None) -> mmap.mmap | bytearray:
    """Return an object's bytes: mapped from the cache directory if one file there holds them all, else read."""
    handle = shared_client(config).open(path)
    try:
        fd = handle.backing_fd()
        if fd is None:
            data = bytearray(handle.entry.size_bytes)
            handle.readinto(0, data)
            return data
        return mmap.mmap(fd, handle.entry.size_bytes, access=mmap.ACCESS_COPY)
    finally:
        handle.close()


def read_table(path: str, columns: list[str] | None = None, config: str | None = None) -> Any:
    """Return a table (pyarrow.Table) of those columns, all if None."""
    pieces = list(iterate_table(path, columns, config))
    return arrow().concat_tables(pieces) if len(pieces) != 1 else pieces[0]


def iterate_table(path: str, columns: list[str] | None = None, config: str | None = None) -> Iterator[Any]:
    """Yield a table in the pieces it is stored in (row groups, record batches), as tables, at least one."""
    kind = kind_of(path)
    if kind == "npy":
        raise UsageError(f"{path}: expected a table (Parquet, Arrow or CSV), this is an array")
    with open_binary(path, config) as file, readable(path):
        if kind == "parquet":
            parquet = open_parquet(file, path, columns)
            for index in range(parquet.num_row_groups):
                yield parquet.read_row_group(index, columns=columns)
            if not parquet.num_row_groups:
                yield parquet.read(columns=columns)
        elif kind == "arrow":
            reader = arrow("ipc").open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            yield from _as_tables(batches, reader.schema, columns, path)
        else:
            codec = _COMPRESSED.get(os.path.splitext(path.lower())[1])
            reader = arrow("csv").open_csv(arrow().CompressedInputStream(file, codec) if codec else file)
            yield from _as_tables(iter(reader), reader.schema, columns, path)


def open_parquet(file: Any, path: str, columns: list[str] | None) -> Any:
    """Return the open file as pyarrow's ParquetFile. Raises UsageError if it has not all the columns."""
    parquet = arrow("parquet").ParquetFile(file, pre_buffer=True)
    check_columns(parquet.schema_arrow.names, columns, path)
    return parquet


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Say in one line what pyarrow could not read."""
    try:
        yield
    except arrow().ArrowInvalid as error:
        raise UsageError(f"{path} cannot be read as {kind_of(path)}: {error}") from error


def _as_tables(batches: Iterator[Any], schema: Any, columns: Sequence[str] | None, path: str) -> Iterator[Any]:
    check_columns(schema.names, columns, path)
    is_empty = True
    for batch in batches:
        is_empty = False
        table = arrow().Table.from_batches([batch], schema)
        yield table if columns is None else table.select(columns)
    if is_empty:
        table = schema.empty_table()
        yield table if columns is None else table.select(columns)


def check_columns(found: Sequence[str], wanted: Sequence[str] | None, path: str) -> None:
    """Raise UsageError if a column that is wanted is not there."""
    for name in wanted or ():
        if name not in found:
            raise UsageError(f"{path}: no column {name!r}; there are {', '.join(found)}")


def first_rows(path: str, count: int, config: str | None = None) -> Any:
    """Return the first `count` rows of a table (fewer if it has fewer), reading no further than needed."""
    pieces: list[Any] = []
    found = 0
    for piece in iterate_table(path, None, config):
        pieces.append(piece)
        found += piece.num_rows
        if found >= count:
            break
    return arrow().concat_tables(pieces).slice(0, count)


def column_values(table: Any, name: str) -> np.ndarray[Any, Any]:
    """Return one column as numbers; a missing value is NaN. Raises UsageError if they are no numbers."""
    values: np.ndarray[Any, Any] = table[name].to_numpy()
    if values.dtype.kind not in NUMBERS:  # a time would become the number of its microseconds, rounded
        raise UsageError(f"column {name!r} holds {table[name].type}, not numbers")
    return values


def to_matrix(table: Any, columns: Sequence[str], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Return the columns side by side, one row of memory a row of the table. Raises UsageError for a column that is not
    numbers, or has missing values (NaN) where `dtype` has none."""
    matrix = np.empty((table.num_rows, len(columns)), dtype)
    for index, name in enumerate(columns):
        values = column_values(table, name)
        if values.dtype.kind == "f" and matrix.dtype.kind in "biu" and np.isnan(values).any():
            raise UsageError(f"column {name!r} has missing values, which {matrix.dtype} cannot hold: take a float type")
        matrix[:, index] = values
    return matrix


def arrow(module: str = "") -> Any:
    """Return pyarrow, or a module of it. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ModuleNotFoundError as error:
        raise UsageError("reading tables needs pyarrow: pip install pyarrow") from error


def is_path(source: object) -> bool:
    """Whether a source is the path of a file rather than data."""
    return isinstance(source, (str, Path))
