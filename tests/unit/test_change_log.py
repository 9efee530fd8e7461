"""The log by which the daemon tells others of changes: what is told, to whom, and what a slow reader gets."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestra.observe.change_log import EVERYTHING, RING_BYTES, Change, ChangeLog, ChangeReader, Scope

A = Change(Scope.KEY, "s3://bucket", "folder/a")
B = Change(Scope.BELOW, "", "/mounted")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "changes")


def test_a_reader_gets_what_is_told_after_it_began(path: str) -> None:
    """Once each, in order, with names that are no text."""
    log = ChangeLog(path)
    log.note([A])
    reader = ChangeReader(path)
    odd = Change(Scope.CHILDREN, "file:///x", "\udcff/n\n/")
    log.note([B, odd])
    assert reader.wait() == [B, odd]
    log.note([A])
    assert reader.wait() == [A]


def test_a_reader_that_waits_is_woken(path: str) -> None:
    """By the next change, and by `close`."""
    log = ChangeLog(path)
    reader = ChangeReader(path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(reader.wait)
        log.note([A])
        assert waiting.result(60) == [A]
        waiting = pool.submit(reader.wait)
        reader.close()
        assert waiting.result(60) is None


def test_the_next_reader_goes_on_where_the_last_one_was(path: str) -> None:
    """Also over a restart of the daemon."""
    log = ChangeLog(path)
    position = ChangeReader(path).position
    log.note([A])
    log.close()
    ChangeLog(path).note([B])
    assert ChangeReader(path, position).wait() == [A, B]


def test_the_file_stays_small_and_notes_go_round_its_end(path: str) -> None:
    """A reader that keeps up misses nothing in three rounds."""
    log = ChangeLog(path)
    reader = ChangeReader(path)
    size_bytes = os.stat(path).st_size
    for turn in range(3 * RING_BYTES // 40_000):
        changes = [Change(Scope.KEY, "s", f"{turn}/{index:030}") for index in range(1000)]
        log.note(changes)
        assert reader.wait() == changes
    assert os.stat(path).st_size == size_bytes


def test_a_reader_that_fell_behind_takes_everything_for_changed(path: str) -> None:
    """Rather than miss one note; the same after more at once than the file holds."""
    log = ChangeLog(path)
    reader = ChangeReader(path)
    many = [Change(Scope.KEY, "s", f"{index:060}") for index in range(9000)]
    for _ in range(3):
        log.note(many)
    assert reader.wait() == [EVERYTHING]
    log.note([Change(Scope.KEY, "s", "k" * 60_000)] * (RING_BYTES // 60_000 + 1))
    assert reader.wait() == [EVERYTHING]
    log.note([A])
    assert reader.wait() == [A]


def test_a_log_that_is_taken_away_ends_its_readers(path: str) -> None:
    """What was told before is still told."""
    log = ChangeLog(path)
    reader = ChangeReader(path)
    log.note([A])
    os.unlink(path)
    log.close()
    assert reader.wait() == [A]
    assert reader.wait() is None


@pytest.mark.parametrize("planted", ["folder", "link", "rubbish"])
def test_what_lies_in_its_place_does_not_stop_the_daemon(path: str, planted: str, tmp_path: Path) -> None:
    """Nobody is told then, unless the file can be made ours; nothing is written through a link."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"x")
    if planted == "folder":
        os.mkdir(path)
    elif planted == "link":
        os.symlink(victim, path)
    else:
        Path(path).write_bytes(b"rubbish")
    log = ChangeLog(path)
    if planted == "rubbish":
        reader = ChangeReader(path)
        log.note([A])
        assert reader.wait() == [A]
    else:
        log.note([A])
    assert victim.read_bytes() == b"x"


def test_without_a_log_there_is_no_reader(path: str) -> None:
    """An OSError, which a client turns into "nobody tells"."""
    with pytest.raises(FileNotFoundError):
        ChangeReader(path)
