"""Access rings: what readers tell without a message, what the daemon learns, and what is left when either dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.observe.access_ring import NOTES_COUNT, AccessLog, AccessNote, AccessRing, ReadTotals

DIGEST = bytes(range(16))


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def log(directory: str) -> Iterator[AccessLog]:
    opened = AccessLog(directory)
    yield opened
    opened.close()


@pytest.fixture
def ring(directory: str) -> Iterator[AccessRing]:
    opened = AccessRing(directory)
    yield opened
    opened.abandon()


def test_notes_arrive_once_and_in_order(ring: AccessRing, log: AccessLog) -> None:
    """The daemon sees each read since it last looked, and does not see it again."""
    ring.hit(DIGEST, 0, 1, 100)
    ring.miss(DIGEST, 1, 3, 200)
    assert log.collect() == [AccessNote(DIGEST, 0, 1), AccessNote(DIGEST, 1, 3)]
    assert log.collect() == []
    ring.hit(DIGEST, 9, 1, 1)
    assert log.collect() == [AccessNote(DIGEST, 9, 1)]


def test_totals_count_hits_and_misses(ring: AccessRing, log: AccessLog) -> None:
    """Reads and bytes are counted by kind, at the moment of asking."""
    ring.hit(DIGEST, 0, 1, 100)
    ring.hit(DIGEST, 0, 1, 11)
    ring.miss(DIGEST, 1, 3, 200)
    assert log.totals() == ReadTotals(hits=2, hit_bytes=111, misses=1, miss_bytes=200)


def test_a_slow_daemon_misses_notes_but_no_counts(ring: AccessRing, log: AccessLog) -> None:
    """Notes beyond the ring overwrite the oldest; the totals stay exact."""
    assert log.collect() == []
    for index in range(NOTES_COUNT + 100):
        ring.hit(DIGEST, index, 1, 1)
    notes = log.collect()
    assert [note.first_block for note in notes] == list(range(100, NOTES_COUNT + 100))
    assert log.totals().hits == NOTES_COUNT + 100


def test_several_readers_add_up(directory: str, log: AccessLog) -> None:
    """Each reader has a ring of its own; the daemon knows their sum."""
    rings = [AccessRing(directory) for _ in range(3)]
    for ring in rings:
        ring.hit(DIGEST, 0, 1, 10)
    assert log.totals() == ReadTotals(hits=3, hit_bytes=30)
    assert len(log.collect()) == 3
    assert log.readers_count == 3
    for ring in rings:
        ring.abandon()


def test_the_ring_of_a_reader_that_left_is_read_and_removed(directory: str, log: AccessLog) -> None:
    """Its last notes count, then its file goes and its totals stay."""
    ring = AccessRing(directory)
    ring.hit(DIGEST, 5, 1, 10)
    ring.abandon()
    assert log.collect() == [AccessNote(DIGEST, 5, 1)]
    assert os.listdir(directory) == []
    assert log.totals() == ReadTotals(hits=1, hit_bytes=10)


def test_a_killed_reader_is_noticed(directory: str, log: AccessLog) -> None:
    """The kernel lets go of a dead reader's lock, so its ring is read and removed like any other."""
    ready, their_end = os.pipe()
    pid = os.fork()
    if not pid:
        AccessRing(directory).hit(DIGEST, 1, 1, 10)
        os.write(their_end, b"x")
        signal.pause()
        os._exit(1)
    assert os.read(ready, 1) == b"x"
    assert log.totals().hits == 1
    log.collect()
    assert len(os.listdir(directory)) == 1, "a living reader keeps its ring"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    log.collect()
    assert os.listdir(directory) == []
    assert log.totals().hits == 1
    os.close(ready)
    os.close(their_end)


def test_rings_outlive_the_daemon(ring: AccessRing, directory: str) -> None:
    """The next daemon sees the notes that its predecessor did not, and goes on from there."""
    first = AccessLog(directory)
    ring.hit(DIGEST, 0, 1, 1)
    first.collect()
    first.close()
    ring.hit(DIGEST, 1, 1, 1)
    second = AccessLog(directory)
    assert AccessNote(DIGEST, 1, 1) in second.collect()
    ring.hit(DIGEST, 2, 1, 1)
    assert second.collect() == [AccessNote(DIGEST, 2, 1)]
    second.close()


def test_what_was_read_under_an_earlier_daemon_is_not_of_this_one(ring: AccessRing, directory: str) -> None:
    """A mount lives through many daemons; what it read counts from each one's start, as all other figures do."""
    ring.hit(DIGEST, 0, 1, 1000)
    ring.miss(DIGEST, 0, 1, 500)
    log = AccessLog(directory)
    assert log.totals() == ReadTotals()
    ring.hit(DIGEST, 1, 1, 10)
    assert log.totals() == ReadTotals(hits=1, hit_bytes=10)
    ring.abandon()
    log.collect()
    assert log.totals() == ReadTotals(hits=1, hit_bytes=10)
    log.close()


def test_without_a_directory_reading_goes_on(tmp_path: Path) -> None:
    """A reader that cannot make its ring reads all the same; statistics are not worth an error."""
    ring = AccessRing(str(tmp_path / "missing"))
    ring.hit(DIGEST, 0, 1, 1)
    ring.miss(DIGEST, 0, 1, 1)
    ring.abandon()


def test_strange_files_are_left_alone(tmp_path: Path, ring: AccessRing, log: AccessLog) -> None:
    """Garbage, folders, links, FIFOs and unfinished rings beside the rings are neither read nor removed."""
    (tmp_path / "garbage").write_bytes(b"x" * 100_000)
    (tmp_path / "short").write_bytes(b"ORCA")
    (tmp_path / "empty").touch()
    (tmp_path / ".unfinished").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("garbage")
    os.mkfifo(tmp_path / "fifo")
    ring.hit(DIGEST, 0, 1, 1)
    assert log.collect() == [AccessNote(DIGEST, 0, 1)]
    assert log.readers_count == 1
    assert len(list(tmp_path.iterdir())) == 8
