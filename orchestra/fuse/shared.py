"""The memory that the workers of one mount share: where things lie in it, how records are made, and the redo log.

Owns: a memfd's layout in 8-byte words, allocation of records, changes that survive their writer's death, and the lock
around them. Leaves to others: what records mean (inodes.py). It lives as long as a process holds its descriptor, which
the supervisor does.

A change of a count is written down first (REDO) and then made; REDO_KIND is the commit. A writer may be killed between
any two stores: whoever takes the lock next makes the change again, which has the same effect however often it is made.
Where no such record is kept (allocation), a death can lose a record's memory and nothing else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable
from types import TracebackType

from orchestra.fuse.options import REQUEST_BYTES_MAX, WORKERS_MAX

WORD_BYTES = 8
# Virtual size: only touched pages cost memory. 8 GiB hold some 30 million inodes; the kernel would need 30 GB for them.
MEMORY_BYTES = 8 << 30
_MAGIC = 0x6F72636866757331  # "orchfus1"

# -- the header: word numbers ---------------------------------------------------------------------------------------
MAGIC, NEXT, GENERATION, LIVE, INIT_FLAGS, LARGE_OPEN, OPENS_OVER, CHANGES_SEEN = range(8)
REDO_KIND, REDO_RECORD, REDO_FIELD, REDO_VALUE, REDO_CELL, REDO_UNIQUE, REDO_NOTE = range(8, 15)
REDO_NONE, REDO_ONE, REDO_BATCH = range(3)
LARGE_BYTES = 15
FREE = 16  # the first free record of each size class
INCARNATION = 32  # one word a slot: how many workers have served it, and RETIRED if the last of them has ended
RETIRED = 1 << 63
_HEADER_WORDS = 512
# Chained, so never rebuilt: 2 MiB, 4 records a chain at a million inodes.
BUCKET_COUNT = 1 << 18
BUCKETS = _HEADER_WORDS

# -- a worker's slot ------------------------------------------------------------------------------------------------
# The request is read into shared memory, so that a FORGET (which the kernel does not send twice) outlives its reader.
_REQUEST_WORDS = REQUEST_BYTES_MAX // WORD_BYTES
FORGET = _REQUEST_WORDS  # (unique, how many of its items are done)
_BANKS = FORGET + 8
# Cells are found by the request's number. Two requests with one cell between count and answer at one moment would need
# numbers 1,024 apart; a death just then would leave an inode that is never forgotten, and nothing worse.
CELL_COUNT = 1024
BATCH = CELL_COUNT * 2  # (unique, count), from 8 on (record, value) pairs
NO_CELL = BATCH + 2  # where a change leaves its mark that no request asked for
BATCH_ITEMS_MAX = 1024
_BANK_WORDS = BATCH + 8 + BATCH_ITEMS_MAX * 2
# A dead worker's bank is kept until its requests have been sent again; 7 deaths in a row may come before that.
BANK_COUNT = 8
_SLOT_WORDS = _BANKS + BANK_COUNT * _BANK_WORDS
_SLOTS = BUCKETS + BUCKET_COUNT
# -- where readers of directories are: fh, offset of the next, length of the last name, the name --------------------
POSITION_COUNT = 1024
POSITION_WORDS = 36
POSITIONS = _SLOTS + WORKERS_MAX * _SLOT_WORDS
HEAP = (POSITIONS + POSITION_COUNT * POSITION_WORDS + 511) & ~511

# -- a record ---------------------------------------------------------------------------------------------------------
NUMBER, CHAIN, HASH, LOOKUPS, OPENS_CACHED, OPENS_PASSTHROUGH, BACKING_ID, SIZE, MTIME, SHAPE = range(10)
RECORD_WORDS = 10
_FIXED = struct.Struct("<8Q")  # HASH to SHAPE but the three counts between are 0
# Sizes of records; the text (path, then version) has what the fixed part leaves. Most data sets fit the first three.
CLASS_WORDS = (18, 22, 26, 34, 50, 82, 146, 274, 560, 1200, 9000)
RECORD_NUMBER_MASK = 0xFFFFFFFF

Put = Callable[[int, int], None]


class SharedMemory:
    """One mapping of the memory; `descriptor` None makes a fresh one of this process's own."""

    def __init__(self, descriptor: int | None = None, *, size_bytes: int = MEMORY_BYTES) -> None:
        ours = create() if descriptor is None else descriptor
        try:
            if os.fstat(ours).st_size < size_bytes:
                os.ftruncate(ours, size_bytes)
            self.bytes = mmap.mmap(ours, size_bytes)
        finally:
            if descriptor is None:
                os.close(ours)
        self.words = memoryview(self.bytes).cast("Q")
        # Every store goes through this, so that a test can be killed at each.
        self.put: Put = self.words.__setitem__
        if self.words[MAGIC] != _MAGIC:
            self.put(NEXT, HEAP)
            self.put(MAGIC, _MAGIC)

    def request_buffer(self, slot: int) -> memoryview:
        """Where the worker of a slot reads its requests."""
        start = slot_start(slot) * WORD_BYTES
        return memoryview(self.bytes)[start : start + REQUEST_BYTES_MAX]

    def begin(self, slot: int) -> int:
        """Count a new worker of a slot and empty its bank; return the bank's first word."""
        incarnation = self.workers_of(slot) + 1
        bank = bank_start(slot, incarnation)
        empty = memoryview(bytes(_BANK_WORDS * WORD_BYTES)).cast("Q")
        self.words[bank : bank + _BANK_WORDS] = empty
        self.put(INCARNATION + slot, incarnation)
        return bank

    def workers_of(self, slot: int) -> int:
        """How many workers a slot has had."""
        return self.words[INCARNATION + slot] & ~RETIRED

    def dead_banks(self) -> list[int]:
        """The banks that no living worker writes."""
        found = []
        for slot in range(WORKERS_MAX):
            incarnation = self.workers_of(slot)
            oldest = max(1, incarnation - BANK_COUNT + 1)
            next_to_live = incarnation + (self.words[INCARNATION + slot] >= RETIRED)
            found += [bank_start(slot, dead) for dead in range(oldest, next_to_live)]
        return found

    # -- records --------------------------------------------------------------------------------------------------

    def create_record(self, hashed: int, numbers: tuple[int, int, int], text: bytes) -> int:
        """Make a record with counts of 0 and put it first in its chain; return it. The caller holds the lock.

        `numbers`: size, mtime, shape without the class. Raises OSError when the memory is full.
        """
        words, put = self.words, self.put
        record, index = self._allocate(RECORD_WORDS + (len(text) + WORD_BYTES - 1) // WORD_BYTES)
        generation = (words[GENERATION] + 1) & 0x7FFFFFFF or 1
        put(GENERATION, generation)
        size_bytes, mtime_ns, shape = numbers
        at = record * WORD_BYTES
        _FIXED.pack_into(
            self.bytes,
            at + HASH * WORD_BYTES,
            hashed,
            0,
            0,
            0,
            0,
            size_bytes,
            mtime_ns & (2**64 - 1),
            shape | index << 8,
        )
        start = at + RECORD_WORDS * WORD_BYTES
        self.bytes[start : start + len(text)] = text
        bucket = BUCKETS + hashed % BUCKET_COUNT
        put(record + CHAIN, words[bucket])
        put(record + NUMBER, generation << 32 | record)
        put(LIVE, words[LIVE] + 1)
        put(bucket, record)
        return record

    def _allocate(self, word_count: int) -> tuple[int, int]:
        words, put = self.words, self.put
        index = bisect_left(CLASS_WORDS, word_count)
        if index == len(CLASS_WORDS):
            raise OSError(f"a path and version of {word_count * WORD_BYTES} bytes do not fit a record")
        size = CLASS_WORDS[index]
        record = words[FREE + index]
        if record:
            put(FREE + index, words[record + CHAIN])
            return record, index
        record = words[NEXT]
        if record + size > len(words):
            raise OSError("the mount's table of inodes is full")
        put(NEXT, record + size)
        return record, index

    def free_record(self, record: int) -> None:
        """Take a record out of its chain and keep its place for another. May be done twice in a row."""
        words, put = self.words, self.put
        at = BUCKETS + words[record + HASH] % BUCKET_COUNT
        while (found := words[at]) and found != record:
            at = found + CHAIN
        if found:
            put(at, words[record + CHAIN])
            put(LIVE, words[LIVE] - 1)  # a death just before leaves it one too high; it is only compared with a limit
        put(record + NUMBER, 0)
        free = FREE + (words[record + SHAPE] >> 8 & 0xFF)
        if words[free] != record:
            put(record + CHAIN, words[free])
            put(free, record)

    # -- changes --------------------------------------------------------------------------------------------------

    def change(self, record: int, field: int, value: int, cell: int, unique: int, note: int) -> None:
        """Set a count and say in `cell` whose request it was for, both or neither. The caller holds the lock.

        A record whose look-ups come to 0 is freed.
        """
        put = self.put
        put(REDO_RECORD, record)
        put(REDO_FIELD, field)
        put(REDO_VALUE, value)
        put(REDO_CELL, cell)
        put(REDO_UNIQUE, unique)
        put(REDO_NOTE, note)
        put(REDO_KIND, REDO_ONE)
        put(record + field, value)
        put(cell + 1, note)
        put(cell, unique)
        if not value and field == LOOKUPS:
            self.free_record(record)
        put(REDO_KIND, REDO_NONE)

    def count_batch(self, batch: int, unique: int, records: list[int]) -> None:
        """Count one look-up of each record, all or none of them."""
        words, put = self.words, self.put
        put(batch, 0)
        at = batch + 8
        for record in records:
            put(at, record)
            put(at + 1, words[record + LOOKUPS] + 1)
            at += 2
        put(batch + 1, len(records))
        put(REDO_CELL, batch)
        put(REDO_UNIQUE, unique)
        put(REDO_KIND, REDO_BATCH)
        self._apply_batch(batch, unique)

    def _apply_batch(self, batch: int, unique: int) -> None:
        words, put = self.words, self.put
        for at in range(batch + 8, batch + 8 + 2 * words[batch + 1], 2):
            put(words[at] + LOOKUPS, words[at + 1])
        put(batch, unique)
        put(REDO_KIND, REDO_NONE)

    def redo(self) -> None:
        """Finish what a writer that died had begun. The caller holds the lock."""
        words = self.words
        kind = words[REDO_KIND]
        if kind == REDO_ONE:
            self.change(*(words[at] for at in range(REDO_RECORD, REDO_NOTE + 1)))
        elif kind == REDO_BATCH:
            self._apply_batch(words[REDO_CELL], words[REDO_UNIQUE])

    def close(self) -> None:
        """Unmap."""
        self.put = _closed
        self.words.release()


def _closed(at: int, value: int) -> None:
    raise ValueError("the mount's memory is closed")


def create() -> int:
    """Make the memory; return its descriptor."""
    return os.memfd_create("orchestra-fuse", os.MFD_CLOEXEC)


def read_word(descriptor: int, at: int) -> int:
    """Return a word of the memory, for who does not map it."""
    return int.from_bytes(os.pread(descriptor, WORD_BYTES, at * WORD_BYTES), sys.byteorder)


def retire(descriptor: int, slot: int) -> None:
    """Say that the worker of a slot has ended, so that others may settle what it left before it has a successor."""
    at = INCARNATION + slot
    word = read_word(descriptor, at)
    if word:
        os.pwrite(descriptor, (word | RETIRED).to_bytes(WORD_BYTES, sys.byteorder), at * WORD_BYTES)


def slot_start(slot: int) -> int:
    """The first word of a slot, which is where its requests are read to."""
    return _SLOTS + slot * _SLOT_WORDS


def bank_start(slot: int, incarnation: int) -> int:
    """The first word of the bank that a slot's n-th worker writes."""
    return slot_start(slot) + _BANKS + incarnation % BANK_COUNT * _BANK_WORDS


class SharedLock:
    """Held by one thread of one worker; let go of by the kernel when its holder dies.

    With one worker it is a lock between threads: a file lock would cost a look-up 2 us more.
    """

    def __init__(self, memory: SharedMemory, lock_path: str | None) -> None:
        self._memory = memory
        self._threads = threading.Lock()
        # Opened anew by each worker: a lock belongs to an open file description, and a shared one locks nobody out.
        self._fd = -1 if lock_path is None else os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> None:
        self._threads.acquire()
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self._memory.words[REDO_KIND]:
                self._memory.redo()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._threads.release()
