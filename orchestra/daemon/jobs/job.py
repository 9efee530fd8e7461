"""What a job is: what was asked for, how far it is, how it ended. Values; no I/O.

Owns: states, counts, and the two forms in JSON (what is kept on disk, what is told). Leaves to others: keeping
(journal), doing (load), which jobs there are (runner).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from orchestra.config_cluster import REPLICAS_MAX
from orchestra.errors import OrchestraError, UsageError
from orchestra.namespace.paths import normalize_path
from orchestra.units import format_size

# Failures that are told with the status; all (up to the journal's bound) are kept on disk.
FAILURES_SHOWN_MAX = 100
# The rate shown is that of the last five seconds: steady enough to read, and it shows a stall.
_RATE_WINDOW_NS = 5_000_000_000
# A number; in a cluster a few letters follow that tell the node that led it first.
JOB_ID = r"([1-9][0-9]{0,17})(-[0-9a-f]{6})?"
_JOB_ID = re.compile(JOB_ID, re.ASCII)


def is_job_id(text: str) -> bool:
    """Whether `text` can be the id of a job: nothing else may become part of a file's name."""
    return _JOB_ID.fullmatch(text) is not None


class JobState(Enum):
    """CREATED: it is being found out what there is to do and whether it fits."""

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    VERIFYING = "VERIFYING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What was asked for: the files at and below `path`, or of a list whose relative lines start there, or (`retry_of`)
    those that failed in an earlier job."""

    path: str
    verify: bool = False
    partial: bool = False
    bandwidth_bytes_per_s: int = 0  # 0: no limit
    is_listed: bool = False
    retry_of: str = ""
    replicas: int = 0  # owners that load each extent, in a cluster; 0: as many as its mount asks for

    def to_json(self) -> dict[str, Any]:
        """Return what `spec_from_json` reads."""
        return {
            "path": self.path,
            "verify": self.verify,
            "partial": self.partial,
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
            "is_listed": self.is_listed,
            "retry_of": self.retry_of,
            "replicas": self.replicas,
        }


def spec_from_json(body: Mapping[str, Any]) -> LoadSpec:
    """Return the spec that `body` holds. Raises UsageError, NameTooLongError."""
    try:
        spec = LoadSpec(
            path=normalize_path(body["path"]),
            verify=_flag(body, "verify"),
            partial=_flag(body, "partial"),
            bandwidth_bytes_per_s=int(body.get("bandwidth_bytes_per_s", 0)),
            is_listed=_flag(body, "is_listed"),
            retry_of=str(body.get("retry_of", "")),
            replicas=int(body.get("replicas", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, OrchestraError):
            raise
        raise UsageError(f"not a load: {type(error).__name__}: {error}") from error
    if spec.bandwidth_bytes_per_s < 0:
        raise UsageError(f"bandwidth_bytes_per_s: expected a rate, got {spec.bandwidth_bytes_per_s}")
    if not 0 <= spec.replicas <= REPLICAS_MAX:
        raise UsageError(f"replicas: expected 1 to {REPLICAS_MAX}, got {spec.replicas}")
    return spec


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise UsageError(f"field {name!r}: expected true or false, got {value!r}")
    return value


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a load fits: what it lacks, what may be used for that, and what of it is here already; bytes on disk."""

    missing_bytes: int
    free_bytes: int
    held_bytes: int
    is_by_quota: bool = False  # what may be used is less than the cache has, by a mount's quota

    @property
    def fits(self) -> bool:
        """Whether all of it can be held at the same time."""
        return self.missing_bytes <= self.free_bytes

    @property
    def held_percent(self) -> int:
        """How much of all would be held in the end, rounded down."""
        total = self.missing_bytes + self.held_bytes
        return 100 * (self.held_bytes + min(self.missing_bytes, max(0, self.free_bytes))) // total if total else 100

    def __str__(self) -> str:
        needs, free = format_size(self.missing_bytes), format_size(max(0, self.free_bytes))
        where = " within its mount's quota" if self.is_by_quota else ""
        return f"needs {needs}, {free} free{where}: would hold {self.held_percent} %"


def within_quotas(whole: Fit, parts: Iterable[Fit]) -> Fit:
    """Return `whole` less what quotas refuse of it; `parts` are what of it lies in each store that has one."""
    refused = sum(max(0, part.missing_bytes - max(0, part.free_bytes)) for part in parts)
    free_bytes = whole.missing_bytes - refused
    return (
        replace(whole, free_bytes=free_bytes, is_by_quota=True) if refused and free_bytes < whole.free_bytes else whole
    )


@dataclass(slots=True)
class Job:
    """One load. Changed by its own task alone; read by whoever asks."""

    job_id: str
    spec: LoadSpec
    created_s: float
    state: JobState = JobState.CREATED
    message: str = ""
    reason: str = ""  # why it failed, for programs: "space", "files", "error"
    files_total: int = 0
    bytes_total: int = 0
    files_done: int = 0
    files_failed: int = 0
    blocks_damaged: int = 0
    bytes_done: int = 0
    is_planned: bool = False
    term: int = 0  # how often another node has taken it over
    failures: list[tuple[str, str]] = field(default_factory=list)
    _samples: deque[tuple[int, int]] = field(default_factory=deque)

    def begin_again(self) -> None:
        """Forget how far it was: what is cached says that better."""
        self.files_done = self.files_failed = self.bytes_done = self.blocks_damaged = 0
        self.failures.clear()
        self._samples.clear()

    def sample(self, now_ns: int) -> None:
        """Note how far it is now, for the rate."""
        self._samples.append((now_ns, self.bytes_done))
        while len(self._samples) > 2 and now_ns - self._samples[0][0] > _RATE_WINDOW_NS:
            self._samples.popleft()

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes that came in per second lately; 0 if that is not known."""
        if len(self._samples) < 2 or self.state.is_over:
            return 0.0
        (first_ns, first_bytes), (last_ns, last_bytes) = self._samples[0], self._samples[-1]
        return max(0, last_bytes - first_bytes) * 1e9 / (last_ns - first_ns) if last_ns > first_ns else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until it is done at that rate; None if that cannot be said."""
        rate = self.rate_bytes_per_s
        return max(0, self.bytes_total - self.bytes_done) / rate if rate and self.is_planned else None

    def to_json(self) -> dict[str, Any]:
        """Return what is told of the job."""
        return {
            "id": self.job_id,
            "kind": "load",
            **self.spec.to_json(),
            "state": self.state.value,
            "message": self.message,
            "reason": self.reason,
            "created_s": self.created_s,
            "term": self.term,
            "files_total": self.files_total,
            "files_done": self.files_done,
            "files_failed": self.files_failed,
            "bytes_total": self.bytes_total,
            "bytes_done": self.bytes_done,
            "blocks_damaged": self.blocks_damaged,
            "is_planned": self.is_planned,
            "rate_bytes_per_s": round(self.rate_bytes_per_s),
            "eta_s": round(self.eta_s, 1) if self.eta_s is not None else None,
            "failures": [{"path": path, "message": message} for path, message in self.failures],
        }


def job_from_json(body: Mapping[str, Any]) -> Job:
    """Return the job that `Job.to_json` described. Raises UsageError, ValueError, KeyError, TypeError."""
    return Job(
        job_id=str(body["id"]),
        spec=spec_from_json(body),
        created_s=float(body["created_s"]),
        state=JobState(body["state"]),
        message=str(body["message"]),
        reason=str(body["reason"]),
        files_total=int(body["files_total"]),
        bytes_total=int(body["bytes_total"]),
        files_done=int(body["files_done"]),
        files_failed=int(body["files_failed"]),
        blocks_damaged=int(body["blocks_damaged"]),
        bytes_done=int(body["bytes_done"]),
        is_planned=bool(body["is_planned"]),
        term=int(body.get("term", 0)),
        failures=[(str(one["path"]), str(one["message"])) for one in body["failures"]],
    )
