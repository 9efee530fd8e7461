"""Blocks and extents cut an object without gap or overlap, at every size up to 5 TiB."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.blocks.geometry import Geometry
from orchestra.errors import ConfigError
from orchestra.units import GIB, KIB, MIB, TIB
from orchestra.values import ByteRange

GEOMETRIES = st.builds(
    lambda block, count: Geometry(block, block * count),
    st.sampled_from([4 * KIB, 64 * KIB, 4 * MIB, 1 * GIB]),
    st.integers(1, 1024),
)
SIZES = st.one_of(st.integers(0, 64 * KIB), st.integers(0, 5 * TIB))


@st.composite
def objects(draw: st.DrawFn) -> tuple[Geometry, int]:
    """A geometry and a size, often just beside a border."""
    geometry = draw(GEOMETRIES)
    unit = draw(st.sampled_from([geometry.block_size_bytes, geometry.extent_size_bytes]))
    near = unit * draw(st.integers(0, 5)) + draw(st.integers(-1, 1))
    return geometry, max(0, draw(st.one_of(SIZES, st.just(near))))


@given(objects(), st.data())
def test_blocks_partition_the_object(object_: tuple[Geometry, int], data: st.DataObject) -> None:
    """Each block ends where the next begins, the first at 0 and the last at the object's end; none is empty."""
    geometry, size = object_
    count = geometry.block_count(size)
    if not count:
        assert size == 0
        return
    assert geometry.block_range(size, 0).start == 0
    assert geometry.block_range(size, count - 1).stop == size
    index = data.draw(st.integers(0, count - 1))
    span = geometry.block_range(size, index)
    assert 0 < span.length <= geometry.block_size_bytes
    if index + 1 < count:
        assert span.length == geometry.block_size_bytes
        assert geometry.block_range(size, index + 1).start == span.stop


@given(objects())
def test_extents_partition_the_object(object_: tuple[Geometry, int]) -> None:
    """The lengths of all extents add up to the object; all but the last are full."""
    geometry, size = object_
    count = geometry.extent_count(size)
    if not count:
        assert size == 0
        return
    assert (count - 1) * geometry.extent_size_bytes + geometry.extent_length(size, count - 1) == size
    assert 0 < geometry.extent_length(size, count - 1) <= geometry.extent_size_bytes
    if count > 1:
        assert geometry.extent_length(size, 0) == geometry.extent_size_bytes


@given(objects(), st.data())
def test_the_blocks_of_a_range_are_those_that_it_touches(object_: tuple[Geometry, int], data: st.DataObject) -> None:
    """First and last block of a range hold its first and last byte; the blocks beside them hold none of it."""
    geometry, size = object_
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    blocks = geometry.blocks_of(ByteRange(start, stop))
    if start == stop:
        assert not blocks
        return
    first, last = geometry.block_range(size, blocks[0]), geometry.block_range(size, blocks[-1])
    assert first.start <= start < first.stop
    assert last.start < stop <= last.stop


@given(GEOMETRIES, st.integers(0, 5000), st.integers(0, 3000))
def test_runs_of_extents_partition_the_blocks(geometry: Geometry, start: int, count: int) -> None:
    """Cutting blocks by extent loses none, and each run lies in the extent that it names."""
    blocks = range(start, start + count)
    runs = list(geometry.extents_of(blocks))
    assert [block for _, run in runs for block in run] == list(blocks)
    for index, run in runs:
        assert run.start // geometry.blocks_per_extent == index == (run.stop - 1) // geometry.blocks_per_extent
    assert len({index for index, _ in runs}) == len(runs)


@pytest.mark.parametrize(("size", "is_small"), [(0, True), (1, True), (4096, True), (4097, False)])
def test_an_object_of_one_block_is_small(size: int, is_small: bool) -> None:
    """Small means at most one block, the empty object included."""
    assert Geometry(4096, 16384).is_small(size) is is_small


@pytest.mark.parametrize("block", [0, 1, 3, 4095, 5000, 12288, 2 * GIB])
def test_a_bad_block_size_is_refused(block: int) -> None:
    """A block is a power of two from 4 KiB to 1 GiB; the error says so."""
    with pytest.raises(ConfigError, match="power of two from 4KiB to 1GiB"):
        Geometry(block, max(1, block) * 4)


@pytest.mark.parametrize("extent", [0, 4095, 4097, 6144, 4096 * 1025])
def test_a_bad_extent_size_is_refused(extent: int) -> None:
    """An extent is 1 to 1,024 whole blocks; the error says so."""
    with pytest.raises(ConfigError, match=r"multiple of cache.block_size 4096, at most 1024"):
        Geometry(4096, extent)
