"""A real client of a local folder: the client contract without a daemon, for tests of the FUSE face.

What lies in the folder is the store. `uncached` paths answer None to every `*_cached` call, so that the slow path runs;
`hold` makes the slow calls wait until `release`, and `wait_held` waits until so many of them do: tests prove with these
that nothing else is held up, without looking at a clock.
"""

from __future__ import annotations

import bisect
import builtins
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestra.errors import IsADirectoryPathError, NotADirectoryPathError, NotFoundError, StaleObjectError
from orchestra.values import Entry, EntryKind, weak_version


class FolderView:
    """Entries sorted by name; `hidden_*` as a node's view has them."""

    hidden_count = 0
    hidden_example = ""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.name)
        self._names = [entry.name for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._entries[index]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def names(self, start: int, stop: int) -> builtins.list[tuple[bytes, bool, bytes]]:
        return [
            (os.fsencode(entry.name), entry.is_directory, os.fsencode(entry.version))
            for entry in self._entries[start:stop]
        ]

    def find(self, name: str) -> Entry | None:
        index = bisect.bisect_left(self._names, name)
        return self._entries[index] if index < len(self._names) and self._names[index] == name else None


class FolderHandle:
    """One version of one file; a rewritten file is stale."""

    def __init__(self, client: FolderClient, entry: Entry) -> None:
        self._client = client
        self._entry = entry
        self._file = os.open(client.local(entry.path), os.O_RDONLY)
        self._closed = False

    @property
    def entry(self) -> Entry:
        return self._entry

    def _check(self) -> None:
        try:
            current = self._client.look(self._entry.path)
        except NotFoundError:
            current = None
        if current is None or current.version != self._entry.version:
            raise StaleObjectError(f"{self._entry.path} changed after it was opened; open it again")

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        self._client.pass_gate(self._entry.path)
        self._check()
        return os.preadv(self._file, [buffer], offset)

    def readinto_cached(self, offset: int, buffer: bytearray | memoryview) -> int | None:
        assert not self._closed, "a closed handle was read"
        if self._client.is_uncached(self._entry.path):
            return None
        self._check()
        return os.preadv(self._file, [buffer], offset)

    def readinto_fetched(self, offset: int, buffer: bytearray | memoryview) -> int | None:
        return self.readinto_cached(offset, buffer)

    def read_here(self, *, fetched: bool = False) -> bytes | None:
        buffer = bytearray(self._entry.size_bytes)
        return bytes(buffer) if self.readinto_cached(0, buffer) is not None else None

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file, length, offset)

    def backing_fd(self) -> int | None:
        return None if self._client.is_uncached(self._entry.path) else self._file

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._file)
            self._client.count_handle(-1)


class FolderClient:
    """The folder as a namespace; `extra` entries exist in listings only (names that no folder can hold)."""

    def __init__(self, folder: str | Path, *, freshness_s: float = 60.0) -> None:
        self._folder = str(folder)
        self._freshness_s = freshness_s
        self._views: dict[str, tuple[int, FolderView]] = {}
        self._uncached: set[str] = set()
        self._held: set[str] = set()
        self._held_count = 0
        self._changed = threading.Condition()
        self.extra: list[Entry] = []
        self.handles_open = 0
        self.handles_made = 0  # since the start
        self.defects: set[str] = set()  # paths that raise what no client may raise

    # -- switches -------------------------------------------------------------------------------------------------

    def uncache(self, path: str) -> None:
        """Answer None to cached calls for this path, or for everything below it if it ends in a slash."""
        self._uncached.add(path)

    def cache(self, path: str) -> None:
        self._uncached.discard(path)

    def hold(self, path: str) -> None:
        """Make slow calls for this path (or below, with a slash) wait for `release`."""
        with self._changed:
            self._held.add(path)

    def release(self, path: str) -> None:
        with self._changed:
            self._held.discard(path)
            self._changed.notify_all()

    def wait_held(self, count: int) -> None:
        """Wait until so many slow calls are waiting."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._held_count >= count, timeout=60), "the calls did not come"

    def count_handle(self, change: int) -> None:
        with self._changed:
            self.handles_open += change
            self.handles_made += change > 0
            self._changed.notify_all()

    def wait_no_handles(self) -> None:
        """Wait until every handle is closed."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.handles_open == 0, timeout=60), "a handle stays open"

    def is_uncached(self, path: str) -> bool:
        return _covers(self._uncached, path)

    def pass_gate(self, path: str) -> None:
        with self._changed:
            self._held_count += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not _covers(self._held, path))
            self._held_count -= 1

    # -- the contract ---------------------------------------------------------------------------------------------

    def local(self, path: str) -> str:
        return self._folder + path

    def look(self, path: str) -> Entry:
        if path in self.defects:
            raise ZeroDivisionError("a defect on purpose")
        try:
            found = os.stat(self.local(path))
        except FileNotFoundError:
            raise NotFoundError(f"no such file: {path}") from None
        except NotADirectoryError:
            raise NotADirectoryPathError(f"not a directory on the way to {path}") from None
        if os.path.isdir(self.local(path)):
            return Entry(path, EntryKind.DIRECTORY, 0, found.st_mtime_ns, "")
        version = weak_version(found.st_size, found.st_mtime_ns)
        return Entry(path, EntryKind.FILE, found.st_size, found.st_mtime_ns, version)

    def stat(self, path: str, *, refresh: bool = False) -> Entry:
        self.pass_gate(path)
        return self.look(path)

    def stat_cached(self, path: str) -> Entry | None:
        return None if self.is_uncached(path) else self.look(path)

    def list(self, path: str, *, refresh: bool = False) -> FolderView:
        self.pass_gate(path)
        return self._list(path)

    def list_cached(self, path: str) -> FolderView | None:
        return None if self.is_uncached(path) else self._list(path)

    def _list(self, path: str) -> FolderView:
        entry = self.look(path)
        if not entry.is_directory:
            raise NotADirectoryPathError(f"{path} is a file")
        held = self._views.get(path)
        if held is not None and held[0] == entry.mtime_ns:
            return held[1]
        prefix = path.rstrip("/")
        view = FolderView([self.look(f"{prefix}/{name}") for name in os.listdir(self.local(path))] + self.extra)
        self._views[path] = (entry.mtime_ns, view)
        return view

    def stat_timed(self, path: str) -> tuple[Entry, float] | None:
        entry = self.stat_cached(path)
        return None if entry is None else (entry, self._freshness_s)

    def freshness_s(self, path: str) -> float:
        return self._freshness_s

    def open(self, path: str, *, entry: Entry | None = None) -> FolderHandle:
        entry = entry or self.look(path)
        if entry.is_directory:
            raise IsADirectoryPathError(f"{path} is a directory")
        try:
            handle = FolderHandle(self, entry)
        except FileNotFoundError:
            raise StaleObjectError(f"{path} is gone") from None
        self.count_handle(1)
        return handle

    def read_small_into(self, entry: Entry, buffer: memoryview) -> int | None:
        if self.is_uncached(entry.path) or not 0 < entry.size_bytes < len(buffer):
            return None
        try:
            with open(self.local(entry.path), "rb", buffering=0) as file:  # noqa: PTH123 - as `local` gives it
                is_same = self.look(entry.path).version == entry.version
                return file.readinto(buffer[: entry.size_bytes]) if is_same else None
        except (NotFoundError, FileNotFoundError):
            return None

    def read_file(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        handle = self.open(path)
        try:
            return handle.read(start, (handle.entry.size_bytes if stop is None else stop) - start)
        finally:
            handle.close()

    def read_many(self, paths: Sequence[str], *, at_once: int = 1) -> builtins.list[bytes]:
        return [self.read_file(path) for path in paths]

    def miss_stream(self) -> None:
        return None

    def changes(self, position: int | None = None) -> None:
        return None

    @property
    def messages_sent(self) -> int:
        return 0

    def close(self) -> None:
        return None


def _covers(paths: set[str], path: str) -> bool:
    return path in paths or any(path.startswith(prefix) for prefix in paths if prefix.endswith("/"))
