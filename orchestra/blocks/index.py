"""The daemon's accounts on disk: which extents it holds, how large, when last used. sqlite3, written in batches.

Covers: rows. Does not cover: truth. The files are the truth; losing this database costs a walk over the directory and
the order of use, never a byte. Rows follow files: written after the file, deleted before it is missed.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One extent or small object. `last_use` orders rows; it is a counter, not a time."""

    name: str
    size_bytes: int
    last_use: int


class BlockIndex:
    """The rows of one cache directory; used from one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = _open(path)

    def load(self) -> tuple[list[IndexRow], bool]:
        """Return all rows, oldest use first, and whether the last daemon stopped cleanly (then they are exact)."""
        rows = self._connection.execute("SELECT name, size_bytes, last_use FROM extents ORDER BY last_use").fetchall()
        clean = self._connection.execute("SELECT value FROM state WHERE key = 'clean'").fetchone()
        return [IndexRow(*row) for row in rows], bool(clean and clean[0] == 1)

    def write(self, changed: Iterable[IndexRow], removed: Iterable[str]) -> None:
        """Store a batch in one transaction."""
        with self._connection:
            self._connection.executemany(
                "INSERT INTO extents VALUES (?, ?, ?) "
                "ON CONFLICT(name) DO UPDATE SET size_bytes = excluded.size_bytes, last_use = excluded.last_use",
                ((row.name, row.size_bytes, row.last_use) for row in changed),
            )
            self._connection.executemany("DELETE FROM extents WHERE name = ?", ((name,) for name in removed))

    def mark_clean(self, clean: bool) -> None:
        """Say that the rows are exact (at a clean stop), or that they may lag behind (from the start on)."""
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO state VALUES ('clean', ?)", (int(clean),))

    def close(self) -> None:
        """Close the database."""
        self._connection.close()


def _open(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        # Garbage, another schema, a torn file: set aside (for whoever wants to look) and counted anew from the files.
        log.warning("index %s is unusable (%s); rebuilding it from the cached files", path, error)
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).unlink()
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"schema {found}, this orchestra reads {SCHEMA_VERSION}")
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS extents"
                "(name TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, last_use INTEGER NOT NULL) WITHOUT ROWID"
            )
            connection.execute("CREATE TABLE IF NOT EXISTS state(key TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("SELECT name, size_bytes, last_use FROM extents LIMIT 1").fetchone()
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection
