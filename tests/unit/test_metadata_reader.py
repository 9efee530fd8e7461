"""What is known on this node, from published records alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import CacheLayout, prepare
from orchestra.clock import ManualClock
from orchestra.metadata.reader import Known, MetadataReader, record_name, split_key
from orchestra.metadata.records import RecordBuilder, RecordEntry, publish_record
from orchestra.values import EntryKind
from tests.support.ram import ram_folder


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


BOOT = b"b" * 16
STORE = "s3://b/"


def file(name: bytes, version: str) -> RecordEntry:
    return RecordEntry(name, EntryKind.FILE, 5, 7, version)


class Shelf:
    """A cache directory into which the test publishes records, and a reader of it."""

    def __init__(self, root: Path) -> None:
        self.layout: CacheLayout = prepare(root, Geometry(4096, 16384))[0]
        self.clock = ManualClock()
        self.reader = self.new_reader()

    def new_reader(self, boot_id: bytes = BOOT) -> MetadataReader:
        return MetadataReader(self.layout.listing_file, self.layout.attr_file, clock=self.clock, boot_id=boot_id)

    def listing(self, prefix: str, *entries: RecordEntry) -> None:
        self._publish(self.layout.listing_file(record_name(STORE, prefix)), entries)

    def attr(self, key: str, *entries: RecordEntry) -> None:
        self._publish(self.layout.attr_file(record_name(STORE, key)), entries)

    def _publish(self, path: str, entries: tuple[RecordEntry, ...]) -> None:
        builder = RecordBuilder()
        for entry in entries:
            builder.add(entry)
        raw = builder.pack(boot_id=BOOT, fetched_ns=self.clock.now_ns(), wall_s=0.0, requests=1)
        publish_record(path, raw, temporary=f"{self.layout.tmp}/r")

    def look(self, key: str, freshness_s: float = 60.0) -> Known | None:
        return self.reader.lookup(STORE, key, freshness_s)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.mark.parametrize(
    ("key", "prefix", "name"),
    [("a", "", b"a"), ("a/b", "a/", b"b"), ("a/b/c", "a/b/", b"c"), ("a//b", "a//", b"b"), ("\udcff", "", b"\xff")],
)
def test_a_key_is_listed_by_its_prefix(key: str, prefix: str, name: bytes) -> None:
    """Everything up to the last slash lists a key; what follows is its name there."""
    assert split_key(key) == (prefix, name)


def test_nothing_is_known_at_first(shelf: Shelf) -> None:
    """Without records there is no answer, which is not the answer that nothing is there."""
    assert shelf.look("a") is None
    assert shelf.reader.listing(STORE, "", 60.0) is None
    assert shelf.reader.any_listing(STORE, "") is None


def test_a_listing_answers_for_its_keys(shelf: Shelf) -> None:
    """A fresh listing knows what is in the directory, and what is not."""
    shelf.listing("d/", file(b"a", "1"))
    assert shelf.look("d/a") == Known(file(b"a", "1"))
    assert shelf.look("d/b") == Known(None)
    assert shelf.look("d") is None, "a listing of d/ says nothing about d"


def test_a_key_of_its_own_answers_without_a_listing(shelf: Shelf) -> None:
    """One look-up is known for itself, present or absent."""
    shelf.attr("d/a", file(b"a", "1"))
    shelf.attr("d/b")
    assert shelf.look("d/a") == Known(file(b"a", "1"))
    assert shelf.look("d/b") == Known(None)
    assert shelf.look("d/c") is None


def test_old_records_do_not_answer(shelf: Shelf) -> None:
    """A record older than the freshness is as good as none; a younger one of the key still answers."""
    shelf.listing("", file(b"a", "1"))
    shelf.clock.advance(61)
    assert shelf.look("a") is None
    assert shelf.reader.listing(STORE, "", 60.0) is None
    assert shelf.reader.any_listing(STORE, "") is not None
    shelf.attr("a", file(b"a", "2"))
    assert shelf.look("a") == Known(file(b"a", "2"))
    assert shelf.look("a", float("inf")) == Known(file(b"a", "1"))


def test_strict_is_never_answered_from_records(shelf: Shelf) -> None:
    """Freshness zero asks every time, even for what was learnt this instant."""
    shelf.listing("", file(b"a", "1"))
    shelf.attr("a", file(b"a", "1"))
    assert shelf.look("a", 0.0) is None


def test_stores_do_not_answer_for_one_another(shelf: Shelf) -> None:
    """The same key in another store is another question."""
    shelf.listing("", file(b"a", "1"))
    assert shelf.reader.lookup("s3://other/", "a", 60.0) is None


def test_a_replaced_record_is_seen_at_once(shelf: Shelf) -> None:
    """A reader that has a record in memory looks whether it is still the one in place; also at the same instant."""
    for version in range(50):
        shelf.listing("", file(b"a", str(version)))
        assert shelf.look("a") == Known(file(b"a", str(version)))


def test_a_removed_record_is_forgotten(shelf: Shelf) -> None:
    """What the daemon took away is not answered from memory."""
    shelf.listing("", file(b"a", "1"))
    assert shelf.look("a") is not None
    Path(shelf.layout.listing_file(record_name(STORE, ""))).unlink()
    assert shelf.look("a") is None


def test_after_a_reboot_only_immutable_records_answer(shelf: Shelf) -> None:
    """Nobody knows how long the machine was off."""
    shelf.listing("", file(b"a", "1"))
    later = shelf.new_reader(boot_id=b"c" * 16)
    assert later.lookup(STORE, "a", 60.0) is None
    assert later.lookup(STORE, "a", float("inf")) == Known(file(b"a", "1"))


def test_a_damaged_record_is_none(shelf: Shelf) -> None:
    """Rot in a record costs a question, not a wrong answer."""
    shelf.listing("", file(b"a", "1"))
    path = Path(shelf.layout.listing_file(record_name(STORE, "")))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert shelf.new_reader().lookup(STORE, "a", 60.0) is None


def test_memory_is_bounded(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many directories only the last ones stay mapped; the others are opened again."""
    monkeypatch.setattr("orchestra.metadata.reader._RECORDS_MAX", 10)
    for index in range(50):
        shelf.listing(f"{index}/", file(b"a", str(index)))
        assert shelf.look(f"{index}/a") == Known(file(b"a", str(index)))
    assert len(shelf.reader._records) == 10
    assert shelf.look("0/a") == Known(file(b"a", "0"))
