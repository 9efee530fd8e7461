"""The inode table: which number the kernel knows a path's version by, how often it was told, and how often it is open.

Owns: numbers, counts, and their exactness under threads, several workers and their deaths. Leaves to others: where
entries come from, where the memory lies (shared.py).

A file's inode stands for one *version* of one path: a rewritten object gets a new number at its next look-up, as if
another file had been renamed over it. So the kernel's pages, attributes and passthrough file of one inode can never mix
two versions, an old open file keeps its own, and attributes need no expiry. A directory keeps its number. A number is
not used again until two thousand million others were, so the generation is always 0.

An answer that counts something (a look-up, an open) is counted before it is sent, since the kernel may forget it the
moment it has it. If the worker dies in between, the kernel sends the request again, and `settle` takes the count back
by the cell that the dead one had left. Other workers' inodes are read from the memory when they are first met.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Sequence

import xxhash

from orchestra.errors import NameTooLongError
from orchestra.fuse import shared
from orchestra.fuse.options import PATH_BYTES_MAX
from orchestra.fuse.protocol import RESENT_BIT, ROOT_NODEID
from orchestra.fuse.shared import LOOKUPS, NUMBER, RECORD_NUMBER_MASK, SharedLock, SharedMemory
from orchestra.values import Entry, EntryKind

# Inodes kept as Python objects, 500 bytes each; the memory has them all, at 250 bytes.
INODES_KEPT_MAX = 100_000
# Chains walked under the lock at a time: some 100 us of a mount that knows 100,000 names.
_BUCKETS_AT_ONCE = 512
assert shared.BUCKET_COUNT % _BUCKETS_AT_ONCE == 0
_TAIL = struct.Struct("<3Q")  # size, mtime, shape
_TAIL_AT = shared.SIZE * shared.WORD_BYTES
_TEXT_AT = shared.RECORD_WORDS * shared.WORD_BYTES
# What a cell says of a record: in the bits above its number.
LOOKED_UP, OPENED_CACHED, OPENED_PASSTHROUGH, RELEASED = range(4)
_OPENS = {OPENED_CACHED: shared.OPENS_CACHED, OPENED_PASSTHROUGH: shared.OPENS_PASSTHROUGH}


class Inode:
    """One file version or one directory, as this process knows it; the counts are in the memory.

    `is_searched` says that names of this directory were looked up since it was last listed.
    """

    __slots__ = ("entry", "is_searched", "nodeid", "record")

    def __init__(self, nodeid: int, entry: Entry) -> None:
        self.nodeid = nodeid
        self.entry = entry
        self.record = nodeid & RECORD_NUMBER_MASK
        self.is_searched = False


class InodeTable:
    """Finds inodes by number and by path; a number stays valid until the kernel has forgotten every look-up of it.

    Without `memory` the table belongs to this process alone. `lock_path` is given where several workers share it.
    """

    def __init__(
        self, root: Entry, memory: SharedMemory | None = None, *, slot: int = 0, lock_path: str | None = None
    ) -> None:
        self.memory = memory or SharedMemory()
        self.slot = slot
        self.is_alone = lock_path is None
        self.lock = SharedLock(self.memory, lock_path)
        self.root = Inode(ROOT_NODEID, root)
        self.large_size_bytes = sys.maxsize  # the sizes of such files are added up, as often as they are met and opened
        self._words = self.memory.words
        self._by_nodeid: dict[int, Inode] = {}
        # The hot path's look-up: a bound method of a dict is a third of a method of ours.
        self.get = self._by_nodeid.get
        with self.lock:
            self.memory.redo()
            self._bank = self.memory.begin(slot)
        self._forget_cell = shared.slot_start(slot) + shared.FORGET
        self._by_nodeid[ROOT_NODEID] = self.root

    def __len__(self) -> int:
        return self._words[shared.LIVE] + 1

    # -- look-ups -------------------------------------------------------------------------------------------------

    def load(self, nodeid: int) -> Inode | None:
        """Return an inode that `get` does not know: of another worker, or one that this process has let go of."""
        record = nodeid & RECORD_NUMBER_MASK
        words = self._words
        if not shared.HEAP <= record < words[shared.NEXT] or words[record + NUMBER] != nodeid:
            return None
        entry = self._entry_of(record)
        if words[record + NUMBER] != nodeid:  # freed meanwhile by another worker
            return None
        inode = Inode(nodeid, entry)
        if len(self._by_nodeid) > INODES_KEPT_MAX:
            self._let_go()
        return self._by_nodeid.setdefault(nodeid, inode)

    def _let_go(self) -> None:
        """Drop the oldest tenth of what is kept; it can be loaded again."""
        for nodeid in list(self._by_nodeid)[: INODES_KEPT_MAX // 10]:
            if nodeid != ROOT_NODEID:
                self._by_nodeid.pop(nodeid, None)

    def _entry_of(self, record: int) -> Entry:
        mapped = self.memory.bytes
        at = record * shared.WORD_BYTES
        size_bytes, mtime_ns, shape = _TAIL.unpack_from(mapped, at + _TAIL_AT)
        path_stop = at + _TEXT_AT + (shape >> 16 & 0xFFFF)
        path = mapped[at + _TEXT_AT : path_stop].decode("utf-8", "surrogateescape")
        version = mapped[path_stop : path_stop + (shape >> 32 & 0xFFFFFF)].decode("utf-8", "surrogateescape")
        return Entry(path, EntryKind(shape & 0xFF), size_bytes, mtime_ns - (mtime_ns >> 63 << 64), version)

    def _record_of(self, path: str, hashed: int) -> Inode | None:
        """The newest inode of a path: records are put first in their chain."""
        words = self._words
        record = words[shared.BUCKETS + hashed % shared.BUCKET_COUNT]
        while record:
            if words[record + shared.HASH] == hashed:
                nodeid = words[record + NUMBER]
                inode = self.get(nodeid) or self.load(nodeid)
                if inode is not None and inode.entry.path == path:
                    return inode
            record = words[record + shared.CHAIN]
        return None

    def nodeid_of(self, path: str) -> int | None:
        """Return the number of the version that `path` was last seen at, None if the kernel does not know the path."""
        if path == self.root.entry.path:
            return ROOT_NODEID
        with self.lock:
            inode = self._record_of(path, _hash_of(path.encode("utf-8", "surrogateescape")))
        return None if inode is None else inode.nodeid

    def paths(self) -> Iterator[str]:
        """Yield the path of every inode that the kernel knows but the root, some of them twice. Others may go on with
        the table meanwhile; what they add may be left out."""
        words = self._words
        for first in range(shared.BUCKETS, shared.BUCKETS + shared.BUCKET_COUNT, _BUCKETS_AT_ONCE):
            found = []
            with self.lock:
                for record in words[first : first + _BUCKETS_AT_ONCE]:
                    while record:
                        if words[record + NUMBER]:
                            found.append(self._path_of(record))
                        record = words[record + shared.CHAIN]
            yield from found

    def _path_of(self, record: int) -> str:
        start = record * shared.WORD_BYTES + _TEXT_AT
        stop = start + (self._words[record + shared.SHAPE] >> 16 & 0xFFFF)
        return self.memory.bytes[start:stop].decode("utf-8", "surrogateescape")

    # -- counts ---------------------------------------------------------------------------------------------------

    def remember(self, entry: Entry, unique: int = 0) -> Inode:
        """Return the inode of this version of the path and count one look-up by the kernel, asked by `unique`."""
        with self.lock:
            inode = self._found_or_made(entry)
            if inode.nodeid != ROOT_NODEID:
                record = inode.record
                self.memory.change(
                    record, LOOKUPS, self._words[record + LOOKUPS] + 1, self._cell_of(unique), unique, record
                )
        return inode

    def remember_all(self, entries: Sequence[Entry], unique: int = 0) -> list[Inode]:
        """The same for many (BATCH_ITEMS_MAX at most): all are counted or none. One answer at a time."""
        with self.lock:
            inodes = [self._found_or_made(entry) for entry in entries]
            self.memory.count_batch(
                self._bank + shared.BATCH, unique, [inode.record for inode in inodes if inode.nodeid != ROOT_NODEID]
            )
        return inodes

    def _found_or_made(self, entry: Entry) -> Inode:
        path = entry.path.encode("utf-8", "surrogateescape")
        hashed = _hash_of(path)
        inode = self._record_of(entry.path, hashed)
        if inode is None or inode.entry.version != entry.version or inode.entry.kind is not entry.kind:
            if entry.path == self.root.entry.path:
                return self.root
            return self._made(entry, path, hashed)
        if entry.is_directory:
            inode.entry = entry  # the same directory, perhaps with a newer time
        return inode

    def _made(self, entry: Entry, path: bytes, hashed: int) -> Inode:
        version = entry.version.encode("utf-8", "surrogateescape")
        if entry.size_bytes >= self.large_size_bytes:
            self.memory.put(shared.LARGE_BYTES, self._words[shared.LARGE_BYTES] + entry.size_bytes)
        shape = int(entry.kind) | len(path) << 16 | len(version) << 32
        record = self.memory.create_record(hashed, (entry.size_bytes, entry.mtime_ns, shape), path + version)
        inode = Inode(self._words[record + NUMBER], entry)
        if len(self._by_nodeid) > INODES_KEPT_MAX:
            self._let_go()
        self._by_nodeid[inode.nodeid] = inode
        return inode

    def lookups_of(self, nodeid: int) -> int:
        """How many look-ups the kernel holds; 0 for a number it does not know."""
        record = nodeid & RECORD_NUMBER_MASK
        known = shared.HEAP <= record < self._words[shared.NEXT] and self._words[record + NUMBER] == nodeid
        return self._words[record + LOOKUPS] if known else 0

    def forget(self, nodeid: int, lookups: int) -> Inode | None:
        """Take back `lookups`; return the inode if that was the last of them (it is then gone), else None."""
        with self.lock:
            return self._forget(nodeid, lookups, self._cell_of(0), 0, 0)

    def forget_asked(self, unique: int, items: Sequence[tuple[int, int]], start: int = 0) -> list[Inode]:
        """Do what a FORGET says, each of its (number, look-ups) once, whoever dies meanwhile; return what is gone."""
        gone = []
        with self.lock:
            for index in range(start, len(items)):
                inode = self._forget(*items[index], self._forget_cell, unique, index + 1)
                if inode is not None:
                    gone.append(inode)
        return gone

    def forgets_done(self, unique: int) -> int:
        """How many items of that FORGET the slot's workers have done."""
        return self._words[self._forget_cell + 1] if self._words[self._forget_cell] == unique else 0

    def take_back(self, nodeid: int, unique: int) -> Inode | None:
        """Undo `remember` for an answer that the kernel did not want; as `forget`."""
        with self.lock:
            return self._forget(nodeid, 1, self._cell_of(unique), 0, 0)

    def take_back_all(self, inodes: Iterable[Inode]) -> None:
        """Undo the last `remember_all`."""
        with self.lock:
            self.memory.put(self._bank + shared.BATCH, 0)
            for inode in inodes:
                self._forget(inode.nodeid, 1, self._cell_of(0), 0, 0)

    def _forget(self, nodeid: int, lookups: int, cell: int, unique: int, note: int) -> Inode | None:
        if nodeid == ROOT_NODEID:
            return None
        inode = self.get(nodeid) or self.load(nodeid)
        record = nodeid & RECORD_NUMBER_MASK
        if inode is None or self._words[record + NUMBER] != nodeid:
            self._by_nodeid.pop(nodeid, None)
            return None
        left = self._words[record + LOOKUPS] - lookups
        assert left >= 0, f"the kernel forgot inode {nodeid} more often than it was told of it"
        self.memory.change(record, LOOKUPS, left, cell, unique, note)
        if left:
            return None
        self._by_nodeid.pop(nodeid, None)
        return inode

    def _cell_of(self, unique: int) -> int:
        return self._bank + ((unique >> 1) % shared.CELL_COUNT * 2 if unique else shared.NO_CELL)

    # -- opens; the caller holds the lock ---------------------------------------------------------------------------

    def opens(self, inode: Inode) -> tuple[int, int, int]:
        """Return (cached opens, passthrough opens, backing id)."""
        record = inode.record
        words = self._words
        return (
            words[record + shared.OPENS_CACHED],
            words[record + shared.OPENS_PASSTHROUGH],
            words[record + shared.BACKING_ID],
        )

    def set_backing(self, inode: Inode, backing_id: int) -> None:
        """Note which backing file the kernel holds for an inode; 0: none."""
        self.memory.put(inode.record + shared.BACKING_ID, backing_id)

    def count_open(self, inode: Inode, kind: int, unique: int) -> None:
        """Count an open of that kind, asked by `unique`."""
        # All opens together are counted apart, before this and after the release: a death in between, or what is undone
        # after one, makes them too many and never too few.
        self.memory.put(shared.LARGE_OPEN, self._words[shared.LARGE_OPEN] + 1)
        self.memory.put(shared.LARGE_BYTES, self._words[shared.LARGE_BYTES] + inode.entry.size_bytes)
        at = _OPENS[kind]
        value = self._words[inode.record + at] + 1
        self.memory.change(inode.record, at, value, self._cell_of(unique), unique, inode.record | kind << 32)

    def count_release(self, inode: Inode, kind: int, unique: int, *, is_undo: bool) -> int:
        """Take one open of that kind back (`is_undo`: its OPEN was not wanted); return how many are left."""
        at = _OPENS[kind]
        left: int = self._words[inode.record + at] - 1
        assert left >= 0, f"inode {inode.nodeid} was released more often than it was opened"
        note = 0 if is_undo else inode.record | RELEASED << 32
        self.memory.change(inode.record, at, left, self._cell_of(unique), 0 if is_undo else unique, note)
        self.memory.put(shared.LARGE_OPEN, max(0, self._words[shared.LARGE_OPEN] - 1))
        return left

    # -- after a death ----------------------------------------------------------------------------------------------

    def settle(self, unique: int) -> bool:
        """A request has come again: undo what a dead worker had counted for it; return whether it was a RELEASE that
        is done and needs only its answer."""
        asked = unique & ~RESENT_BIT
        with self.lock:
            for bank in self.memory.dead_banks():
                cell = bank + (asked >> 1) % shared.CELL_COUNT * 2
                if self._words[cell] & ~RESENT_BIT == asked and asked:
                    if self._settle_one(cell):
                        return True
                elif self._words[bank + shared.BATCH] & ~RESENT_BIT == asked and asked:
                    self._settle_batch(bank + shared.BATCH)
        return False

    def _settle_one(self, cell: int) -> bool:
        note = self._words[cell + 1]
        record, kind = note & RECORD_NUMBER_MASK, note >> 32
        if kind == RELEASED:
            return True
        at = LOOKUPS if kind == LOOKED_UP else _OPENS[kind]
        self.memory.change(record, at, self._words[record + at] - 1, cell, 0, 0)
        return False

    def _settle_batch(self, batch: int) -> None:
        words = self._words
        records = [words[at] for at in range(batch + 8, batch + 8 + 2 * words[batch + 1], 2)]
        self.memory.put(batch, 0)
        for record in records:
            self.memory.change(record, LOOKUPS, words[record + LOOKUPS] - 1, self._cell_of(0), 0, 0)


def _hash_of(path: bytes) -> int:
    return xxhash.xxh3_64_intdigest(path)


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
    return number_of(f"{entry.path}\0{entry.version}".encode("utf-8", "surrogateescape"))


def number_of(text: bytes) -> int:
    """The same of the path, a NUL and the version."""
    return (xxhash.xxh3_64_intdigest(text) >> 1) | 2  # never 0, nor 1 (the root)
