"""The inode table counts exactly, and a rewritten object is another inode."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import NameTooLongError
from orchestra.fuse.inodes import InodeTable, child_path, inode_number_of
from orchestra.values import Entry, EntryKind

_ROOT = Entry("/", EntryKind.DIRECTORY, 0, 0, "")


def _file(path: str, version: str) -> Entry:
    return Entry(path, EntryKind.FILE, 1, 0, version)


def test_a_path_keeps_its_number_while_its_version_holds() -> None:
    """Two look-ups of one version are one inode."""
    table = InodeTable(_ROOT)
    assert table.remember(_file("/a", "1")) is table.remember(_file("/a", "1"))


def test_a_rewritten_object_is_a_new_inode_and_the_old_one_lives_on() -> None:
    """The kernel's pages and open files of the old version stay with the old number."""
    table = InodeTable(_ROOT)
    old = table.remember(_file("/a", "1"))
    new = table.remember(_file("/a", "2"))
    assert new.nodeid != old.nodeid
    assert table.get(old.nodeid) is old
    assert table.nodeid_of("/a") == new.nodeid


def test_forgetting_the_old_version_leaves_the_new_one_findable() -> None:
    """The path belongs to the newest version only."""
    table = InodeTable(_ROOT)
    old = table.remember(_file("/a", "1"))
    new = table.remember(_file("/a", "2"))
    assert table.forget(old.nodeid, 1) is old
    assert table.remember(_file("/a", "2")) is new


def test_a_file_that_became_a_directory_is_a_new_inode() -> None:
    """Kinds never change under a number."""
    table = InodeTable(_ROOT)
    file = table.remember(_file("/a", ""))
    assert table.remember(Entry("/a", EntryKind.DIRECTORY, 0, 0, "")) is not file


def test_a_directory_keeps_its_number_and_takes_its_newer_time() -> None:
    """Directories have no version."""
    table = InodeTable(_ROOT)
    inode = table.remember(Entry("/d", EntryKind.DIRECTORY, 0, 1, ""))
    assert table.remember(Entry("/d", EntryKind.DIRECTORY, 0, 2, "")) is inode
    assert inode.entry.mtime_ns == 2


def test_the_root_is_never_forgotten() -> None:
    """The kernel holds it as long as the mount lives."""
    table = InodeTable(_ROOT)
    assert table.forget(1, 1) is None
    assert table.get(1) is table.root


def test_forgetting_more_than_was_told_is_noticed() -> None:
    """A count below zero is a defect and never silently wrong."""
    table = InodeTable(_ROOT)
    inode = table.remember(_file("/a", "1"))
    with pytest.raises(AssertionError, match="more often"):
        table.forget(inode.nodeid, 2)


_STEP = st.tuples(st.sampled_from(["/a", "/b", "/c"]), st.sampled_from(["1", "2"]), st.booleans())


@given(st.lists(_STEP, max_size=60))
def test_the_table_agrees_with_a_dict_of_counts(steps: list[tuple[str, str, bool]]) -> None:
    """After any look-ups and forgets, exactly the numbers with a count above zero are known."""
    table = InodeTable(_ROOT)
    counts: dict[int, int] = {}
    for path, version, forget in steps:
        known = table.nodeid_of(path)
        if forget and known is not None:
            gone = table.forget(known, 1)
            counts[known] -= 1
            assert (gone is not None) == (counts[known] == 0)
        else:
            inode = table.remember(_file(path, version))
            counts[inode.nodeid] = counts.get(inode.nodeid, 0) + 1
        for nodeid, count in counts.items():
            assert (table.get(nodeid) is not None) == bool(count)
            assert table.lookups_of(nodeid) == count
    assert len(table) == 1 + sum(count > 0 for count in counts.values())


def test_child_paths_below_the_root_have_one_slash() -> None:
    """ "/" and "/d" are joined alike."""
    assert (child_path("/", "a"), child_path("/d", "a")) == ("/a", "/d/a")


def test_a_path_over_4096_bytes_is_refused() -> None:
    """Counted in bytes, not in characters."""
    parent = "/" + "/".join(["ä" * 120] * 16)
    assert child_path(parent, "x") == parent + "/x"
    with pytest.raises(NameTooLongError):
        child_path(parent, "ä" * 127)


def test_inode_numbers_are_stable_and_differ_by_version() -> None:
    """The same in every listing and process; 0 and 1 are never used."""
    assert inode_number_of(_file("/a", "1")) == inode_number_of(_file("/a", "1"))
    assert inode_number_of(_file("/a", "1")) != inode_number_of(_file("/a", "2"))
    assert 1 < inode_number_of(_file("/a\udcff", "1")) < 2**63
