"""The daemon's accounts on disk: what it holds, of which object, how large, when used. sqlite3, written in batches.

Covers: rows. Does not cover: truth. The files are the truth; losing this database costs a walk over the directory and
the order of use, never a byte. Rows follow files: written after the file, deleted before it is missed.

A database that cannot be used is replaced by an empty one, and one that cannot even be made by one in memory: then the
next daemon counts the files again. A full disk must not keep the daemon from starting, it is the one who can make room.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestra.blocks.layout import is_extent_name
from orchestra.blocks.rules import Origin

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_ORIGIN = ("store_id", "key")


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One extent or small object. `last_use` orders rows; it is a counter, not a time. `used_s` is when that was, in
    seconds since the boot, or 0 if it was in another boot. `origin` is None where nobody knows."""

    name: str
    size_bytes: int
    last_use: int
    used_s: int = 0
    origin: Origin | None = None


class IndexUnavailableError(Exception):
    """Rows could not be written (a full disk, a lock); they may be offered again. Never leaves the block store."""


class BlockIndex:
    """The rows of one cache directory; used from one thread at a time."""

    def __init__(self, path: Path, *, boot_id: bytes = bytes(16)) -> None:
        """`boot_id` says which boot's seconds `used_s` counts."""
        self._connection, self._rows, self._is_clean = _open(path, boot_id)

    def load(self) -> tuple[list[IndexRow], bool]:
        """Return the rows as they were at the start, oldest use first, and whether the last daemon stopped cleanly
        (then they are exact)."""
        return self._rows, self._is_clean

    def write(self, changed: Iterable[IndexRow], removed: Iterable[str]) -> None:
        """Store a batch in one transaction, whole or not at all. Raises IndexUnavailableError."""
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT OR REPLACE INTO extents(name, size_bytes, last_use, used_s, store_id, key) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (_values(row) for row in changed),
                )
                self._connection.executemany("DELETE FROM extents WHERE name = ?", ((name,) for name in removed))
        except sqlite3.Error as error:
            raise IndexUnavailableError(f"the index cannot be written: {error}") from error

    def mark_clean(self, clean: bool) -> None:
        """Say that the rows are exact (at a clean stop), or that they may lag behind (from the start on).

        Synced, unlike rows: a power loss must not bring back an older "clean". Raises IndexUnavailableError.
        """
        try:
            self._connection.execute("PRAGMA synchronous=FULL")
            with self._connection:
                self._connection.execute("INSERT OR REPLACE INTO state VALUES ('clean', ?)", (int(clean),))
            self._connection.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.Error as error:
            raise IndexUnavailableError(f"the index cannot be written: {error}") from error

    def close(self) -> None:
        """Close the database."""
        with contextlib.suppress(sqlite3.Error):  # the last checkpoint may not fit on a full disk: the log keeps it
            self._connection.close()


_Opened = tuple[sqlite3.Connection, list[IndexRow], bool]


def _values(row: IndexRow) -> tuple[str, int, int, int, bytes, bytes]:
    # Blobs: a key may hold what is no text.
    store_id, key = (row.origin.store_id, row.origin.key) if row.origin is not None else ("", "")
    texts = store_id.encode("utf-8", "surrogateescape"), key.encode("utf-8", "surrogateescape")
    return row.name, row.size_bytes, row.last_use, row.used_s, *texts


def _open(path: Path, boot_id: bytes) -> _Opened:
    """Open or make the database, read its rows and mark it as in use."""
    try:
        return _connect(str(path), boot_id)
    except sqlite3.Error as error:
        # Garbage, another schema, a torn file: it is counted anew from the files.
        log.warning("index %s is unusable (%s); rebuilding it from the cached files", path, error)
    try:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).unlink()
        return _connect(str(path), boot_id)
    except (sqlite3.Error, OSError) as error:
        log.error("no index can be kept at %s (%s): the next start counts the cached files again", path, error)
    return _connect(":memory:", boot_id)


def _connect(path: str, boot_id: bytes) -> _Opened:
    connection = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        _prepare(connection)
        _forget_other_boots(connection, boot_id)
        rows, is_clean = _read(connection)
        with connection:
            connection.execute("INSERT OR REPLACE INTO state VALUES ('clean', 0)")
        connection.execute("PRAGMA synchronous=NORMAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection, rows, is_clean


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # until the mark is on disk
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found == SCHEMA_VERSION:
        return
    if found not in (0, 1):
        raise sqlite3.DatabaseError(f"schema {found}, this orchestra reads {SCHEMA_VERSION}")
    with connection:
        connection.execute("BEGIN")
        if not found:
            connection.execute(
                "CREATE TABLE extents"
                "(name TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, last_use INTEGER NOT NULL) STRICT, WITHOUT ROWID"
            )
            connection.execute("CREATE TABLE state(key TEXT PRIMARY KEY, value INTEGER) STRICT, WITHOUT ROWID")
        for column in ("used_s INTEGER NOT NULL DEFAULT 0", *(f"{name} BLOB NOT NULL DEFAULT x''" for name in _ORIGIN)):
            connection.execute(f"ALTER TABLE extents ADD COLUMN {column}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _forget_other_boots(connection: sqlite3.Connection, boot_id: bytes) -> None:
    """The seconds of another boot say nothing in this one."""
    boot = int.from_bytes(boot_id[:7])  # as much as an integer of sqlite's holds
    if connection.execute("SELECT value FROM state WHERE key = 'boot'").fetchone() != (boot,):
        with connection:
            connection.execute("UPDATE extents SET used_s = 0")
            connection.execute("INSERT OR REPLACE INTO state VALUES ('boot', ?)", (boot,))


def _read(connection: sqlite3.Connection) -> tuple[list[IndexRow], bool]:
    rows = []
    query = "SELECT name, size_bytes, last_use, used_s, store_id, key FROM extents ORDER BY last_use"
    for name, size_bytes, last_use, used_s, *texts in connection.execute(query):
        if not is_extent_name(name) or size_bytes < 0:
            raise sqlite3.DatabaseError(f"a row that was never written: {name!r}")
        store_id, key = (text.decode("utf-8", "surrogateescape") for text in texts)
        rows.append(IndexRow(name, size_bytes, last_use, used_s, Origin(store_id, key) if store_id else None))
    clean = connection.execute("SELECT value FROM state WHERE key = 'clean'").fetchone()
    return rows, clean == (1,)
