"""The inode table: which number the kernel knows a path's version by, and how often it was told.

Owns: numbers, look-up counts and their exactness under threads. Leaves to others: where entries come from.

A file's inode stands for one *version* of one path: a rewritten object gets a new number at its next look-up, as if
another file had been renamed over it. So the kernel's pages, attributes and passthrough file of one inode can never mix
two versions, an old open file keeps its own, and attributes need no expiry. A directory keeps its number. Numbers count
up and are never used again, so the generation is always 0.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import xxhash

from orchestra.errors import NameTooLongError
from orchestra.fuse.options import PATH_BYTES_MAX
from orchestra.fuse.protocol import ROOT_NODEID
from orchestra.values import Entry


class Inode:
    """One file version or one directory. `lookups` belongs to the table, the open counts to the files module;
    `is_searched` says that names of this directory were looked up since it was last listed."""

    __slots__ = ("backing_id", "entry", "is_searched", "lookups", "nodeid", "opens_cached", "opens_passthrough")

    def __init__(self, nodeid: int, entry: Entry) -> None:
        self.nodeid = nodeid
        self.entry = entry
        self.lookups = 0
        self.opens_cached = 0
        self.opens_passthrough = 0
        self.backing_id = 0
        self.is_searched = False


class InodeTable:
    """Finds inodes by number and by path; a number stays valid until the kernel has forgotten every look-up of it."""

    def __init__(self, root: Entry) -> None:
        self._lock = threading.Lock()
        self.root = Inode(ROOT_NODEID, root)
        self.root.lookups = 1
        self._next_nodeid = ROOT_NODEID + 1
        self._by_nodeid: dict[int, Inode] = {ROOT_NODEID: self.root}
        self._by_path: dict[str, Inode] = {root.path: self.root}
        # The hot path's look-up: a bound method of a dict is a third of a method of ours.
        self.get = self._by_nodeid.get

    def __len__(self) -> int:
        return len(self._by_nodeid)

    def remember(self, entry: Entry) -> Inode:
        """Return the inode of this version of the path and count one look-up by the kernel."""
        with self._lock:
            return self._remember(entry)

    def remember_all(self, entries: Sequence[Entry]) -> list[Inode]:
        """The same for many."""
        with self._lock:
            return [self._remember(entry) for entry in entries]

    def _remember(self, entry: Entry) -> Inode:
        inode = self._by_path.get(entry.path)
        if inode is None or inode.entry.version != entry.version or inode.entry.kind is not entry.kind:
            inode = Inode(self._next_nodeid, entry)
            self._next_nodeid += 1
            self._by_nodeid[inode.nodeid] = inode
            self._by_path[entry.path] = inode
        elif entry.is_directory:
            inode.entry = entry  # the same directory, perhaps with a newer time
        inode.lookups += 1
        return inode

    def forget(self, nodeid: int, lookups: int) -> Inode | None:
        """Take back `lookups`; return the inode if that was the last of them (it is then gone), else None."""
        with self._lock:
            inode = self._by_nodeid.get(nodeid)
            if inode is None or nodeid == ROOT_NODEID:
                return None
            inode.lookups -= lookups
            assert inode.lookups >= 0, f"the kernel forgot inode {nodeid} more often than it was told of it"
            if inode.lookups:
                return None
            del self._by_nodeid[nodeid]
            if self._by_path.get(inode.entry.path) is inode:
                del self._by_path[inode.entry.path]
            return inode

    def nodeid_of(self, path: str) -> int | None:
        """Return the number of the version that `path` was last seen at, None if the kernel does not know the path."""
        inode = self._by_path.get(path)
        return None if inode is None else inode.nodeid


def child_path(parent: str, name: str) -> str:
    """Return the path of `name` in `parent`. Raises NameTooLongError over 4,096 bytes."""
    path = f"{parent}/{name}" if parent != "/" else f"/{name}"
    if len(path) > PATH_BYTES_MAX // 4 and len(path.encode("utf-8", "surrogateescape")) > PATH_BYTES_MAX:
        raise NameTooLongError(f"the path {path[:60]!r}... is longer than {PATH_BYTES_MAX} bytes")
    return path


def inode_number_of(entry: Entry) -> int:
    """Return the `st_ino` of an entry: a hash of path and version, so that it is the same in every listing and mount.

    63 bits: among a million files two are alike with a chance of one in 10 million, and nothing here depends on it.
    """
    text = f"{entry.path}\0{entry.version}".encode("utf-8", "surrogateescape")
    return (xxhash.xxh3_64_intdigest(text) >> 1) | 2  # never 0, nor 1 (the root)
