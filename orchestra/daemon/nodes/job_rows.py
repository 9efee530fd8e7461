"""What etcd holds of jobs, checked: who can write there may have written anything.

Owns: reading rows into values, each once after it changed. Leaves to others: following etcd (etcd_table), what follows
from a row (jobs).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestra.cluster.etcd_table import Row
from orchestra.daemon.jobs.job import Job, is_job_id, job_from_json
from orchestra.errors import OrchestraError

# A number of nine digits and what tells the node. A stranger's larger one would be the last that its node can count to.
_ID_CHARACTERS_MAX = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as the node that leads it wrote it."""

    leader: str
    job: Job

    def to_json(self) -> dict[str, Any]:
        """Return what is told of the job, and who leads it."""
        return {**self.job.to_json(), "leader": self.leader}


class JobRows:
    """The rows of a table, by the jobs' ids. What is no job is left out, and said in the log once."""

    def __init__(self) -> None:
        self._rows: Mapping[bytes, Row] = {}
        self._read: dict[bytes, tuple[int, JobRow | None]] = {}  # and the revision that was read
        self._by_id: dict[str, JobRow] = {}
        self._is_current = True

    def changed(self, rows: Mapping[bytes, Row]) -> None:
        """These are the rows from now on. Costs nothing: many nodes write theirs once a second."""
        self._rows, self._is_current = rows, False

    def by_id(self) -> Mapping[str, JobRow]:
        """The jobs, by id."""
        if not self._is_current:
            self._read = {name: self._read_again(name, row) for name, row in self._rows.items()}
            self._by_id = {row.job.job_id: row for _, row in self._read.values() if row is not None}
            self._is_current = True
        return self._by_id

    def _read_again(self, name: bytes, row: Row) -> tuple[int, JobRow | None]:
        before = self._read.get(name)
        if before is not None and before[0] == row.revision:
            return before
        try:
            return row.revision, job_row_of(name, row.value)
        except (ValueError, OrchestraError) as error:
            log.warning("etcd's job %r is left out: %s", name[:100], str(error)[:200])
            return row.revision, None


def job_row_of(name: bytes, value: bytes) -> JobRow:
    """Return the job that the row of that name holds. Raises ValueError, OrchestraError for one that holds none."""
    try:
        body = json.loads(value)
        job, leader = job_from_json(body), body["leader"]
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a job: {type(error).__name__}: {error}") from error
    if not is_job_id(job.job_id) or len(job.job_id) > _ID_CHARACTERS_MAX or job.job_id.encode() != name:
        raise ValueError("its id is none, or another one")
    if not isinstance(leader, str) or not math.isfinite(job.created_s) or job.term < 0:
        raise ValueError("not a job: its leader, created_s or term")
    return JobRow(leader, job)
