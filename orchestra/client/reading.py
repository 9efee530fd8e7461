"""Handles as faces use them: a file object over one, byte ranges of many files, many waits at a time.

Owns: positions of open files, which ranges are read without waiting. Leaves to others: buffering (io.BufferedReader, in
the face), the bytes (the client's handles).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from orchestra.client.contract import Client, Handle
from orchestra.errors import OrchestraError

# Requests for missing data that one call of a method keeps in flight: hides a store's latency, and is far below the
# daemon's own limit for a store (fetch.requests_max), so that one caller cannot starve the others.
WAITS_AT_ONCE_MAX = 32
# Ranges read before the files they opened are closed: far from the usual limit of 1,024 open files.
RANGES_BATCH = 256

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RawFile(io.RawIOBase):
    """A position in a handle, which it owns."""

    mode = "rb"

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._size_bytes = handle.entry.size_bytes
        self._position = 0
        self.name = handle.entry.path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}
        if whence not in origins:
            raise ValueError(f"whence: expected 0, 1 or 2, got {whence!r}")
        position = origins[whence] + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        self._check_open()
        view = memoryview(buffer).cast("B")
        read_bytes = self._handle.readinto(self._position, view)
        self._position += read_bytes
        return read_bytes

    def readall(self) -> bytes:
        self._check_open()
        data = self._handle.read(self._position, max(0, self._size_bytes - self._position))
        self._position += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._handle.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed file {self.name}")


class RangeReader:
    """Reads ranges of files that it opens once each."""

    def __init__(self, client: Client, on_error: str) -> None:
        self._client = client
        self._on_error = on_error
        self._handles: dict[str, Handle] = {}

    def read(self, paths: list[str], starts: list[int | None], ends: list[int | None]) -> list[Any]:
        """Return the bytes (or the error) of each range, in order."""
        ranges = list(zip(paths, starts, ends, strict=True))
        results: list[Any] = []
        for first in range(0, len(ranges), RANGES_BATCH):
            results += self._read_batch(ranges[first : first + RANGES_BATCH])
            self.close()
        return results

    def _read_batch(self, ranges: list[tuple[str, int | None, int | None]]) -> list[Any]:
        results = [self._guarded(self._read_cached, one) for one in ranges]
        missing = [one for one, data in zip(ranges, results, strict=True) if data is None]
        fetched = iter(in_parallel(lambda one: self._guarded(self._read, one), missing))
        return [next(fetched) if data is None else data for data in results]

    def close(self) -> None:
        """Close every file."""
        while self._handles:
            self._handles.popitem()[1].close()

    def _guarded(self, read: Callable[[str, int | None, int | None], Any], one: tuple[Any, Any, Any]) -> Any:
        try:
            return read(*one)
        except OrchestraError as error:
            if self._on_error == "return":
                return error
            raise

    def _read_cached(self, path: str, start: int | None, end: int | None) -> bytes | None:
        handle = self._handles.get(path)
        if handle is None:
            entry = self._client.stat_cached(path)
            if entry is None:
                return None
            handle = self._handles[path] = self._client.open(path, entry=entry)
        first, stop = _bounds(handle, start, end)
        buffer = bytearray(stop - first)
        return None if handle.readinto_cached(first, buffer) is None else bytes(buffer)

    def _read(self, path: str, start: int | None, end: int | None) -> bytes:
        handle = self._handles.get(path)
        if handle is None:
            opened = self._client.open(path)
            handle = self._handles.setdefault(path, opened)
            if handle is not opened:
                opened.close()
        return read_slice(handle, start, end)


def _bounds(handle: Handle, start: int | None, end: int | None) -> tuple[int, int]:
    """Return the half-open range that the slice [start:end] of the object is."""
    first, stop, _ = slice(start, end).indices(handle.entry.size_bytes)
    return first, max(first, stop)


def read_slice(handle: Handle, start: int | None, end: int | None) -> bytes:
    """Return the bytes of the slice [start:end] of the object."""
    first, stop = _bounds(handle, start, end)
    return handle.read(first, stop - first)


def in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return the results in order; the first error is raised, and what has not begun then is left undone."""
    if len(items) <= 1:
        return [function(item) for item in items]
    executor = ThreadPoolExecutor(min(len(items), WAITS_AT_ONCE_MAX), thread_name_prefix="orchestra-read")
    try:
        return list(executor.map(function, items))
    finally:
        executor.shutdown(cancel_futures=True)
