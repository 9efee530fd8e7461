"""The inode table that workers share is exact, also when a worker is killed between any two of its stores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.fuse import shared
from orchestra.fuse.inodes import OPENED_CACHED, OPENED_PASSTHROUGH, InodeTable
from orchestra.fuse.protocol import RESENT_BIT
from orchestra.fuse.shared import SharedMemory
from orchestra.values import Entry, EntryKind

_ROOT = Entry("/", EntryKind.DIRECTORY, 0, 0, "")
_SIZE = 1 << 28


class _KilledError(BaseException):
    """The worker is no more; what it had stored is."""


def _file(path: str, version: str = "1") -> Entry:
    return Entry(path, EntryKind.FILE, 7, -5, version)


class _Workers:
    """Workers of one slot, one after the other, on one memory."""

    def __init__(self, memory_fd: int | None = None) -> None:
        self.memory_fd = shared.create() if memory_fd is None else memory_fd
        self.table = self.next()

    def next(self) -> InodeTable:
        self.table = InodeTable(_ROOT, SharedMemory(self.memory_fd, size_bytes=_SIZE))
        return self.table

    def run(self, work: Callable[[InodeTable], object], *, stores: int) -> bool:
        """Do `work` on the present worker, killed at its store number `stores`; return whether it came to its end."""
        memory = self.table.memory
        real, left = memory.put, stores

        def put(at: int, value: int) -> None:
            nonlocal left
            if not left:
                raise _KilledError
            left -= 1
            real(at, value)

        memory.put = put
        try:
            work(self.table)
        except _KilledError:
            return False
        finally:
            memory.put = real
        return True


def _counted(table: InodeTable) -> dict[str, int]:
    """Walk every chain; return look-ups by path, with those of 0 left out."""
    words, found = table.memory.words, {}
    for bucket in range(shared.BUCKETS, shared.BUCKETS + shared.BUCKET_COUNT):
        record, seen = words[bucket], set()
        while record:
            assert record not in seen, "a chain is a ring"
            seen.add(record)
            inode = table.load(words[record + shared.NUMBER])
            assert inode is not None
            if words[record + shared.LOOKUPS]:
                found[f"{inode.entry.path} {inode.entry.version}"] = words[record + shared.LOOKUPS]
            record = words[record + shared.CHAIN]
    return found


def test_another_worker_finds_what_the_first_had_told_the_kernel() -> None:
    """Number, path, version, size and time come back from the memory."""
    workers = _Workers()
    entry = _file("/a/\udcff", 'W/"x"')
    told = workers.table.remember(entry).nodeid
    after = workers.next()
    inode = after.load(told)
    assert inode is not None
    assert inode.entry == entry
    assert after.remember(entry).nodeid == told
    assert after.lookups_of(told) == 2


def test_a_freed_number_is_not_known_to_any_worker() -> None:
    """The record's place is used again under another number."""
    workers = _Workers()
    first = workers.table.remember(_file("/a")).nodeid
    workers.table.forget(first, 1)
    second = workers.next().remember(_file("/b")).nodeid
    assert second != first
    assert second & shared.RECORD_NUMBER_MASK == first & shared.RECORD_NUMBER_MASK
    assert workers.table.load(first) is None


@pytest.mark.parametrize("was_sent", [False, True])
def test_a_look_up_is_counted_once_whenever_its_worker_dies(was_sent: bool) -> None:
    """Killed at every store: if the kernel asks again, the count is that of the second answer alone; if not, of the
    first."""
    for stores in range(100):
        workers = _Workers()
        workers.table.remember(_file("/other"), 2)
        finished = workers.run(lambda table: table.remember(_file("/a"), 4), stores=stores)
        table = workers.next()
        if not (finished and was_sent):  # the answer never left, and the kernel asks again
            assert not table.settle(4 | RESENT_BIT)
            table.remember(_file("/a"), 4 | RESENT_BIT)
        assert _counted(table) == {"/a 1": 1, "/other 1": 1}
        if finished:
            return
    raise AssertionError("the look-up did not end")


def test_a_batch_is_counted_once_whenever_its_worker_dies() -> None:
    """READDIRPLUS counts a look-up for each of its names."""
    entries = [_file(f"/d/{number}") for number in range(5)]
    for stores in range(300):
        workers = _Workers()
        workers.table.remember(entries[0], 2)
        finished = workers.run(lambda table: table.remember_all(entries, 4), stores=stores)
        table = workers.next()
        table.settle(4 | RESENT_BIT)
        table.remember_all(entries, 4 | RESENT_BIT)
        assert _counted(table) == {"/d/0 1": 2, **{f"/d/{number} 1": 1 for number in range(1, 5)}}
        if finished:
            return
    raise AssertionError("the batch did not end")


def test_a_forget_is_done_once_whenever_its_worker_dies() -> None:
    """The kernel does not send it again: the next worker finds the request and how far it was done."""
    for stores in range(200):
        workers = _Workers()
        nodeids = [workers.table.remember(_file(f"/{name}"), 2).nodeid for name in "abc"]
        workers.table.remember(_file("/b"), 2)
        items = [(nodeid, 1) for nodeid in nodeids]
        finished = workers.run(lambda table, items=items: table.forget_asked(8, items), stores=stores)  # type: ignore[misc]
        table = workers.next()
        table.forget_asked(8, items, table.forgets_done(8))
        assert _counted(table) == {"/b 1": 1}
        assert table.remember(_file("/d")).nodeid not in nodeids
        if finished:
            return
    raise AssertionError("the forget did not end")


@pytest.mark.parametrize("kind", [OPENED_CACHED, OPENED_PASSTHROUGH])
def test_opens_and_releases_are_counted_once_whenever_their_worker_dies(kind: int) -> None:
    """An OPEN sent again is counted by its second answer; a RELEASE that was done is only answered."""
    for stores in range(40):
        workers = _Workers()
        inode = workers.table.remember(_file("/a"), 2)
        workers.table.count_open(inode, kind, 4)
        opened = workers.run(lambda table, inode=inode: table.count_open(inode, kind, 6), stores=stores)  # type: ignore[misc]
        table = workers.next()
        assert not table.settle(6 | RESENT_BIT)
        table.count_open(inode, kind, 6 | RESENT_BIT)
        assert sum(table.opens(inode)) == 2

        def release(table: InodeTable, inode: object = inode) -> None:
            table.count_release(inode, kind, 10, is_undo=False)  # type: ignore[arg-type]

        workers.run(release, stores=stores)
        table = workers.next()
        if not table.settle(10 | RESENT_BIT):
            release(table)
        assert sum(table.opens(inode)) == 1
        if opened:
            return
    raise AssertionError("the open did not end")


def test_an_answer_that_was_not_wanted_is_taken_back_once() -> None:
    """Its worker took it back and died later: nobody takes it back again."""
    workers = _Workers()
    workers.table.remember(_file("/a"), 2)
    inode = workers.table.remember(_file("/a"), 4)
    workers.table.take_back(inode.nodeid, 4)
    primed = workers.table.remember_all([_file("/a"), _file("/b")], 6)
    workers.table.take_back_all(primed)
    table = workers.next()
    table.settle(4 | RESENT_BIT)
    table.settle(6 | RESENT_BIT)
    assert _counted(table) == {"/a 1": 1}


def test_two_workers_that_live_share_numbers() -> None:
    """What one tells the kernel, the other finds; each counts."""
    memory_fd = shared.create()
    path = f"/proc/self/fd/{memory_fd}"
    one, two = (
        InodeTable(_ROOT, SharedMemory(memory_fd, size_bytes=_SIZE), slot=slot, lock_path=path) for slot in (0, 1)
    )
    told = one.remember(_file("/a"), 2).nodeid
    assert two.remember(_file("/a"), 4).nodeid == told
    assert two.forget(told, 1) is None
    assert two.forget(told, 1) is not None
    assert one.load(told) is None
    assert one.remember(_file("/a"), 6).nodeid != told


def test_what_a_killed_worker_counted_another_settles_once_it_is_known_to_have_ended() -> None:
    """Killed at every store, and before it has a successor; while it may live nobody touches what it counted."""
    for stores in range(100):
        memory_fd = shared.create()
        path = f"/proc/self/fd/{memory_fd}"
        workers = _Workers(memory_fd)
        living = InodeTable(_ROOT, SharedMemory(memory_fd, size_bytes=_SIZE), slot=1, lock_path=path)
        workers.table.remember(_file("/other"), 2)
        finished = workers.run(lambda table: table.remember(_file("/a"), 4), stores=stores)
        living.settle(4 | RESENT_BIT)
        assert not finished or _counted(living) == {"/a 1": 1, "/other 1": 1}
        shared.retire(memory_fd, 0)
        living.settle(4 | RESENT_BIT)
        living.remember(_file("/a"), 4 | RESENT_BIT)
        assert _counted(living) == {"/a 1": 1, "/other 1": 1}
        workers.next()
        living.settle(2 | RESENT_BIT)  # its successor is another, and the old one's counts can still be settled
        assert _counted(living) == {"/a 1": 1}
        if finished:
            return
    raise AssertionError("the look-up did not end")


_STEP = st.tuples(st.sampled_from("abcd"), st.sampled_from("12"), st.integers(0, 2), st.integers(0, 25))


@settings(max_examples=40)
@given(st.lists(_STEP, max_size=30))
def test_the_shared_table_agrees_with_a_dict_of_counts_through_deaths(steps: list[tuple[str, str, int, int]]) -> None:
    """Any look-ups and forgets, with a worker killed in many of them, leave the counts of a run without deaths."""
    workers = _Workers()
    counts: dict[int, int] = {}  # by number
    numbers: dict[str, int] = {}
    for step, (name, version, action, stores) in enumerate(steps):
        unique, key = 2 * step + 2, f"/{name} {version}"
        if action or not counts.get(numbers.get(key, 0)):
            entry = _file(f"/{name}", version)
            if not workers.run(lambda table, e=entry, u=unique: table.remember(e, u), stores=stores):  # type: ignore[misc]
                workers.next().settle(unique | RESENT_BIT)
                workers.table.remember(entry, unique | RESENT_BIT)
            # Another version in between makes a new inode; the old one's number is then no longer the path's.
            nodeid = workers.table.nodeid_of(f"/{name}")
            assert nodeid is not None
            numbers[key] = nodeid
            counts[nodeid] = counts.get(nodeid, 0) + 1
        else:
            items = [(numbers[key], 1)]
            if not workers.run(lambda table, i=items, u=unique: table.forget_asked(u, i), stores=stores):  # type: ignore[misc]
                workers.next()
                workers.table.forget_asked(unique, items, workers.table.forgets_done(unique))
            counts[numbers[key]] -= 1
        for nodeid, count in counts.items():
            assert workers.table.lookups_of(nodeid) == count
