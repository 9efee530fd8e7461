"""What is on disk of a job: states that change faster than the disk writes them, and the list that was given."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.daemon.jobs.job import Job, JobState, LoadSpec
from orchestra.daemon.jobs.journal import Journal
from orchestra.errors import UsageError
from tests.support.node import PATIENCE_S


class SlowDisk:
    """Holds each write of a thread back until it may go on, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes = 0
        self.is_writing = threading.Event()
        self.may_go = threading.Event()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, fd: int) -> None:
        self.writes += 1
        self.is_writing.set()
        if threading.current_thread() is not threading.main_thread():
            assert self.may_go.wait(PATIENCE_S)
        self._fsync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.may_go.set()


def job_in(state: JobState) -> Job:
    job = Job("1", LoadSpec("/data"), 0.0)
    job.state = state
    return job


async def begun(disk: SlowDisk) -> None:
    assert await asyncio.to_thread(disk.is_writing.wait, PATIENCE_S)


async def test_the_loop_goes_on_while_the_disk_writes_and_the_last_state_stays(tmp_path: Path, disk: SlowDisk) -> None:
    """Three changes while the disk is busy with the first: the second is never written, the third is there at the
    end."""
    journal = Journal(tmp_path)
    journal.save_soon(job_in(JobState.CREATED))
    await begun(disk)
    for state in (JobState.RUNNING, JobState.SUCCEEDED):
        journal.save_soon(job_in(state))
    disk.may_go.set()
    await journal.settle()
    assert [job.state for job in journal.load()] == [JobState.SUCCEEDED]
    assert disk.writes == 2


async def test_a_job_that_is_forgotten_while_it_is_written_stays_forgotten(tmp_path: Path, disk: SlowDisk) -> None:
    """Neither what a thread writes nor what waits behind it comes after the file was removed."""
    journal = Journal(tmp_path)
    journal.save_soon(job_in(JobState.RUNNING))
    await begun(disk)
    journal.save_soon(job_in(JobState.SUCCEEDED))
    forgetting = asyncio.create_task(asyncio.to_thread(journal.forget, job_in(JobState.SUCCEEDED)))
    disk.may_go.set()
    await forgetting
    await journal.settle()
    assert list(tmp_path.iterdir()) == []


async def test_what_is_saved_at_once_is_newer_than_what_waits(tmp_path: Path, disk: SlowDisk) -> None:
    """A state that waits for its thread is not written over the one that was written at once."""
    journal = Journal(tmp_path)
    journal.save_soon(job_in(JobState.RUNNING))
    journal.save(job_in(JobState.SUCCEEDED))
    disk.may_go.set()
    await journal.settle()
    assert [job.state for job in journal.load()] == [JobState.SUCCEEDED]


@pytest.mark.parametrize("data", [b"PAR1\x15\x04\0\0", "00/001\n".encode("utf-16")])
def test_a_list_that_is_no_text_is_refused(tmp_path: Path, data: bytes) -> None:
    """A table given by mistake, or UTF-16, is one sentence and leaves nothing: not thousands of failures of garbage."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(UsageError, match=r"list is not text \(it holds a NUL byte\): expected a path a line"):
        Journal(tmp_path / "jobs").keep_list("1", str(tmp_path / "list"))
    assert os.listdir(tmp_path / "jobs") == []
