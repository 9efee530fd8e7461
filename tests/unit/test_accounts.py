"""Accounts and index: sizes that add up, victims in order and never more than needed, rows that survive."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from orchestra.blocks.accounts import Accounts, CacheFullError, NotAdmittedError, SpaceLimit
from orchestra.blocks.eviction import LruPolicy, NeverPolicy
from orchestra.blocks.index import SCHEMA_VERSION, BlockIndex, IndexUnavailableError
from orchestra.blocks.layout import is_extent_name
from orchestra.blocks.rules import Origin, SpaceRules
from orchestra.clock import ManualClock
from orchestra.units import GIB, MIB
from tests.support.cache import full_disk

NAMES = [f"{index:032x}" for index in range(10)]
A, B, C, D = NAMES[:4]


def accounts(capacity: int = 100, *, free_bytes: int = GIB, ratio: float = 0.0) -> Accounts:
    return Accounts(LruPolicy(), SpaceLimit(capacity, ratio, full_disk(free_bytes=free_bytes)))


def filled(books: Accounts, **sizes: int) -> Accounts:
    for letter, size in sizes.items():
        books.grow({"a": A, "b": B, "c": C, "d": D}[letter], size)
    return books


def test_nothing_leaves_while_there_is_room() -> None:
    """Below the limit no victim is chosen."""
    assert list(filled(accounts(), a=50).choose_victims(50, ())) == []


def test_only_as_much_leaves_as_is_needed() -> None:
    """The oldest go first, and no more of them than make room."""
    books = filled(accounts(), a=30, b=30, c=30)
    assert list(books.choose_victims(20, ())) == [A]
    assert list(books.choose_victims(50, ())) == [A, B]
    assert list(books.choose_victims(100, ())) == [A, B, C]


def test_what_was_used_lately_stays() -> None:
    """A touch moves a name to the end of the line; a touch of an unknown name does nothing."""
    books = filled(accounts(), a=40, b=40)
    books.touch(A)
    books.touch(D)
    assert list(books.choose_victims(50, ())) == [B]
    assert D not in books


def test_busy_names_stay() -> None:
    """What is being written is passed over."""
    books = filled(accounts(), a=40, b=40)
    assert list(books.choose_victims(50, {A})) == [B]


def test_no_room_is_an_error_and_costs_nobody_his_place() -> None:
    """What cannot fit even into the empty cache, or not beside what is busy, is refused; nothing has left for it."""
    books = filled(accounts(), a=40, b=40)
    with pytest.raises(CacheFullError, match="no room for 101 bytes"):
        books.choose_victims(101, ())
    with pytest.raises(CacheFullError):
        books.choose_victims(90, {A})
    assert books.used_bytes == 80


def test_reservations_count_as_used() -> None:
    """Bytes that are about to be written take room before they are; settled, they do not."""
    books = filled(accounts(), a=40)
    books.reserve(60)
    assert list(books.choose_victims(1, ())) == [A]
    books.settle(60)
    assert list(books.choose_victims(1, ())) == []
    with pytest.raises(AssertionError, match="settled twice"):
        books.settle(1)


def test_the_free_space_floor_is_kept() -> None:
    """With a tenth of the disk to stay free, room is what lies above that, however large the cache may be."""
    total = 1000 * MIB
    limit = SpaceLimit(10 * GIB, 0.1, full_disk(free_bytes=150 * MIB, total_bytes=total))
    assert limit.room_bytes(0) == 50 * MIB
    books = Accounts(LruPolicy(), SpaceLimit(10 * GIB, 0.1, full_disk(free_bytes=90 * MIB, total_bytes=total)))
    books.grow(A, 30 * MIB)
    books.grow(B, 30 * MIB)
    assert list(books.choose_victims(MIB, ())) == [A]


def test_the_disk_itself_is_a_limit() -> None:
    """A cache that may be larger than its disk evicts before the disk is full, and leaves a little for records."""
    limit = SpaceLimit(10 * GIB, 0.0, full_disk(free_bytes=5 * MIB))
    assert limit.room_bytes(0) == 4 * MIB
    small_disk = SpaceLimit(10 * GIB, 0.0, full_disk(free_bytes=1000, total_bytes=10_000))
    assert small_disk.room_bytes(0) == 500


def test_a_disk_full_of_others_files_does_not_empty_the_cache() -> None:
    """When evicting everything would not help, nothing is evicted."""
    books = filled(accounts(free_bytes=0), a=30, b=30)
    with pytest.raises(CacheFullError):
        books.choose_victims(MIB, ())


def test_the_oldest_make_way_for_what_the_disk_refused() -> None:
    """`choose_oldest` gives so many bytes whatever the limit says, or all there are."""
    books = filled(accounts(), a=10, b=20, c=30)
    assert books.choose_oldest(0, ()) == []
    assert books.choose_oldest(11, ()) == [A, B]
    assert books.choose_oldest(1000, {B}) == [A, C]


def test_sizes_add_up() -> None:
    """Used bytes are the sum of what is held, through growth and removal."""
    books = filled(accounts(1000), a=10, b=20)
    books.grow(A, 5)
    assert (books.used_bytes, books.size_of(A), len(books)) == (35, 15, 2)
    assert books.remove(A) == 15
    assert books.remove(A) == 0
    assert (books.used_bytes, books.size_of(A), books.names()) == (20, 0, [B])


def open_accounts(path: Path) -> tuple[Accounts, BlockIndex, bool]:
    index = BlockIndex(path)
    books = Accounts(LruPolicy(), SpaceLimit(1000, 0.0, full_disk(free_bytes=GIB)), index)
    rows, is_clean = index.load()
    books.load(rows)
    return books, index, is_clean


def write(books: Accounts) -> None:
    books.write_changes(books.take_changes())


def test_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    """The next daemon knows sizes, and evicts in the order in which its predecessor saw the names used."""
    books, index, is_clean = open_accounts(tmp_path / "index")
    assert not is_clean, "a new index vouches for nothing"
    filled(books, a=1, b=2, c=3)
    books.touch(A)
    write(books)
    books.remove(C)
    write(books)
    index.mark_clean(True)
    index.close()
    books, index, is_clean = open_accounts(tmp_path / "index")
    assert is_clean
    assert books.used_bytes == 3
    assert list(books.choose_oldest(100, ())) == [B, A]
    index.close()


def test_whose_an_extent_is_survives_a_restart(tmp_path: Path) -> None:
    """Store and key come back as they were, also a key that is no text; what nobody knew stays unknown."""
    books, index, _ = open_accounts(tmp_path / "index")
    origin = Origin("s3://b", "a/\udcff\n")
    books.expect(A, origin)
    filled(books, a=1, b=2)
    write(books)
    index.close()
    books, index, _ = open_accounts(tmp_path / "index")
    assert dict(books.origins()) == {A: origin, B: None}
    index.close()


def test_an_index_of_the_first_schema_is_taken_over(tmp_path: Path) -> None:
    """What an older daemon wrote is kept: sizes and order of use; owners are not known."""
    connection = sqlite3.connect(tmp_path / "index")
    connection.executescript(
        "CREATE TABLE extents(name TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, last_use INTEGER NOT NULL) "
        "STRICT, WITHOUT ROWID;"
        "CREATE TABLE state(key TEXT PRIMARY KEY, value INTEGER) STRICT, WITHOUT ROWID;"
        f"INSERT INTO extents VALUES ('{A}', 10, 2), ('{B}', 20, 1); INSERT INTO state VALUES ('clean', 1);"
        "PRAGMA user_version = 1"
    )
    connection.close()
    books, index, is_clean = open_accounts(tmp_path / "index")
    assert is_clean
    assert (books.choose_oldest(100, ()), books.used_bytes) == ([B, A], 30)
    assert dict(books.origins()) == {A: None, B: None}
    index.close()


def test_the_time_of_use_counts_within_one_boot(tmp_path: Path) -> None:
    """In another boot an extent counts as used when the daemon started."""
    clock = ManualClock()
    for boot, expected_s in ((b"1" * 16, 1_000_000), (b"1" * 16, 1_000_000), (b"2" * 16, 1_000_050)):
        index = BlockIndex(tmp_path / "index", boot_id=boot)
        books = Accounts(LruPolicy(), SpaceLimit(1000, 0.0, full_disk(free_bytes=GIB)), index, clock=clock)
        books.load(index.load()[0])
        if A not in books:
            filled(books, a=1)
            write(books)
            clock.advance(50)
        assert books.used_s(A) == expected_s
        index.close()


def test_a_policy_that_refuses_is_obeyed_but_for_the_pinned() -> None:
    """With room everything is admitted; without, `never` admits only what a pin asks for."""
    books = Accounts(NeverPolicy(), SpaceLimit(100, 0.0, full_disk(free_bytes=GIB)))
    filled(books, a=60, b=40)
    with pytest.raises(NotAdmittedError, match="keeps what it has"):
        books.choose_victims(10, (), C)
    books.expect(C, Origin("s", "pinned/c"))
    books.set_rules(SpaceRules(frozenset({("s", "pinned")})))
    assert list(books.choose_victims(10, (), C)) == [A]


def test_clean_is_said_once(tmp_path: Path) -> None:
    """Opening an index marks it as in use: a daemon that dies leaves it unclean, whatever it did."""
    _, index, _ = open_accounts(tmp_path / "index")
    index.mark_clean(True)
    index.close()
    _, index, is_clean = open_accounts(tmp_path / "index")
    assert is_clean
    index.close()
    _, index, is_clean = open_accounts(tmp_path / "index")
    assert not is_clean
    index.close()


def test_only_changes_are_written(tmp_path: Path) -> None:
    """A flush carries what changed since the last, and nothing twice."""
    books, index, _ = open_accounts(tmp_path / "index")
    filled(books, a=1, b=2)
    assert {row.name for row in books.take_changes()[0]} == {A, B}
    assert books.take_changes() == ([], [])
    books.grow(A, 1)
    books.remove(B)
    rows, removed = books.take_changes()
    assert ([row.name for row in rows], removed) == ([A], [B])
    index.close()


def test_changes_that_could_not_be_written_are_not_lost(tmp_path: Path) -> None:
    """A locked or full index gets the rows at the next flush, as they are by then."""
    books, index, _ = open_accounts(tmp_path / "index")
    filled(books, a=1, b=2)
    changes = books.take_changes()
    index.close()
    with pytest.raises(IndexUnavailableError, match="the index cannot be written"):
        books.write_changes(changes)
    books.remove(A)
    books.put_back(changes)
    rows, removed = books.take_changes()
    assert ([row.name for row in rows], removed) == ([B], [A])


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_garbage_is_replaced(tmp_path: Path, content: bytes) -> None:
    """A file that is no database costs its rows and nothing else."""
    path = tmp_path / "index"
    path.write_bytes(content)
    books, index, is_clean = open_accounts(path)
    assert (len(books), is_clean) == (0, False)
    filled(books, a=1)
    write(books)
    index.close()
    books, index, _ = open_accounts(path)
    assert books.names() == [A]
    index.close()


def spoiled_index(path: Path, *statements: str) -> None:
    """An index with two rows and the mark of a clean stop, then changed behind the daemon's back."""
    books, index, _ = open_accounts(path)
    filled(books, a=1, b=2)
    write(books)
    index.mark_clean(True)
    index.close()
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        f"PRAGMA user_version = {SCHEMA_VERSION + 1}",
        "DROP TABLE extents",
        "DROP TABLE state",
        "ALTER TABLE extents RENAME COLUMN size_bytes TO bytes",
        "UPDATE extents SET name = '../../etc/passwd' WHERE size_bytes = 1",
        "UPDATE extents SET size_bytes = -5 WHERE size_bytes = 1",
    ],
)
def test_an_index_of_another_making_is_rebuilt(tmp_path: Path, statement: str) -> None:
    """A newer schema, missing tables, rows that no daemon wrote: all are dropped, and the files are counted."""
    spoiled_index(tmp_path / "index", statement)
    books, index, is_clean = open_accounts(tmp_path / "index")
    assert (len(books), is_clean) == (0, False)
    index.close()


def test_rot_in_the_index_never_keeps_the_daemon_from_starting(tmp_path: Path) -> None:
    """Whatever byte of the database is wrong: it opens, and every name in it is one that a daemon may have written."""
    path = tmp_path / "index"
    spoiled_index(path)
    intact = path.read_bytes()
    opened = 0
    for at in [*range(0, 100, 12), *range(4096, len(intact), 1021)]:
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 0xFF]) + intact[at + 1 :])
        books, index, _ = open_accounts(path)
        assert all(is_extent_name(name) for name in books.names())
        index.close()
        opened += 1
    assert opened > 10


def test_a_locked_index_does_not_keep_the_daemon_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that holds the database costs the rows: the daemon goes on with a new one."""
    path = tmp_path / "index"
    spoiled_index(path)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, **more: connect(path, timeout=0.01, **more))
    books, index, is_clean = open_accounts(path)
    assert (len(books), is_clean) == (0, False)
    other.close()
    index.close()


def test_without_any_place_for_an_index_the_daemon_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where no database can be made (here: a folder is in its place) it is kept in memory, and the log says so."""
    (tmp_path / "index").mkdir()
    books, index, is_clean = open_accounts(tmp_path / "index")
    assert not is_clean
    filled(books, a=1)
    write(books)
    index.close()
    assert "the next start counts the cached files again" in caplog.text
