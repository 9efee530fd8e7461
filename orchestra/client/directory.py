"""A directory as faces see it: a published listing, plus the mount points inside it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from orchestra.metadata.records import Record, RecordEntry
from orchestra.namespace.paths import join
from orchestra.values import Entry, EntryKind


def entry_at(path: str, row: RecordEntry) -> Entry:
    """Return the entry for a row of a record, at `path`."""
    return Entry(path, row.kind, row.size_bytes, row.mtime_ns, row.version)


def directory_at(path: str) -> Entry:
    """Return the entry of a directory."""
    return Entry(path, EntryKind.DIRECTORY, 0, 0, "")


class NodeDirectory:
    """Entries of one directory: the rows of `record`, and mount points, which hide rows of the same name.

    Rows are read in place; a mount point is kept with the row number before which it stands.
    """

    __slots__ = ("_at", "_hidden", "_mounts", "_path", "_record")

    def __init__(self, path: str, record: Record | None, mount_names: tuple[str, ...]) -> None:
        self._path = path
        self._record = record
        self._mounts = sorted(name.encode("utf-8", "surrogateescape") for name in mount_names)
        rows = len(record) if record is not None else 0
        hidden = [self._row_of(name) for name in self._mounts]
        self._hidden = sorted(row for row in hidden if row is not None)
        # Positions of the mount points in the merged order; empty for almost every directory.
        merged = (
            sorted([*self._mounts, *(record.name(i) for i in range(rows) if i not in set(self._hidden))])
            if (self._mounts and record is not None)
            else list(self._mounts)
        )
        self._at = {bisect_left(merged, name): name for name in self._mounts}

    def __eq__(self, other: object) -> bool:
        """Whether both are the same listing: the same record, not only the same names."""
        if not isinstance(other, NodeDirectory):
            return NotImplemented
        return self._path == other._path and self._record is other._record and self._mounts == other._mounts

    def __hash__(self) -> int:
        return hash((self._path, id(self._record)))

    @property
    def hidden_count(self) -> int:
        """How many keys below the directory no path can show: "a//b", "..", a file that is a directory as well."""
        return self._record.hidden_count if self._record is not None else 0

    @property
    def hidden_example(self) -> str:
        """One of them, as it follows the directory's path; "" if there is none."""
        return self._record.hidden_example.decode("utf-8", "surrogateescape") if self._record is not None else ""

    def __len__(self) -> int:
        rows = len(self._record) if self._record is not None else 0
        return rows - len(self._hidden) + len(self._mounts)

    def __getitem__(self, index: int) -> Entry:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        if not self._mounts:
            assert self._record is not None, "a directory without mounts has a listing"
            return self._entry(self._record.row(index))
        name = self._at.get(index)
        if name is not None:
            return directory_at(join(self._path, name.decode("utf-8", "surrogateescape")))
        assert self._record is not None, "what is not a mount is a row"
        row = index - sum(at < index for at in self._at)
        for hidden in self._hidden:
            if hidden <= row:
                row += 1
        return self._entry(self._record.row(row))

    def __iter__(self) -> Iterator[Entry]:
        for index in range(len(self)):
            yield self[index]

    def names(self, start: int, stop: int) -> Sequence[tuple[bytes, bool, bytes]]:
        """See DirectoryView."""
        if not self._mounts and self._record is not None:
            return self._record.names(start, stop)
        entries = [self[index] for index in range(start, stop)]
        return [(_encoded(entry.name), entry.kind is EntryKind.DIRECTORY, _encoded(entry.version)) for entry in entries]

    def find(self, name: str) -> Entry | None:
        """See DirectoryView."""
        encoded = name.encode("utf-8", "surrogateescape")
        if encoded in self._mounts:
            return directory_at(join(self._path, name))
        row = self._record.find(encoded) if self._record is not None else None
        return self._entry(row) if row is not None else None

    def _entry(self, row: RecordEntry) -> Entry:
        return entry_at(join(self._path, row.name.decode("utf-8", "surrogateescape")), row)

    def _row_of(self, name: bytes) -> int | None:
        if self._record is None:
            return None
        return self._record.index_of(name)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
