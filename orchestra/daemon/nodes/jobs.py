"""The jobs of all nodes, seen from any of them; where there is an etcd, also those whose node does not answer.

Owns: finding the node that leads a job, passing questions on, what of a job is written to etcd, taking over a job whose
node stays away. Leaves to others: jobs (jobs.runner), following etcd (etcd_table), reading its rows (job_rows).

A job is changed by the node that leads it alone, whose name is in its row below /orchestra/v1/jobs/. When that node has
left the cluster, the first node that the ring gives for the job writes its own name there, on the condition that the
row is as it was known: one node succeeds. The job is in another term then, and no node takes orders of an earlier
term's leader (jobs.parts); that one forgets the job when it sees the row.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import xxhash

from orchestra.cluster.etcd_gateway import EtcdUnreachableError
from orchestra.cluster.etcd_table import EtcdTable, Row
from orchestra.cluster.records import NodeRecord
from orchestra.daemon.cluster import ClusterNode
from orchestra.daemon.jobs.job import Job, JobState, LoadSpec, job_from_json, spec_from_json
from orchestra.daemon.jobs.runner import JobRunner
from orchestra.daemon.nodes.calls import ASK_TIMEOUT_S, NodeCalls
from orchestra.daemon.nodes.job_rows import JobRow, JobRows
from orchestra.errors import DaemonUnavailableError, NotFoundError, OrchestraError

ROUTE = "/v1/node/jobs"
PREFIX = b"/orchestra/v1/jobs/"
# How often the progress of a job that runs is written to etcd: each write is a sync of its disks.
_WRITE_EVERY_S = 1.0
# Failures that etcd holds of a job: a row stays some kilobytes. The node that leads the job has all.
_FAILURES_WRITTEN_MAX = 20
# Two of a hundred nodes share six letters once in 3,000 clusters, and then both are asked.
SUFFIX_LETTERS = 6
# How long a node has to be out of the cluster (its lease has ended before) until its loads go on elsewhere: a daemon
# that is started again in time goes on itself.
_AWAY_NS = 5_000_000_000
# A daemon that starts waits so long for etcd to say who leads its jobs.
_LISTED_TIMEOUT_S = 5.0
log = logging.getLogger(__name__)


def suffix_of(node_id: str) -> str:
    """Return what the ids of jobs end with that this node leads."""
    return f"-{xxhash.xxh64_hexdigest(node_id.encode())[:SUFFIX_LETTERS]}"


class SharedJobs:
    """One event loop."""

    def __init__(self, cluster: ClusterNode, calls: NodeCalls, jobs: JobRunner) -> None:
        self._cluster = cluster
        self._calls = calls
        self._jobs = jobs
        endpoints: Sequence[str] = cluster.config.endpoints
        self._is_listed = asyncio.Event()
        self._table = EtcdTable(endpoints, PREFIX, self._changed) if endpoints else None
        self._rows = JobRows()
        self._away_since_ns: dict[str, int] = {}
        self._written: dict[str, bytes] = {}
        jobs.is_taken = self._is_taken

    def _changed(self, rows: Mapping[bytes, Row]) -> None:
        self._rows.changed(rows)
        self._is_listed.set()

    def _is_taken(self, job_id: str) -> bool:
        """Whether etcd has a job of that id, which may be one that this node led before it lost its cache."""
        return self._table is not None and job_id.encode() in self._table.rows

    async def run(self) -> None:
        """Write this node's jobs to etcd and follow those of others, until cancelled; returns where there is none."""
        if self._table is None:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._table.run())
            tasks.create_task(self._write_own(self._table))

    async def close(self) -> None:
        """Close connections."""
        if self._table is not None:
            await self._table.close()

    async def all(self) -> list[dict[str, Any]]:
        """Return the jobs of all nodes, oldest first; of a node that does not answer what etcd has of them."""
        found = {job_id: row.to_json() for job_id, row in self._rows.by_id().items()}
        found |= {job["id"]: job for _, job in await self._of_others()}
        found |= {job.job_id: job.to_json() for job in self._jobs.all()}
        return sorted(found.values(), key=lambda job: (job["created_s"], job["id"]))

    async def get(self, job_id: str, wait_s: float) -> dict[str, Any]:
        """Return a job, when its state has changed or after `wait_s`. Raises NotFoundError, DaemonUnavailableError
        where its node does not answer and there is no etcd."""
        try:
            return await self._ask(job_id, "GET", f"?wait_s={wait_s}", wait_s)
        except DaemonUnavailableError:
            row = self._rows.by_id().get(job_id)
            if row is None:
                raise
            await asyncio.sleep(wait_s)
            return row.to_json()

    async def running(self, spec: LoadSpec) -> dict[str, Any] | None:
        """Return the same load that another node leads just now, None where there is none."""
        for _, job in await self._of_others():
            if not JobState(job["state"]).is_over and spec_from_json(job) == spec:
                return job
        return None

    async def retry(self, spec: dict[str, Any], *, newer_than_s: float) -> dict[str, Any] | None:
        """Have the node that led the newest load of the path load what failed in it; return the job, None where no
        other node led one that is newer. Raises what that node answers."""
        led = [
            (job["created_s"], node.node_id, node)
            for node, job in await self._of_others()
            if job["path"] == spec["path"] and job["created_s"] > newer_than_s
        ]
        return await self._calls.ask(max(led)[2], "POST", ROUTE, spec) if led else None

    async def _of_others(self) -> list[tuple[NodeRecord, dict[str, Any]]]:
        """The jobs of the other nodes that answer, as those tell them."""
        nodes = self._others()
        answers = await self._calls.ask_all(nodes, lambda node: self._calls.ask(node, "GET", ROUTE))
        found = []
        for node, answer in zip(nodes, answers, strict=True):
            jobs = [] if isinstance(answer, OrchestraError) else answer.get("jobs")
            found += [(node, job) for job in jobs] if isinstance(jobs, list) else []
        return found

    async def stop(self, job_id: str) -> dict[str, Any]:
        """Stop a job, whoever leads it. Raises UsageError if it is over, and as `get` does."""
        return await self._ask(job_id, "POST", "/stop", 10.0)

    async def _ask(self, job_id: str, method: str, rest: str, wait_s: float) -> dict[str, Any]:
        row = self._rows.by_id().get(job_id)
        written = None if row is None else row.leader
        leaders = [
            node for node in self._others() if node.node_id == written or job_id.endswith(suffix_of(node.node_id))
        ]
        leaders.sort(key=lambda node: node.node_id != written)
        missing: OrchestraError = NotFoundError(f"there is no job {job_id!r} (see: orchestra job ls)")
        if not leaders and row is not None:
            missing = DaemonUnavailableError(f"the node that leads job {job_id} is not in the cluster now")
        for node in leaders:
            route = f"{ROUTE}/{quote(job_id, safe='')}{rest}"
            try:
                return await self._calls.ask(node, method, route, timeout_s=ASK_TIMEOUT_S + wait_s)
            except (NotFoundError, DaemonUnavailableError) as error:
                missing = error
        raise missing

    def _others(self) -> list[NodeRecord]:
        return [node for node in self._cluster.members if node.node_id != self._cluster.node_id]

    async def _write_own(self, table: EtcdTable) -> None:
        while True:
            try:
                await self._write_changed(table)
                await self._take_over(table)
            except EtcdUnreachableError as error:
                log.debug("jobs are written to etcd when it is back: %s", error)
            await asyncio.sleep(_WRITE_EVERY_S)

    async def _write_changed(self, table: EtcdTable) -> None:
        own = {job.job_id: job for job in self._jobs.all()}
        for job_id, job in own.items():
            if self._is_lost(job_id):
                await self._jobs.give_up(job_id)
                self._written.pop(job_id, None)
                continue
            value = self._row_of(job)
            if self._written.get(job_id) != value and await table.put(job_id.encode(), value):
                self._written[job_id] = value
        for job_id, row in self._rows.by_id().items():
            # One that is not over may be a takeover whose answer was lost, or all that a lost disk left: see below.
            if row.leader == self._cluster.node_id and job_id not in own and not _can_go_on(row):
                await table.delete(job_id.encode())
                self._written.pop(job_id, None)

    def _row_of(self, job: Job) -> bytes:
        shown = {**job.to_json(), "leader": self._cluster.node_id}
        shown["failures"] = shown["failures"][:_FAILURES_WRITTEN_MAX]
        return json.dumps(shown).encode()

    # -- taking over -------------------------------------------------------------------------------------------------

    async def may_lead(self, job: Job) -> bool:
        """Whether no other node took that job over while this one was away. An etcd that is away itself cannot say: the
        job goes on then, as it does while etcd is lost."""
        await self.wait_listed()
        return not self._is_lost(job.job_id)

    async def wait_listed(self) -> None:
        """Return when etcd has said which jobs there are, or some seconds later where it is away."""
        if self._table is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LISTED_TIMEOUT_S):
                    await self._is_listed.wait()

    def _is_lost(self, job_id: str) -> bool:
        row = self._rows.by_id().get(job_id)
        return row is not None and row.leader != self._cluster.node_id

    async def _take_over(self, table: EtcdTable) -> None:
        """Go on with loads whose nodes have left the cluster for a while, where the ring gives them to this node."""
        now_ns = self._jobs.tools.clock.now_ns()
        orphans = {job_id: row for job_id, row in self._rows.by_id().items() if self._is_orphan(row)}
        self._away_since_ns = {job_id: self._away_since_ns.get(job_id, now_ns) for job_id in orphans}
        for job_id, row in orphans.items():
            if now_ns - self._away_since_ns[job_id] < _AWAY_NS or not self._is_next(job_id, row):
                continue
            job = job_from_json({**row.job.to_json(), "failures": []})
            job.term += 1
            value = self._row_of(job)
            # Not where the row changed while others were written: it is written on the condition that it is as known.
            if self._rows.by_id().get(job_id) is row and await table.put(job_id.encode(), value):
                self._written[job_id] = value
                self._jobs.adopt(job)

    def _is_orphan(self, row: JobRow) -> bool:
        """Whether that job is one to be taken over: not over, its node gone, and all that it needs is in etcd. Also one
        of this node of which it knows nothing: its takeover was written, but this node never heard so."""
        if not _can_go_on(row):
            return False
        if row.leader == self._cluster.node_id:
            return not self._jobs.has(row.job.job_id)
        members = {member.node_id for member in self._cluster.members}
        return self._cluster.node_id in members and row.leader not in members

    def _is_next(self, job_id: str, row: JobRow) -> bool:
        """Whether the ring gives that job to this node, if it is not this node's already."""
        ring = self._cluster.ring
        if row.leader == self._cluster.node_id:
            return True
        return bool(ring.nodes) and ring.owners(f"j{job_id}".encode(), 1)[0].node_id == self._cluster.node_id


def _can_go_on(row: JobRow) -> bool:
    """Whether the job is not over, and all that it needs is in etcd."""
    return not (row.job.state.is_over or row.job.spec.is_listed or row.job.spec.retry_of)
