"""How far is read ahead: from the first block on, in growing windows, closed by a jump, never twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestra.prefetch.readahead import STREAMS_MAX, WINDOW_BLOCKS_MAX, Stream, Streams


def one(block: int) -> range:
    return range(block, block + 1)


def test_a_reader_at_the_start_is_read_ahead_of() -> None:
    """The first block of an object opens a window of one."""
    assert Stream().read(one(0), 100) == range(1, 2)


def test_a_reader_in_the_middle_is_not() -> None:
    """One block somewhere is no stream; the one after it makes it one."""
    stream = Stream()
    assert not stream.read(one(50), 100)
    assert stream.read(one(51), 100) == range(52, 53)


def test_the_window_grows_by_four_up_to_its_limit() -> None:
    """1, 4, 16, 32 blocks ahead, and no further."""
    stream = Stream()
    windows = []
    for block in range(200):
        if stream.read(one(block), 10_000):
            windows.append(stream.window)
    assert windows[:4] == [1, 4, 16, WINDOW_BLOCKS_MAX]
    assert set(windows[3:]) == {WINDOW_BLOCKS_MAX}
    assert stream.ahead - stream.position <= WINDOW_BLOCKS_MAX


def test_a_jump_closes_the_window() -> None:
    """After a seek nothing is fetched ahead until the next read goes on from there."""
    stream = Stream()
    for block in range(20):
        stream.read(one(block), 1000)
    assert not stream.read(one(500), 1000)
    assert stream.read(one(501), 1000) == range(502, 503)


def test_reading_the_same_block_again_asks_for_nothing() -> None:
    """Small reads inside one block are one step of the stream."""
    stream = Stream()
    assert stream.read(one(0), 100)
    assert not stream.read(one(0), 100)
    assert not stream.read(one(0), 100)


def test_random_reads_ask_for_nothing() -> None:
    """A shuffled order, as of training samples, causes no read-ahead but by a neighbour's chance."""
    stream = Stream()
    assert not any(stream.read(one(block), 1000) for block in (7, 400, 21, 999, 3, 555, 80, 12))


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(0, 299), st.integers(1, 8)), max_size=40))
def test_what_is_asked_lies_in_the_object_and_ahead(count: int, reads: list[tuple[int, int]]) -> None:
    """Whatever is read: blocks asked for exist, come after what was read, and are asked for once in a stream."""
    stream = Stream()
    for start, length in reads:
        blocks = range(min(start, count - 1), min(start + length, count))
        ahead_before, position_before = stream.ahead, stream.position
        asked = stream.read(blocks, count)
        if asked:
            assert blocks.stop <= asked.start < asked.stop <= count
            assert len(asked) <= WINDOW_BLOCKS_MAX
            is_same_stream = position_before - 1 <= blocks.start <= ahead_before
            assert asked.start >= (ahead_before if is_same_stream else blocks.stop)


@given(st.integers(2, 500), st.integers(1, 40))
def test_a_whole_read_is_asked_for_once_and_in_order(count: int, step: int) -> None:
    """Reading an object through asks for no block twice and for none behind; a reader of single blocks finds every
    block after the first asked for before it comes to it."""
    stream = Stream()
    asked: list[int] = []
    for start in range(0, count, step):
        if step == 1 and start:
            assert start in asked
        asked += stream.read(range(start, min(start + step, count)), count)
    assert asked == sorted(set(asked))
    assert all(0 < block < count for block in asked)


def test_readers_of_different_parts_are_told_apart() -> None:
    """Eight readers that take turns, each going forward in its part, are each read ahead of with a full window, and no
    block is asked for twice."""
    streams = Streams()
    asked: list[int] = []
    for step in range(60):
        for reader in range(STREAMS_MAX):
            asked += streams.read(one(reader * 1000 + step), 10_000)
    assert len(asked) == len(set(asked))
    for reader in range(STREAMS_MAX):
        part = [block for block in asked if reader * 1000 <= block < reader * 1000 + 1000]
        assert max(part) >= reader * 1000 + 60, "ahead of the reader"
        assert max(part) <= reader * 1000 + 60 + WINDOW_BLOCKS_MAX


def test_random_reads_of_a_large_object_ask_for_next_to_nothing() -> None:
    """Of a thousand reads at random in a million blocks none is taken for a stream."""
    streams = Streams()
    places = [(number * 7_919_317) % 1_000_000 for number in range(1, 1000)]
    assert sum(len(streams.read(one(place), 1_000_000)) for place in places) == 0
