"""Jobs on disk: what a daemon that was killed leaves to the next one.

    jobs/12.json       what was asked for, and the state; replaced whole, synced
    jobs/12.failed     a JSON line for each file that could not be loaded: {"path", "message"}
    jobs/12.paths      the list that was given, copied: a path a line
    jobs/12.gone       empty: another node leads the job now, and its number is not to be used again

Owns: those files. Leaves to others: what is in them (job). How far a job is stands nowhere: the cache itself says it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from orchestra.daemon.jobs.job import JOB_ID, Job, is_job_id, job_from_json
from orchestra.daemon.kept import replace_document
from orchestra.errors import OrchestraError, UsageError

log = logging.getLogger(__name__)

# Jobs that are over and still listed; older ones are removed.
_FINISHED_JOBS_MAX = 100
# Failures kept of one job: 20 MB of lines. With more, the store is what has to be mended, and a second load finds them.
FAILURES_KEPT_MAX = 100_000
# The beginning of a list, which tells a table or UTF-16 that was given by mistake from paths.
_LOOKED_AT_BYTES = 65536
_JOB_FILE = re.compile(rf"{JOB_ID}\.(json|gone)", re.ASCII)


class Journal:
    """The jobs below one folder; used by the daemon alone, from its loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, bytes] = {}  # documents to be written in a thread, by job
        self._saving: asyncio.Task[None] | None = None
        self._writing = threading.Lock()

    def load(self) -> list[Job]:
        """Return all jobs, oldest first. A file that is none is said in the log and left alone."""
        jobs = []
        for _, path in sorted(self._numbered("json")):
            try:
                jobs.append(job_from_json(json.loads(path.read_bytes())))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s is no job: %s", path, error)
        return jobs

    def next_id(self) -> str:
        """Return a number that no job has, nor any file that looks like one's, nor one that another node leads now."""
        return str(max((number for number, _ in self._numbered("json", "gone")), default=0) + 1)

    def _numbered(self, *kinds: str) -> Iterator[tuple[int, Path]]:
        for path in self._folder.iterdir():
            match = _JOB_FILE.fullmatch(path.name)
            if match is not None and match[3] in kinds:
                yield int(match[1]), path

    def save(self, job: Job) -> None:
        """Write the job, synced, in one step. A disk that has no room for it is said in the log: the job goes on."""
        self._waiting[job.job_id] = json.dumps(job.to_json()).encode()
        self._write_waiting(job.job_id)

    def save_soon(self, job: Job) -> None:
        """As `save`, in a thread: on a disk that a load keeps busy the write is synced after seconds. Of several states
        of a job that wait, the last is written."""
        self._waiting[job.job_id] = json.dumps(job.to_json()).encode()
        if self._saving is None:
            self._saving = asyncio.create_task(self._save_waiting())

    async def settle(self) -> None:
        """Return when all is on disk."""
        if self._saving is not None:
            await asyncio.shield(self._saving)

    async def _save_waiting(self) -> None:
        try:
            while self._waiting:
                await asyncio.to_thread(self._write_waiting, next(iter(self._waiting)))
        finally:
            self._saving = None

    def _write_waiting(self, job_id: str) -> None:
        """Write what waits of that job, unless it was written, or the job forgotten, meanwhile."""
        target = self._path(job_id, "json")
        with self._writing:
            document = self._waiting.pop(job_id, None)
            try:
                if document is not None:
                    replace_document(target, document)
            except OSError as error:
                log.error("job %s cannot be written to %s: %s", job_id, target, error.strerror)

    def forget_old(self, jobs: list[Job]) -> list[Job]:
        """Remove the oldest of those that are over, down to the bound; return the removed."""
        over = [job for job in jobs if job.state.is_over]
        removed = over[: max(0, len(over) - _FINISHED_JOBS_MAX)]
        for job in removed:
            self.forget(job)
        return removed

    def forget(self, job: Job) -> None:
        """Remove what is kept of a job. What cannot be removed is said in the log."""
        with self._writing:  # what a thread is writing now goes as well
            self._waiting.pop(job.job_id, None)
            for suffix in ("json", "failed", "paths"):
                self._unlink(self._path(job.job_id, suffix))

    def give_up(self, job: Job) -> None:
        """As `forget`, of a job that another node leads now: its id is in use as long as that one tells of it."""
        mark = self._path(job.job_id, "gone")
        try:
            mark.touch(mode=0o600)
        except OSError as error:
            log.error("%s cannot be made: %s", mark, error.strerror)
        self.forget(job)
        for _, path in sorted(self._numbered("gone"))[:-1]:  # the last one is enough
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s cannot be removed: %s", path, error.strerror)

    # -- failures --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def failures(self, job_id: str) -> Iterator[FailureFile]:
        """A new, empty file for the failures of a job, open while the block runs."""
        with self._path(job_id, "failed").open("w", encoding="utf-8", errors="surrogateescape") as file:
            yield FailureFile(file)

    def failed(self, job_id: str) -> Iterator[dict[str, str]]:
        """Yield {path, message} of what failed, read bit by bit; a line that is being written is left out."""
        for line in self._lines(job_id, "failed"):
            if line.endswith("\n"):
                yield json.loads(line)

    def failed_paths(self, job_id: str) -> Iterator[str]:
        """Yield the paths that failed, read bit by bit."""
        for failure in self.failed(job_id):
            yield str(failure["path"])

    # -- lists -----------------------------------------------------------------------------------------------------

    def keep_list(self, job_id: str, source: str) -> None:
        """Copy a list of paths, so that the job does not depend on the file that was given. Raises UsageError."""
        try:
            with Path(source).open("rb") as listed:
                is_text = b"\0" not in listed.read(_LOOKED_AT_BYTES)
            if is_text:
                shutil.copyfile(source, self._path(job_id, "paths"))
        except OSError as error:
            raise UsageError(f"the list {source} cannot be read: {error.strerror}") from error
        if not is_text:
            raise UsageError(f"the list {source} is not text (it holds a NUL byte): expected a path a line, in UTF-8")

    def listed_paths(self, job_id: str, base: str) -> Iterator[str]:
        """Yield the paths of the list, read bit by bit; lines without a leading slash start at `base`."""
        for line in self._lines(job_id, "paths"):
            path = line.rstrip("\r\n")
            if path:
                yield path if path.startswith("/") else f"{base.rstrip('/')}/{path}"

    def _lines(self, job_id: str, suffix: str) -> Iterator[str]:
        try:
            with self._path(job_id, suffix).open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                yield from file
        except FileNotFoundError as error:
            raise OrchestraError(f"{error.filename} is gone: start the load again") from error

    def _path(self, job_id: str, suffix: str) -> Path:
        if not is_job_id(job_id):
            raise UsageError(f"not the id of a job: {job_id[:100]!r}")
        return self._folder / f"{job_id}.{suffix}"


class FailureFile:
    """Where the failures of a running job are written."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._count = 0

    def add(self, path: str, message: str) -> None:
        """Write one, up to the bound. A full disk loses it: the next load finds that the file is missing."""
        self._count += 1
        if self._count <= FAILURES_KEPT_MAX:
            with contextlib.suppress(OSError):
                self._file.write(json.dumps({"path": path, "message": message}) + "\n")
