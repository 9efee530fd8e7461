"""Published records: rows sorted by name, found by name, fresh for as long as asked, replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.metadata.records import Record, RecordBuilder, RecordEntry, open_record, publish_record
from orchestra.values import EntryKind, ObjectInfo

BOOT = b"b" * 16
S = 1_000_000_000


def built(*entries: RecordEntry, fetched_ns: int = 0, requests: int = 1) -> Record:
    builder = RecordBuilder()
    for entry in entries:
        builder.add(entry)
    raw = builder.pack(boot_id=BOOT, fetched_ns=fetched_ns, wall_s=0.0, requests=requests)
    return Record(memoryview(raw), (0, 0))


def file(name: bytes, size: int = 1, version: str = '"v"') -> RecordEntry:
    return RecordEntry(name, EntryKind.FILE, size, 7, version)


def directory(name: bytes) -> RecordEntry:
    return RecordEntry(name, EntryKind.DIRECTORY, 0, 0, "")


NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: b"/" not in name and b"\0" not in name)
ROWS = st.builds(
    RecordEntry,
    NAMES,
    st.just(EntryKind.FILE),
    st.integers(0, 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
)


@given(st.dictionaries(NAMES, ROWS, max_size=20), NAMES)
def test_a_record_holds_what_was_added(rows: dict[bytes, RecordEntry], other: bytes) -> None:
    """Every row comes back whole, in order of its name's bytes; a name that was not added is not found."""
    entries = [RecordEntry(name, row.kind, row.size_bytes, row.mtime_ns, row.version) for name, row in rows.items()]
    record = built(*entries)
    assert list(record) == sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        assert record.find(entry.name) == entry
    assert (record.find(other) is not None) == (other in rows)


def test_an_empty_record_says_that_nothing_is_there() -> None:
    """A record without rows is one, and finds nothing."""
    record = built()
    assert len(record) == 0
    assert list(record) == []
    assert record.find(b"a") is None


def test_a_directory_hides_a_file_of_its_name() -> None:
    """Where a store has both, the listing shows the directory and counts the file as hidden."""
    for rows in ((file(b"x"), directory(b"x")), (directory(b"x"), file(b"x"))):
        record = built(*rows)
        assert list(record) == [directory(b"x")]
        assert record.hidden_count == 1


def test_the_directories_are_told_without_the_files() -> None:
    """In order of their names, wherever files stand between them."""
    names = [directory(b"b"), file(b"a"), file(b"c"), directory(b"e"), directory(b"d"), file(b"f")]
    assert list(built(*names).directories()) == [b"b", b"d", b"e"]
    assert list(built(file(b"a")).directories()) == []


def test_a_name_that_comes_twice_is_shown_once() -> None:
    """A store that repeats itself in a listing does not make two files of one."""
    assert len(built(file(b"x"), file(b"y"), file(b"x"))) == 2


def test_versions_and_names_need_not_be_utf8() -> None:
    """Bytes that are no text survive, as Python's own file functions have them."""
    builder = RecordBuilder()
    builder.add_object(b"\xff\xfe", ObjectInfo("\udcff\udcfe", 3, 4, "v\udcff"))
    record = Record(memoryview(builder.pack(boot_id=BOOT, fetched_ns=0, wall_s=0.0, requests=1)), (0, 0))
    assert record.row(0) == RecordEntry(b"\xff\xfe", EntryKind.FILE, 3, 4, "v\udcff")


@pytest.mark.parametrize(
    ("freshness_s", "age_s", "is_fresh"),
    [
        (60.0, 0, True),
        (60.0, 60, True),
        (60.0, 60.001, False),
        (0.0, 0, False),
        (float("inf"), 10**9, True),
    ],
)
def test_a_record_is_fresh_for_so_long(freshness_s: float, age_s: float, is_fresh: bool) -> None:
    """A record may be used until it is exactly as old as the freshness; zero means never, immutable for ever."""
    record = built(fetched_ns=5 * S)
    assert record.is_fresh(freshness_s, boot_id=BOOT, now_ns=5 * S + int(age_s * S)) is is_fresh


def test_a_record_of_another_boot_has_no_age() -> None:
    """The clock of another boot says nothing, so only immutable records outlive a boot."""
    record = built(fetched_ns=5 * S)
    assert not record.is_fresh(60.0, boot_id=b"c" * 16, now_ns=5 * S)
    assert record.is_fresh(float("inf"), boot_id=b"c" * 16, now_ns=5 * S)


def published(path: Path, *names: bytes) -> None:
    builder = RecordBuilder()
    for name in names:
        builder.add(file(name))
    raw = builder.pack(boot_id=BOOT, fetched_ns=0, wall_s=0.0, requests=1)
    publish_record(str(path), raw, temporary=f"{path}.tmp")


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_published_record_is_read_in_place(tmp_path: Path, count: int) -> None:
    """Small records are read, large ones mapped; both say the same."""
    names = [f"{index:06}".encode() for index in range(count)]
    published(tmp_path / "r", *names)
    record = open_record(str(tmp_path / "r"))
    assert record is not None
    assert [row.name for row in record] == names


def test_a_reader_keeps_the_record_it_opened(tmp_path: Path) -> None:
    """Replacing a record leaves what is open as it was: nothing is written in place."""
    names = [f"{index:06}".encode() for index in range(1000)]
    published(tmp_path / "r", *names)
    before = open_record(str(tmp_path / "r"))
    published(tmp_path / "r", b"other")
    assert before is not None
    assert [row.name for row in before] == names


def test_every_record_has_an_identity_of_its_own(tmp_path: Path) -> None:
    """Records that follow one another within a tick of the clock, on inodes used again, are still told apart."""
    seen = set()
    for index in range(200):
        published(tmp_path / "r", b"%d" % index)
        record = open_record(str(tmp_path / "r"))
        assert record is not None
        seen.add(record.identity)
        assert record.identity[1] < 2**60, "a number of ours and not the file system's clock, which ticks too slowly"
    assert len(seen) == 200


def test_what_cannot_be_published_leaves_nothing_behind(tmp_path: Path) -> None:
    """A record that finds no place leaves no temporary file."""
    with pytest.raises(OSError, match="No such file"):
        publish_record(str(tmp_path / "missing" / "r"), b"x", temporary=str(tmp_path / "t"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_record_is_not_opened(tmp_path: Path) -> None:
    """Garbage, an empty file, a folder, a link or a FIFO in a record's place is no record, and nobody waits for it."""
    (tmp_path / "garbage").write_bytes(os.urandom(5000))
    (tmp_path / "large").write_bytes(os.urandom(50_000))
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    published(tmp_path / "real", b"x")
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "fifo")
    for name in ("garbage", "large", "empty", "folder", "link", "fifo", "missing"):
        assert open_record(str(tmp_path / name)) is None
