"""Paths of a plan arrive as they were sent, whatever they are, and nothing that is cut or swollen is believed."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.errors import UsageError
from orchestra.prefetch.path_table import (
    PATHS_MAX,
    PATHS_PER_GROUP,
    PATHS_PER_PART,
    PathTable,
    pack_paths,
    table_name,
)


def sent(paths: list[str]) -> PathTable:
    table = PathTable(len(paths))
    for index, part in enumerate(pack_paths(paths)):
        table.add_part(index, part)
    assert not table.missing_parts()
    return table


_NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(_NAMES, min_size=1, max_size=200))
def test_every_path_comes_back(paths: list[str]) -> None:
    """Whatever the names are, each index has its own path again."""
    table = sent(paths)
    assert [table.path(index) for index in range(len(paths))] == paths


def test_a_name_that_is_no_text_comes_back() -> None:
    """Bytes that are not UTF-8 travel as Python's file functions have them."""
    assert sent(["/data/\udcff\udc80.jpg"]).path(0) == "/data/\udcff\udc80.jpg"


def test_a_hundred_thousand_numbered_paths_take_a_few_bytes_each() -> None:
    """Two parts; fewer than 8 bytes for a path of 46, so ten million fit in 80 MB."""
    paths = [f"/imagenet/train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(100_000)]
    table = sent(paths)
    assert table.size_bytes < 8 * len(paths)
    for index in (0, PATHS_PER_GROUP - 1, PATHS_PER_GROUP, PATHS_PER_PART - 1, PATHS_PER_PART, 99_999):
        assert table.path(index) == paths[index]


def test_parts_may_come_twice_and_in_any_order() -> None:
    """Two ranks that send the same table at one time do not disturb each other."""
    paths = [f"/p/{i}" for i in range(PATHS_PER_PART + 1)]
    parts = list(pack_paths(paths))
    table = PathTable(len(paths))
    assert table.missing_parts() == [0, 1]
    table.add_part(1, parts[1])
    table.add_part(1, parts[1])
    assert table.missing_parts() == [0]
    table.add_part(0, parts[0])
    assert table.path(PATHS_PER_PART) == paths[-1]


def test_the_name_stands_for_the_paths_in_their_order() -> None:
    """Other paths, or the same in another order, have another name; golden, since two versions may meet."""
    names = {table_name(list(pack_paths(paths))) for paths in (["/a", "/b"], ["/b", "/a"], ["/a"], ["/a", "/b", "/c"])}
    assert len(names) == 4


@pytest.mark.parametrize("paths", [["/a\0b"], ["/a", "b\0", "c"]])
def test_a_nul_is_refused(paths: list[str]) -> None:
    """It would shift every path after it by one."""
    with pytest.raises(UsageError, match="NUL"):
        list(pack_paths(paths))


def test_what_is_not_a_part_is_refused() -> None:
    """Cut short, of another length, or with an index that there is not."""
    (part,) = pack_paths(["/a"] * 100)
    for index, raw in ((0, part[:-1]), (0, part[:2]), (0, b""), (1, part), (-1, part), (0, part + part)):
        with pytest.raises(UsageError):
            PathTable(100).add_part(index, raw)
    for count in (0, PATHS_MAX + 1):
        with pytest.raises(UsageError):
            PathTable(count)


@pytest.mark.parametrize("group", [b"not deflated", zlib.compress(bytes(100 * 1024 * 1024))])
def test_a_group_that_cannot_be_read_is_an_error_of_its_samples(group: bytes) -> None:
    """Garbage, and a hundred megabytes in a hundred kilobytes, of which no more is inflated than 64 paths can be."""
    table = PathTable(2)
    table.add_part(0, struct.pack("<I", len(group)) + group)
    if group.startswith(b"not"):
        with pytest.raises(UsageError):
            table.path(0)
    else:
        assert len(table.path(1)) <= PATHS_PER_GROUP * 4096
