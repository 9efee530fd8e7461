"""What faces (FUSE, fsspec, torch, gateway, command line) use; `orchestra.testing.client.ClientSuite` proves it.

A client belongs to no thread and no loop: any thread of any process that inherited it by fork may call it. Calls whose
name ends in `_cached` never wait and never send a message; the others may ask the node daemon.
Errors are those of `orchestra.errors`; paths are absolute ("/imagenet/a.jpg"), "/" is the root, a trailing slash is
ignored.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Protocol

from orchestra.values import Entry

# Fetches that one `read_many` keeps in flight: the store's own limit (fetch.requests_max) is what counts in the end.
READ_MANY_AT_ONCE = 256


class DirectoryView(Protocol):
    """The entries of one directory at one moment, sorted by name in code point order; immutable, holds no lock."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Entry: ...

    def __iter__(self) -> Iterator[Entry]: ...

    def names(self, start: int, stop: int) -> Sequence[tuple[bytes, bool, bytes]]:
        """Return (name, is a directory, version) of the entries from `start` to `stop` (at most the length), without
        making entries of them."""
        ...

    def find(self, name: str) -> Entry | None:
        """Return the entry with that name in O(log n), or None."""
        ...


class Handle(Protocol):
    """One version of one object, opened for reading; a rewritten object is another version and never seen here."""

    @property
    def entry(self) -> Entry:
        """What was opened; its version is the one that is read."""
        ...

    def readinto(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill `buffer` from `offset`, fetching what is missing; return the bytes read, fewer only at the end of the
        object. Raises StaleObjectError, StoreError. Thread-safe; blocks."""
        ...

    def readinto_cached(self, offset: int, buffer: bytearray | memoryview) -> int | None:
        """The same if every byte is on this node's disk, else None. Never waits for the store or the daemon."""
        ...

    def readinto_fetched(self, offset: int, buffer: bytearray | memoryview) -> int | None:
        """`readinto_cached` of what was fetched for this reader by a MissStream."""
        ...

    def read_here(self, *, fetched: bool = False) -> bytes | None:
        """Return the whole object if every byte is on this node's disk, else None; `fetched`: a MissStream said so."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """`readinto` into fresh bytes; b"" at and past the end."""
        ...

    def backing_fd(self) -> int | None:
        """Return a descriptor of the local file that holds exactly this object's bytes, complete, or None.

        The handle owns the descriptor; it stays valid (also after eviction) until `close`. This is what FUSE
        passthrough and mmap use.
        """
        ...

    def close(self) -> None:
        """Release descriptors. Idempotent."""
        ...


class MissStream(Protocol):
    """Ranges of many handles asked for at once, without a waiting thread each. One thread asks, one (the same or
    another) takes answers; belongs to the process that made it."""

    @property
    def descriptor(self) -> int:
        """Readable when there are answers, or none any more."""
        ...

    @property
    def patience_ns(self) -> int:
        """How long a stream with something to answer may say nothing before it is to be given up."""
        ...

    def ask(self, *wanted: tuple[int, Handle, int, int]) -> bool:
        """Have ranges (serial, handle, start, stop) made present, in one message; False if it could not be asked
        (use `Handle.readinto`). Never waits."""
        ...

    def answers(self) -> list[tuple[int, bool]]:
        """Wait; return (serial, is_present) of what was answered, [] when there will be no more answers.

        What is not present, and what was asked and never answered, is for `Handle.readinto`, which says why.
        """
        ...

    def answers_now(self) -> list[tuple[int, bool]] | None:
        """As `answers`, without waiting: [] when nothing is here yet, None when there will be no more."""
        ...

    def shut_down(self) -> None:
        """End it for both threads. Idempotent."""
        ...


class Extent(enum.Enum):
    """How much of the tree a change is about."""

    PATH = "path"
    CHILDREN = "children"  # what lies directly in this directory
    BELOW = "below"  # the path, and everything below it


class Changes(Protocol):
    """What this node finds to be otherwise than it was known: other versions, names that came or went, mounts.

    Who keeps answers of the client for longer than `freshness_s` says, or wants to know sooner, listens here.
    `wait` is called by one thread; `close` by any.
    """

    @property
    def position(self) -> int:
        """Where the next `wait` begins; another listener can go on there, in any process of this node."""
        ...

    def wait(self) -> Sequence[tuple[Extent, str]] | None:
        """Wait for changes; return (how much, path) of each, after which the client knows the new state or nothing.
        None when there will be no more."""
        ...

    def close(self) -> None:
        """Have `wait` return None."""
        ...


class Client(Protocol):
    """The namespace as this node sees it."""

    def stat(self, path: str, *, refresh: bool = False) -> Entry:
        """Return the entry, no older than the mount's freshness (`refresh`: as it is now). Raises NotFoundError."""
        ...

    def stat_cached(self, path: str) -> Entry | None:
        """Return the entry if it is known and fresh, None if that is not known. Raises NotFoundError if it is known
        (and fresh) that nothing is there."""
        ...

    def list(self, path: str, *, refresh: bool = False) -> DirectoryView:
        """Return the directory's entries. Raises NotFoundError, NotADirectoryPathError."""
        ...

    def list_cached(self, path: str) -> DirectoryView | None:
        """Return the entries if they are known and fresh, else None."""
        ...

    def stat_timed(self, path: str) -> tuple[Entry, float] | None:
        """Return what `stat_cached` does and, after one look instead of two, what `freshness_s` says of the path."""
        ...

    def freshness_s(self, path: str) -> float:
        """Return how long what is known about `path` may still be used without asking: what is left of the mount's
        freshness, in seconds (inf for `immutable`, 0 for `strict` or when nothing is known). Kernel entry and
        attribute timeouts follow it."""
        ...

    def open(self, path: str, *, entry: Entry | None = None) -> Handle:
        """Open the object's current version (or the version of `entry`, without looking again).

        Raises NotFoundError, IsADirectoryPathError. Reads nothing yet.
        """
        ...

    def read_small_into(self, entry: Entry, buffer: memoryview) -> int | None:
        """Put the whole object of `entry` into `buffer` if it is a small one (a block at most, and shorter than the
        buffer) and on this node's disk; return its size, or None, after which `open` says more. Never waits."""
        ...

    def read_file(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of the object, cut at its end."""
        ...

    def read_many(self, paths: Sequence[str], *, at_once: int = READ_MANY_AT_ONCE) -> Sequence[bytes]:
        """Return the whole contents of many (small) objects, up to `at_once` missing ones fetched at the same time.

        Raises the error of the first that fails.
        """
        ...

    def miss_stream(self) -> MissStream | None:
        """Return a new stream for misses, None if there is no daemon to talk to now (or this client has none)."""
        ...

    def changes(self, position: int | None = None) -> Changes | None:
        """Return what changes from `position` on (None: from now on); None where nobody tells. Sends nothing."""
        ...

    @property
    def messages_sent(self) -> int:
        """How many requests this process sent to the daemon; 0 for a warm read."""
        ...

    def close(self) -> None:
        """Close connections and descriptors. Idempotent; the client may be used again and then reconnects."""
        ...
