"""A directory as faces see it: rows of a listing with mount points among them, in order, by number and by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.client.directory import NodeDirectory
from orchestra.metadata.records import Record, RecordBuilder, RecordEntry
from orchestra.values import EntryKind


def record(*names: str) -> Record:
    builder = RecordBuilder()
    for name in names:
        builder.add(RecordEntry(name.encode("utf-8", "surrogateescape"), EntryKind.FILE, len(name), 1, '"v"'))
    return Record(memoryview(builder.pack(boot_id=b"b" * 16, fetched_ns=0, wall_s=0.0, requests=1)), (0, 0))


NAMES = st.text(st.sampled_from("abcé𐀀\uffff"), min_size=1, max_size=3)


@given(st.sets(NAMES, max_size=8), st.sets(NAMES, max_size=4))
def test_rows_and_mounts_are_one_sorted_list(rows: set[str], mounts: set[str]) -> None:
    """Every name comes once, in order; a mount point is a directory and hides a row of its name; number and name find
    the same entry."""
    view = NodeDirectory("/d", record(*rows), tuple(sorted(mounts)))
    names = [entry.name for entry in view]
    assert names == sorted(rows | mounts)
    assert len(view) == len(names)
    for index, name in enumerate(names):
        entry = view[index]
        assert entry.path == f"/d/{name}"
        assert entry.is_directory == (name in mounts)
        assert view[index - len(names)] == entry
        assert view.find(name) == entry
    for absent in ("", "zzz", "a" * 9):
        assert view.find(absent) is None


def test_above_all_mounts_there_are_only_mounts() -> None:
    """Without a listing the directory holds the names of the table."""
    view = NodeDirectory("/", None, ("b", "a"))
    assert [entry.path for entry in view] == ["/a", "/b"]
    assert view.find("b") is not None
    assert view.find("c") is None


@pytest.mark.parametrize("index", [2, -3, 100])
def test_beyond_the_ends_is_an_index_error(index: int) -> None:
    """As for any sequence."""
    with pytest.raises(IndexError):
        NodeDirectory("/", record("a", "b"), ())[index]


def test_names_that_are_no_text_come_through() -> None:
    """A name of any bytes is found by what Python calls it."""
    view = NodeDirectory("/", record("\udcff\udcfe"), ("m\udcff",))
    assert [entry.name for entry in view] == ["m\udcff", "\udcff\udcfe"]
    assert view.find("\udcff\udcfe") is not None
